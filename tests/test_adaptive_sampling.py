"""`sample(method="ode", solver="dopri5")`: seeds, shapes, starts, info and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from click.testing import CliRunner
from encoding_cases import VE, denoises, draw, every_sde, flowed, model
from torch import Tensor

from sbm_fast import Sampler, ScoreModel, cli, noise, sample
from sbm_fast.sde import SDE


@every_sde
@pytest.mark.parametrize("part", [1.0, 0.6])
def test_samples_begin_with_the_noise_of_the_plans(sde: SDE, part: float) -> None:
    ends = {"t_max": part * sde.t_max} if part < 1 else {}
    x = flowed((4, 6), sde, seed=3, rtol=1e-6, atol=1e-6, **ends)
    plan = sample(model(), sde, (4, 6), method="ode", solver="rk4", steps=100, seed=3,
                  schedule="log_snr", **ends)  # fmt: skip
    torch.testing.assert_close(x, plan, rtol=1e-3, atol=1e-3)
    plans = Sampler(model(), sde, (4, 6), method="ode", solver="rk4", steps=100, **ends)
    start = plans.start(seed=3).advance(1).x
    torch.testing.assert_close(
        flowed((4, 6), sde, x_init=start, rtol=1e-6, atol=1e-6, **ends), x, rtol=3e-6, atol=1e-6
    )
    other = flowed((4, 6), sde, seed=4, **ends)
    assert float((other - x).abs().max()) > 0.1


def test_samples_follow_their_seed_and_keys() -> None:
    x = flowed()
    assert torch.equal(flowed(), x) and not torch.equal(flowed(seed=1), x)
    assert torch.equal(flowed(seed=None, keys=noise.keys(0, 4)), x)
    assert torch.equal(flowed((2, 6), first_sample=2), x[2:])
    assert torch.equal(torch.cat([flowed((1, 6), first_sample=i) for i in range(4)]), x)
    assert torch.equal(flowed(batch_size=3), x)
    torch.manual_seed(5)
    drawn, info = flowed(seed=None, return_info=True)
    torch.manual_seed(5)
    assert torch.equal(flowed(seed=None), drawn)
    assert torch.equal(flowed(seed=info.seed), drawn)
    before = torch.get_rng_state()
    flowed()
    assert torch.equal(torch.get_rng_state(), before)


def test_float64_samples() -> None:
    x = flowed(dtype=torch.float64, rtol=1e-9, atol=1e-9)
    assert x.dtype == torch.float64
    torch.testing.assert_close(flowed(rtol=1e-6, atol=1e-6).double(), x, rtol=1e-4, atol=1e-5)


def test_shapes_of_samples() -> None:
    known = model(sample_shape=(3, 2))
    assert flowed(None, model=known, num_samples=3).shape == (3, 3, 2)  # type: ignore[arg-type]
    for shape in ((0, 3), (3, 0), (5,), (1, 2, 3, 4)):
        x, info = flowed(shape, return_info=True)
        assert x.shape == shape and info.nfe_of.shape == shape[:1]
        assert x.isfinite().all() and (info.nfe > 0) == (shape[0] > 0)


def test_a_given_start_is_left_alone() -> None:
    start = 8 * draw(4, 6).double()
    kept = start.clone()
    x = flowed(x_init=start, seed=None)
    assert torch.equal(start, kept) and torch.equal(flowed(x_init=start.float()), x)


def test_info_says_what_was_done() -> None:
    calls = []

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return denoises(x, sigma)

    x, info = flowed((5, 3), model=ScoreModel(net, "x0", "sigma"), return_info=True, seed=7)
    assert info.nfe_of.dtype == torch.int64 and int(info.nfe_of.sum()) == sum(calls)
    assert info.nfe == int(info.nfe_of.max()) == len(calls) and info.seed == 7
    assert info.plan is None and info.backend in ("cpu", "eager")
    assert info.seconds == pytest.approx(info.seconds_network + info.seconds_sampler)
    assert info.seconds_network > 0 and info.seconds_sampler > 0
    assert flowed(seed=None, keys=noise.keys(0, 4), return_info=True)[1].seed is None
    plan = sample(cases.network, VE, (2, 3), method="ode", steps=3, return_info=True)[1]
    assert plan.nfe_of is None and plan.plan is not None
    eager, other = flowed((5, 3), backend="eager", return_info=True, seed=7)
    assert other.backend == "eager"
    torch.testing.assert_close(eager, x, rtol=1e-4, atol=1e-4)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(sample_shape=(1, 8, 8))
    monkeypatch.setattr("sbm_fast.nn.shipped.digits", lambda: net)

    def run(*arguments: str) -> Any:
        out = str(tmp_path / "x.npz")
        return CliRunner().invoke(
            cli.main, ["sample", "--method", "ode", "--num", "1", "--seed", "2", "--out", out,
                       "-o", "solver=dopri5", *arguments],
        )  # fmt: skip

    result = run("-o", "rtol=0.1", "-o", "atol=0.1")
    assert result.exit_code == 0, result.output
    assert "ode, adaptive" in result.output and "seed      2" in result.output
    assert np.load(tmp_path / "x.npz")["samples"].shape == (1, 1, 8, 8)
    for arguments, message in (
        (("--steps", "5"), "steps: solver 'dopri5' follows"),
        (("-o", "rtol=-1"), "rtol: expected a finite number > 0"),
        (("-o", "rtoll=1"), "did you mean 'rtol'"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 1 and message in refused.output
