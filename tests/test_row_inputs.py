"""Learned variance, and what it shares with dynamic thresholds: loops, limits, laws, invariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from numpy.typing import NDArray
from test_law import (
    WEIGHTS,
    N,
    directions,
    energy_distance,
    exact_sample,
    law_violation,
    mixture,
)
from torch import Tensor

from sbm_fast import VPSDE, DDPMSchedule, DynamicThreshold, Sampler, ScoreModel, noise, sample
from sbm_fast.backend import choose_backend
from sbm_fast.methods import make_plan
from sbm_fast.model import as_score_model
from sbm_fast.ops import affine_step
from sbm_fast.row_inputs import RowInputs

Array = NDArray[np.float64]
DDPM = DDPMSchedule.linear(40)
SHAPE = (5, 2, 4, 3)


def doubled(
    first: Callable[[Tensor, Tensor], Tensor] = cases.network,
    v: Callable[[Tensor], Tensor] = torch.tanh,
    **options: Any,
) -> ScoreModel:
    """A network with a second half v(x)."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([first(x, t), v(x)], dim=1)

    given = {"predicts": "eps", "time": "index", "sde": DDPM} | options
    return ScoreModel(net, variance="learned_range", **given)


def hook(seed: int, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
    """Explicit noise that depends on (draw, stream)."""

    def z(draw: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * draw + stream)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return z


def learned_loop(visited: list[int], z: Callable[[int, int], Tensor], clip: float | None) -> Tensor:
    """improved DDPM's p_sample from the paper: posterior mean of x_0, log-interpolated variance."""
    bar = np.cumprod(1 - np.asarray(DDPM.betas))
    x = z(0, 0)
    for row, (i, below) in enumerate(pairwise([*visited, -1]), start=1):
        now, then = bar[i], bar[below] if below >= 0 else 1.0
        alpha = now / then
        beta = 1 - alpha
        eps = cases.network(x, torch.full((len(x),), float(i), dtype=torch.float64))
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        share = (torch.tanh(x) + 1) / 2  # of the state that the network saw
        x = math.sqrt(then) * beta / (1 - now) * x0 + math.sqrt(alpha) * (1 - then) / (1 - now) * x
        if below < 0:
            return x
        tilde = beta * (1 - then) / (1 - now)
        log_variance = share * math.log(beta) + (1 - share) * math.log(tilde)
        x = x + torch.exp(0.5 * log_variance) * z(row, 1)
    raise AssertionError


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("visited", [list(range(39, -1, -1)), [39, 25, 24, 9, 0]])
def test_learned_variance_is_the_papers(
    visited: list[int], clip: float | None, backend: str
) -> None:
    z = hook(0, SHAPE)
    x = sample(
        doubled(), DDPM, SHAPE, method="ddpm", schedule=visited, clip_denoised=clip, noise=z,
        dtype=torch.float64, backend=backend,
    )  # fmt: skip
    expected = learned_loop(visited, z, clip)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("v", "variance"), [(-1.0, "beta_tilde"), (1.0, "beta")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_of_the_learned_variance(
    v: float, variance: str, dtype: torch.dtype, backend: str
) -> None:
    """v = −1 is β̃ and v = 1 is β, with the package's own noise, to rounding."""
    model = doubled(v=lambda x: torch.full_like(x, v))
    options: dict[str, Any] = {"method": "ddpm", "seed": 4, "dtype": dtype, "backend": backend}
    learned = sample(model, DDPM, SHAPE, **options)
    fixed = sample(model, DDPM, SHAPE, variance=variance, **options)
    close = 3e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(learned, fixed, rtol=close, atol=close)


def test_the_mixture_is_reached_with_a_learned_variance() -> None:
    """With v anywhere between its bounds, a different one for each element; bounds of test_law."""
    means, std, shape = mixture("plane")
    sde = DDPMSchedule.linear()
    exact = cases.score_of_mixture(means, std, sde, WEIGHTS).net
    model = doubled(exact, predicts="score", time="t", sde=sde)
    pairs = [(exact_sample("plane", 2 * i), exact_sample("plane", 2 * i + 1)) for i in range(4)]
    v = directions("plane")
    null = {"plane": float(np.mean([energy_distance(a @ v, b @ v) for a, b in pairs]))}
    x = sample(model, sde, (N, *shape), method="ddpm", steps=120, schedule="quadratic", seed=12)
    assert law_violation("plane", x.double().numpy(), null) == ""


def test_other_methods_read_the_first_half() -> None:
    plain = ScoreModel(cases.network, "eps", time="index", sde=DDPM)
    for method in ("ancestral", "ddim", "pc"):
        a, b = (
            sample(model, DDPM, SHAPE, method=method, steps=5, seed=0)
            for model in (plain, doubled(v=lambda x: x / 0.0))
        )
        assert torch.equal(a, b)
    a, b = (
        sample(model, DDPM, SHAPE, method="ddpm", variance="beta", seed=0)
        for model in (plain, doubled())
    )
    assert torch.equal(a, b)


LEARNED_AND_THRESHOLDED: dict[str, Any] = {
    "method": "ddpm", "steps": 7, "clip_denoised": DynamicThreshold(0.8, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 3, 32, 33), (6, 130), (6, 1, 9)])
def test_batch_split_and_permutation(shape: tuple[int, ...], backend: str) -> None:
    def run(n: int, **more: Any) -> Tensor:
        options = LEARNED_AND_THRESHOLDED | {"backend": backend} | more
        return sample(doubled(v=lambda x: 0.5 * x), DDPM, (n, *shape[1:]), **options)

    whole = run(6, seed=3)
    assert whole.isfinite().all() and len(whole.flatten(1).unique(dim=0)) == 6
    parts = [run(n, seed=3, first_sample=first) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([4, 0, 2, 1, 5, 3])
    assert torch.equal(run(6, keys=noise.keys(3, 6)[order]), whole[order])


def test_memory_format_threads_and_resume() -> None:
    shape = (3, 4, 17, 18)
    plain = Sampler(doubled(), DDPM, shape, **LEARNED_AND_THRESHOLDED)
    whole = plain(seed=5)

    def last(x: Tensor, t: Tensor) -> Tensor:
        out = torch.cat([cases.network(x, t), torch.tanh(x)], dim=1)
        return out.contiguous(memory_format=torch.channels_last)

    model = ScoreModel(last, "eps", time="index", sde=DDPM, variance="learned_range")
    assert torch.equal(sample(model, DDPM, shape, seed=5, **LEARNED_AND_THRESHOLDED), whole)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(plain(seed=5), whole)
    torch.set_num_threads(before)
    for rows in range(plain.plan.rows + 1):
        state = plain.start(seed=5).advance(rows).state()
        assert torch.equal(plain.resume(state).advance().result(), whole)
    other = Sampler(doubled(), DDPM, shape, **LEARNED_AND_THRESHOLDED | {"clip_denoised": None})
    with pytest.raises(ValueError, match="state: was kept from another plan"):
        other.resume(plain.start(seed=5).state())


def test_explicit_noise_is_the_z_that_is_scaled() -> None:
    keys = noise.keys(0, SHAPE[0])

    def own(draw: int, stream: int) -> Tensor:
        return noise.normal(None, SHAPE, keys=keys, draw=draw, stream=stream)

    plain = sample(doubled(), DDPM, SHAPE, seed=0, **LEARNED_AND_THRESHOLDED)
    hooked = sample(doubled(), DDPM, SHAPE, seed=0, noise=own, **LEARNED_AND_THRESHOLDED)
    assert torch.equal(plain, hooked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore:the plan cancels:UserWarning")
def test_dtypes_of_the_network(dtype: torch.dtype) -> None:
    options = LEARNED_AND_THRESHOLDED | {"seed": 0}
    x = sample(doubled(), DDPM, SHAPE, net_dtype=dtype, **options)
    close = 0.05 if dtype != torch.float32 else 0.0
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, sample(doubled(), DDPM, SHAPE, **options), rtol=close, atol=close)


def test_nothing_is_held_without_row_inputs() -> None:
    sampler = cases.sampler("pc sigma", (4, 6))
    assert sampler.start(seed=0)._row_inputs is None
    run = cases.sampler("ddim", SHAPE, clip_denoised=DynamicThreshold()).start(seed=0)
    assert run._row_inputs is not None and run._row_inputs._variance is None


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, DynamicThreshold(0.5)])
def test_what_is_not_finite_is_reported(half: int, value: float, clip: Any) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        out = torch.cat([cases.network(x, t), torch.tanh(x)], dim=1)
        if float(t[0]) < 20:
            out[3, half * 2, 1, 1] = value
        return out

    model = ScoreModel(net, "eps", time="index", sde=DDPM, variance="learned_range")
    with pytest.raises(
        ValueError, match=r"1 of 5 samples, first for sample 3 at evaluation 21 of 40 \(row 21, "
    ):
        sample(model, DDPM, SHAPE, method="ddpm", seed=0, clip_denoised=clip)


