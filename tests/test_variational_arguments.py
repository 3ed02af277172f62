"""DDPM's variational bound: batches, seeds, conditioning, networks of other SDEs, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from variational_cases import F64, LADDER, digits_like, model, network, wavy

from sbm_fast import VPSDE, ScoreModel, noise
from sbm_fast.methods import DynamicThreshold
from sbm_fast.sde import VESDE, NCSNLadder
from sbm_fast.variational import BoundResult, ddpm_chain, variational_bound


def test_float32_is_close_to_float64() -> None:
    x, _ = digits_like(8, (3, 4), 17)
    results = [
        variational_bound(model("eps", wavy), LADDER, x.to(dtype), levels=17, seed=0, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    assert results[0].bits_per_dim.dtype == torch.float64
    torch.testing.assert_close(results[0].terms, results[1].terms, rtol=1e-3, atol=1e-5)


def bound(x: Tensor, net: Any = None, **more: Any) -> BoundResult:
    net = model("eps", wavy) if net is None else net
    return variational_bound(net, LADDER, x, levels=17, draws=2, **more)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, _ = digits_like(7, (40, 50), 17)
    x = x.float()
    whole = bound(x, seed=3)
    names = ("bits_per_dim", "stderr", "columns", "prior", "terms")
    for size in (1, 3, 7, 100):
        parts = bound(x, seed=3, batch_size=size)
        for name in names:
            assert torch.equal(getattr(parts, name), getattr(whole, name)), (size, name)
    order, keys = torch.tensor([4, 0, 6, 1, 5, 2, 3]), noise.keys(3, 7)
    mixed = bound(x[order], keys=keys[order])
    shard = bound(x[2:5], seed=3, first_sample=2)
    for name in names:
        assert torch.equal(getattr(mixed, name), getattr(whole, name)[..., order]), name
        assert torch.equal(getattr(shard, name), getattr(whole, name)[..., 2:5]), name
    assert mixed.seed is None
    assert not torch.equal(bound(x, seed=4).bits_per_dim, whole.bits_per_dim)


def test_the_generator_gives_a_seed_that_is_reported() -> None:
    x, _ = digits_like(2, (3,), 17)
    torch.manual_seed(0)
    first = bound(x)
    assert first.seed is not None
    assert torch.equal(bound(x, seed=first.seed).columns, first.columns)


def test_conditioning_follows_its_samples() -> None:
    x, _ = digits_like(6, (3,), 17)
    shift = torch.linspace(0, 1, 6)

    def net(x: Tensor, label: Tensor, shift: Tensor, scale: float, table: Tensor) -> Tensor:
        assert table.shape == (4,) and x.shape[0] == shift.shape[0]
        return scale * x + shift[:, None]

    conditioned = ScoreModel(net, "eps", "sigma")
    cond = {"shift": shift, "scale": 0.3, "table": torch.zeros(4)}
    whole = bound(x, conditioned, seed=0, cond=cond)
    parts = bound(x, conditioned, seed=0, cond=cond, batch_size=4)
    assert torch.equal(whole.terms, parts.terms)


def test_a_network_of_another_sde_is_matched() -> None:
    """The chain of the VP SDE has the SDE's own levels; a VE network runs on it as well."""
    sde = VPSDE()
    chain = ddpm_chain(sde, 20)
    times = np.arange(1, 21) / 20
    np.testing.assert_allclose(np.sqrt(chain.alphas_cumprod), sde.mean_scale(times), rtol=1e-9)
    np.testing.assert_allclose(chain.nsr(np.arange(20.0)), sde.nsr(times), rtol=1e-9)
    x, _ = digits_like(3, (4,), 17)
    own = variational_bound(model("eps", wavy), chain, x, levels=17, seed=0, **F64)

    def of_ve(x: Tensor, label: Tensor) -> Tensor:
        nsr = label[:, None]
        m = 1 / torch.sqrt(1 + nsr**2)
        return network("eps", wavy)(m * x, label)

    for trained in (VPSDE(), VESDE(0.01, 200.0)):
        net = network("eps", wavy) if isinstance(trained, VPSDE) else of_ve
        other = ScoreModel(net, "eps", "sigma", sde=trained)
        result = variational_bound(other, chain, x, levels=17, seed=0, **F64)
        torch.testing.assert_close(result.terms, own.terms, rtol=1e-7, atol=1e-12)
    with pytest.raises(ValueError, match=r"^t: .*outside the range"):
        variational_bound(ScoreModel(of_ve, "eps", sde=VESDE(0.01, 5.0)), chain, x, levels=17)


