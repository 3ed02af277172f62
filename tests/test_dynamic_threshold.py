"""Dynamic thresholds of the denoised estimate: direct quantiles, every method, limits, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from test_row_inputs import DDPM, SHAPE, hook
from torch import Tensor

from sbm_fast import VPSDE, DynamicThreshold, ScoreModel, sample
from sbm_fast.methods import make_plan
from sbm_fast.model import Match


def threshold_by_hand(d: Tensor, rule: DynamicThreshold) -> Tensor:
    flat = d.flatten(1).numpy()
    s = np.quantile(np.abs(flat), rule.quantile, axis=1, keepdims=True)
    s = np.clip(s, rule.minimum, rule.maximum)
    return torch.from_numpy(np.clip(flat, -s, s) / s).reshape(d.shape)


def denoising(match: Callable[[float], Match], change: Callable[[Tensor], Tensor]) -> ScoreModel:
    """A network for x_0 with `change` of the D that `cases.network` (a score) stands for."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        form = match(float(t[0])).denoiser
        return change(form.x * x + form.F * cases.network(x, t))

    return ScoreModel(net, "x0")


RULES = [
    DynamicThreshold(0.9),
    DynamicThreshold(0.6, minimum=0.2),
    DynamicThreshold(1.0, minimum=0.05, maximum=0.4),
]
METHODS = [name for name in cases.METHODS if "clipped" not in name and "thresholded" not in name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:norm=:UserWarning")
def test_thresholding_is_a_network_with_thresholded_x0(name: str, rule: DynamicThreshold) -> None:
    """For every method, coordinate and norm: the rows read what such a network would give.

    Also with a score network, whose F' is found from D.
    """
    method, sde, options = cases.METHODS[name]
    # the samples must leave the bounds that are tested
    x_init = 2.0 * float(sde.std(sde.t_max)) * hook(1, SHAPE)(0, 0)
    options = {"method": method, "seed": 2, "dtype": torch.float64, "x_init": x_init} | options
    if method == "langevin":
        options["x_init"] = x_init = 2.0 * hook(1, SHAPE)(0, 0)
    score = ScoreModel(lambda x, t: cases.network(x, t), "score", sde=sde)
    by_hand = denoising(lambda t: score.match(sde, t), lambda d: threshold_by_hand(d, rule))
    expected = sample(by_hand, sde, SHAPE, **options)
    plain = sample(score, sde, SHAPE, **options)
    scale = max(1.0, float(expected.abs().max()))
    assert float((plain - expected).abs().max()) > 1e-3 * scale
    for model in (score, denoising(lambda t: score.match(sde, t), lambda d: d)):
        x = sample(model, sde, SHAPE, clip_denoised=rule, **options)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("elements", [1, 2, 3, 10, 997])
@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.995, 1.0])
def test_quantile_is_interpolated(quantile: float, elements: int) -> None:
    """One DDIM step from a network for x_0: the samples are the thresholded D."""
    d = hook(2, (3, elements))(0, 0)
    rule = DynamicThreshold(quantile, minimum=1e-3)
    model = ScoreModel(lambda x, t: d, "x0")
    for dtype, close in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        x = sample(model, VPSDE(), d.shape, method="ddim", steps=1, clip_denoised=rule, dtype=dtype)
        expected = threshold_by_hand(d, rule)
        torch.testing.assert_close(x.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_one_number(dtype: torch.dtype) -> None:
    """A state [B] is one of B samples with one element: s = |D|, held in the bounds."""
    d, rule = torch.tensor([-3.0, 0.5, 1.7], dtype=dtype), DynamicThreshold(0.9, maximum=2.0)
    run: dict[str, Any] = {"method": "ddim", "steps": 3, "clip_denoised": rule, "dtype": dtype}
    x = sample(ScoreModel(lambda x, t: d, "x0"), VPSDE(), (3,), **run)
    torch.testing.assert_close(x, torch.tensor([-1.0, 0.5, 1.0], dtype=dtype))
    for shape in ((0,), (0, 4), (3, 0)):
        assert sample(cases.network, VPSDE(), shape, **run).shape == shape


def test_a_sample_inside_its_bounds_is_not_touched() -> None:
    wide = DynamicThreshold(0.9, minimum=1.0)
    for name in ("ddim", "em", "edm"):
        model = ScoreModel(lambda x, t: 0.3 * torch.tanh(x), "x0")
        _, sde, options = cases.METHODS[name]
        options = {k: v for k, v in options.items() if k != "S_churn"} | {"method": name, "seed": 1}
        plain = sample(model, sde, SHAPE, **options)
        assert torch.equal(sample(model, sde, SHAPE, clip_denoised=wide, **options), plain)
        static = sample(model, sde, SHAPE, clip_denoised=DynamicThreshold(0.5, 1.0, 1.0), **options)
        assert torch.equal(static, plain)


def test_maximum_of_one_is_the_static_clip() -> None:
    options: dict[str, Any] = {"method": "ddpm", "seed": 0, "dtype": torch.float64}
    model = ScoreModel(cases.network, "eps", time="index", sde=DDPM)
    a, b = (
        sample(model, DDPM, SHAPE, clip_denoised=clip, **options)
        for clip in (1.0, DynamicThreshold(0.99, maximum=1.0))
    )
    assert not torch.equal(a, sample(model, DDPM, SHAPE, **options))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"quantile": 0.0}, ValueError, "quantile"),
        ({"quantile": 1.01}, ValueError, "quantile"),
        ({"quantile": math.nan}, ValueError, "quantile"),
        ({"quantile": "0.9"}, TypeError, "quantile"),
        ({"minimum": 0.0}, ValueError, "minimum"),
        ({"minimum": math.inf}, ValueError, "minimum"),
        ({"maximum": 0.5}, ValueError, "maximum"),
        ({"maximum": math.nan}, ValueError, "maximum"),
        ({"maximum": None}, TypeError, "maximum"),
        ({"maximum": torch.tensor([1, 2])}, TypeError, "maximum"),
        ({"maximum": 10**400}, ValueError, "maximum"),
    ],
)
def test_errors_of_the_threshold(
    options: dict[str, Any], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: expected .*got "):
        DynamicThreshold(**options)
    with pytest.raises(TypeError, match=r"clip_denoised: .* no DynamicThreshold"):
        make_plan("ddim", cases.network, VPSDE(), clip_denoised=DynamicThreshold)  # type: ignore[arg-type]


def test_a_threshold_that_float32_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold: row 1 needs .*minimum"):
        make_plan("ddim", cases.network, VPSDE(), clip_denoised=DynamicThreshold(minimum=1e-60))
    plan = make_plan("ddim", cases.network, VPSDE(), steps=3, clip_denoised=DynamicThreshold())
    for q in (0.0, 1e-60, -1e-60, 1e60):
        denoiser = plan.denoiser.copy()
        denoiser[2, 1] = q
        with pytest.raises(ValueError, match="denoiser: row 2 needs for its threshold a q"):
            replace(plan, denoiser=denoiser)