def test_errors() -> None:
    wrong = ScoreModel(cases.network, "eps", time="index", sde=DDPM, variance="learned_range")
    with pytest.raises(ValueError, match=r"model: .* shape \(5, 4, 4, 3\), got .*\(5, 2, 4, 3\)"):
        sample(wrong, DDPM, SHAPE, method="ddpm")
    plan = make_plan("ddpm", doubled(), DDPM)
    with pytest.raises(ValueError, match="model: the plan reads a learned variance; expected"):
        sample(cases.network, DDPM, SHAPE, method=plan)
    with pytest.raises(ValueError, match=r"shape: variance='learned_range' doubles dimension 1"):
        sample(doubled(), DDPM, (4,), method="ddpm")
    with pytest.raises(ValueError, match=r"variance: expected one of .*'learned_range'.*, got 'b'"):
        ScoreModel(cases.network, variance="b")
    for rederive, method in ((False, "ddim"), (False, "ddim_inversion")):
        with pytest.raises(ValueError, match="rederive_eps: with a DynamicThreshold"):
            make_plan(
                method, cases.network, VPSDE(), rederive_eps=rederive,
                clip_denoised=DynamicThreshold(),
            )  # fmt: skip


def test_the_plan_keeps_and_checks_them(tmp_path: Any) -> None:
    plan = make_plan("ddpm", doubled(), DDPM, steps=4, clip_denoised=DynamicThreshold(0.9))
    plan.save(tmp_path / "plan.npz")
    assert plan.load(tmp_path / "plan.npz").difference(plan) == ""
    assert "quantile 0.9 in [1, inf]" in str(plan)
    changed = np.array(plan.threshold)
    for value, match in (((0.5, 2.0, 1.0), "threshold: row 2"), ((1.5, 1, 1), "threshold: row 2")):
        changed[2] = value
        with pytest.raises(ValueError, match=match):
            replace(plan, threshold=changed)
    with pytest.raises(ValueError, match="threshold: row 1 is thresholded, no affine map"):
        make_plan("ddim", cases.network, VPSDE(), clip_denoised=DynamicThreshold()).gaussian(0, 1)
    spread = np.array(plan.log_std)
    spread[0] = (-1.0, 0.0)
    with pytest.raises(ValueError, match="log_std: row 0 needs an evaluation"):
        replace(plan, log_std=spread)
    for value in (1e300, 80.0, -80.0):
        wide = np.array(plan.log_std)
        wide[2, 0] = value
        with pytest.raises(ValueError, match=r"log_std: row 2 needs \|log_std\| < 80"):
            replace(plan, log_std=wide)