def test_a_network_is_put_into_eval_mode_and_sees_no_gradients() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return self.weight * x

    net = Net()
    x, _ = digits_like(2, (3,), 17)
    result = bound(x, ScoreModel(net, "eps", "index", sde=LADDER))
    assert net.training and not result.terms.requires_grad


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_say_where(bad: float, clip: float | None) -> None:
    def net(x: Tensor, label: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        # levels 7 and 3 of sample 5, recognised by its data; level 3 of sample 1
        out[((label <= 7) & (label % 4 == 3) & (x[:, 0] > 500)).nonzero(), 1] = bad
        return out

    broken = ScoreModel(net, "x0", "index", sde=LADDER)
    x = torch.zeros(6, 2)
    x[5] = 1000.0
    for size in (None, 4):
        with pytest.raises(
            ValueError,
            match=r"^model: its outputs.* for 1 of . samples, first for sample 5 at step 5 of 12 "
            r"\(t = 7\)",
        ):
            variational_bound(
                broken, LADDER, x, data_range=(-1000, 1000), levels=3, batch_size=size, seed=0,
                clip_denoised=clip,
            )  # fmt: skip


X = digits_like(3, (2, 4), 17)[0]
EPS = ScoreModel(lambda x, label: x, "eps", "index", sde=LADDER)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": VPSDE()}, TypeError, "schedule: expected a DDPMSchedule"),
        ({"schedule": NCSNLadder([0.1, 1.0])}, TypeError, "schedule: expected a DDPMSchedule"),
        ({"levels": 16}, ValueError, "x: expected one of the levels=16 values"),
        ({"data_range": (0, 1)}, ValueError, r"x: expected values in data_range = \(0, 1\), got -"),
        ({"x": X[:0]}, ValueError, r"x: expected shape \(samples, …\) with at least one value"),
        ({"x": X[:, :0]}, ValueError, "x: expected shape"),
        ({"x": [1.0]}, TypeError, "x: expected a floating tensor"),
        ({"x": X.mul(float("nan"))}, ValueError, "x: .*got nan"),
        ({"variance": "betas"}, ValueError, "variance: unknown value 'betas'"),
        ({"variance": "learned"}, ValueError, "variance: 'learned' needs a network with twice"),
        ({"clip_denoised": 0.0}, ValueError, "clip_denoised: "),
        ({"clip_denoised": DynamicThreshold()}, TypeError, "clip_denoised: the bound takes"),
        ({"draws": 0}, ValueError, "draws: expected an integer ≥ 1"),
        ({"draws": 2**31}, ValueError, "draws: expected at most 357913941"),
        ({"batch_size": 0}, ValueError, "batch_size: "),
        ({"dtype": torch.float16}, TypeError, "dtype: "),
        ({"keys": torch.zeros(2, dtype=torch.int64)}, ValueError, "keys: expected shape"),
        ({"keys": torch.zeros(3).long(), "seed": 1}, ValueError, "keys: excludes seed"),
        ({"cond": [1]}, TypeError, "cond: expected a dict"),
        ({"device": "meta"}, ValueError, "device: "),
        ({"model": 3}, TypeError, "model: "),
        (
            {"model": ScoreModel(lambda x, label: x, "eps", sde=LADDER, sample_shape=(8,))},
            ValueError,
            r"x: expected shape \(samples, 8\) .*got \(3, 2, 4\)",
        ),
        (
            {"model": ScoreModel(lambda x, label: x[:, :1], "eps", sde=LADDER)},
            ValueError,
            r"model: expected a floating tensor of shape \(3, 2, 4\), got .* \(3, 1, 4\)",
        ),
        (
            {"model": ScoreModel(lambda x, label: x, "eps", variance="learned_range")},
            ValueError,
            r"model: expected a floating tensor of shape \(3, 4, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": EPS, "schedule": LADDER, "x": X, "levels": 17, **options}
    with pytest.raises(error, match=f"^{message}"):
        variational_bound(**arguments)