def test_a_file_of_format_1_is_read(tmp_path: Any) -> None:
    """A plan as version 1 wrote it: without the two arrays."""
    plan = make_plan("pc", cases.network, VPSDE(), steps=3)
    plan.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as file:
        arrays = dict(file)
    del arrays["log_std"], arrays["threshold"]
    arrays["header"] = np.array(str(arrays["header"]).replace('"format": 2', '"format": 1'))
    np.savez(tmp_path / "old.npz", **arrays)
    assert plan.load(tmp_path / "old.npz").difference(plan) == ""


def test_rows_apart_are_gathered_by_the_row() -> None:
    """Samples at different rows, one of them finished: each gets its own row's numbers."""
    model = doubled()
    plan = make_plan("ddpm", model, DDPM, steps=6, clip_denoised=DynamicThreshold(0.7, 0.2))
    x, keys = hook(5, (4, 2, 3))(0, 0), noise.keys(1, 4)
    out = model.net(x, torch.zeros(4, dtype=x.dtype))
    step = choose_backend("auto", x.device).affine_step_
    inputs = RowInputs.of(plan, model, step, x)
    assert inputs is not None
    rows = torch.tensor([1, 4, 2, plan.rows], dtype=torch.int32)
    together = inputs.inputs(x, out, None, None, keys, rows, None)
    for b in range(3):
        alone = RowInputs.of(plan, model, step, x[b : b + 1])
        assert alone is not None
        made = alone.inputs(x[b : b + 1], out[b : b + 1], None, None, keys[b : b + 1],
                            rows[b : b + 1], None)  # fmt: skip
        for one, all_ in ((made[0], together[0]), (made[3], together[3])):
            assert one is not None and all_ is not None and torch.equal(one[0], all_[b])


def test_nothing_is_read_back() -> None:
    """On meta tensors, where a value that is read raises: graphs can capture it."""
    model = doubled()
    plan = make_plan("ddpm", model, DDPM, steps=6, clip_denoised=DynamicThreshold(0.7, 0.2))
    with torch.device("meta"):
        x, weight = torch.empty(4, 2, 3, 3), torch.empty(4)
        network, uncond = torch.empty(4, 4, 3, 3), torch.empty(4, 4, 3, 3)
        keys, row = torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int32)
    inputs = RowInputs.of(plan, model, affine_step.affine_step_, x)
    assert inputs is not None
    f, f_u, w, z = inputs.inputs(x, network, uncond, weight, keys, row, None)
    assert f is not None and z is not None and f_u is w is None
    assert f.shape == z.shape == x.shape and f.device == x.device


def test_it_is_one_graph_of_tensors() -> None:
    """torch.compile(fullgraph=True) traces it without a break, to the same bits."""
    model, x, keys = doubled(), hook(6, SHAPE)(0, 0), noise.keys(0, 5)
    plan = make_plan("ddpm", model, DDPM, steps=6, clip_denoised=DynamicThreshold(0.7, 0.2))
    inputs = RowInputs.of(plan, model, affine_step.affine_step_, x)
    assert inputs is not None
    out = model.net(x, torch.zeros(5, dtype=x.dtype))
    given = (x, out, out + 0.1, torch.full((5,), 2.0, dtype=x.dtype), keys)
    compiled = torch.compile(inputs.inputs, fullgraph=True, backend="aot_eager")
    for row in (1, 3):
        rows = torch.full((5,), row, dtype=torch.int32)
        plain, traced = inputs.inputs(*given, rows, None), compiled(*given, rows, None)
        for i in (0, 3):
            assert plain[i] is not None and torch.equal(plain[i], traced[i])


def test_a_network_that_knows_its_variance_is_wrapped_with_it() -> None:
    class Knows(torch.nn.Module):
        predicts, time, variance = "eps", "index", "learned_range"

    model = as_score_model(Knows(), DDPM)
    assert model.variance == "learned_range" and "variance='learned_range'" in repr(model)
    assert "variance" not in repr(ScoreModel(cases.network))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_v_of_a_row_that_does_not_read_it_may_be_anything(value: float, backend: str) -> None:
    """The last row of ddpm draws no noise; one row earlier the same value is reported."""
    run: dict[str, Any] = {"method": "ddpm", "steps": 5, "seed": 0, "backend": backend}

    def wrong_below(level: float) -> ScoreModel:
        def net(x: Tensor, t: Tensor) -> Tensor:
            v = torch.tanh(x) if float(t[0]) > level else torch.full_like(x, value)
            return torch.cat([cases.network(x, t), v], dim=1)

        return ScoreModel(net, "eps", time="index", sde=DDPM, variance="learned_range")

    last, before = make_plan("ddpm", doubled(), DDPM, steps=5).time[-1:-3:-1]
    plain = sample(doubled(), DDPM, SHAPE, **run)
    assert torch.equal(sample(wrong_below(float(last)), DDPM, SHAPE, **run), plain)
    with pytest.raises(ValueError, match=r"model: .*evaluation 4 of 5"):
        sample(wrong_below(float(before)), DDPM, SHAPE, **run)
