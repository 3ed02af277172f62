"""Classifier-free guidance: guiding F is guiding D, for every method, clip, weight and interval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from torch import Tensor

from sbm_fast import DDPMSchedule, DynamicThreshold, Sampler, ScoreModel, sample

pytestmark = pytest.mark.filterwarnings("ignore:norm=:UserWarning")
SHAPE = (4, 2, 3, 5)
WEIGHT = torch.tensor([0.0, 1.0, 2.5, -1.0], dtype=torch.float64)
LABEL = torch.tensor([0.3, -0.2, 0.5, 0.4], dtype=torch.float64).reshape(4, 1, 1, 1)
NULL = -0.3
CLIPS = {"free": None, "static": 0.5, "dynamic": DynamicThreshold(0.8, minimum=0.3)}
NORMS = ("pc per sample", "pc sqrt d", "pc batch mean")  # a static clip is refused there
METHODS = [name for name in cases.METHODS if not name.endswith(("clipped", "thresholded"))]
PAIRS = [(n, c) for n in METHODS for c in CLIPS if not (n in NORMS and c == "static")]


def net(x: Tensor, t: Tensor, label: Any = NULL) -> Tensor:
    return cases.network(x, t) + label * torch.tanh(x)


def in_interval(time: float, times: np.ndarray) -> bool:
    return bool(time >= np.nanmedian(times))


@pytest.mark.parametrize("interval", [False, True])
@pytest.mark.parametrize(("name", "clip"), PAIRS)
def test_guiding_the_output_is_guiding_the_denoised(name: str, clip: str, interval: bool) -> None:
    """Against a network for x_0 that returns D_u + w (D_c − D_u): guide first, then clamp.

    `interval` leaves the rows at low noise unguided, by the plan's field.
    """
    method, sde, options = cases.METHODS[name]
    options = {"method": method, "clip_denoised": CLIPS[clip], "dtype": torch.float64} | options
    model = ScoreModel(net, "score", sde=sde, null_cond={"label": NULL})
    sampler = Sampler(model, sde, SHAPE, **options)
    times = np.array(sampler.plan.time)
    if interval:
        factor = np.array([float(in_interval(t, times)) for t in times])
        plan = replace(sampler.plan, guidance=factor)
        sampler = Sampler(model, sde, SHAPE, method=plan, dtype=torch.float64)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        form = model.match(sde, float(t[0])).denoiser
        c, u = (form.x * x + form.F * net(x, t, label) for label in (LABEL, NULL))
        guided = not interval or in_interval(float(t[0]), times)
        weight = WEIGHT if guided else torch.ones_like(WEIGHT)
        return u + weight.reshape(-1, 1, 1, 1) * (c - u)

    got = sampler(seed=1, cond={"label": LABEL}, guidance=WEIGHT)
    x0 = ScoreModel(by_hand, "x0")
    expected = sample(x0, sde, SHAPE, seed=1, **options)
    bound = 1e-9 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)
    unguided = sampler(seed=1, cond={"label": LABEL}, guidance=1.0)
    assert float((unguided - got)[[0, 2, 3]].abs().max()) > 1e3 * bound
    if name != "pc batch mean":  # couples the samples
        torch.testing.assert_close(got[1], unguided[1], rtol=0, atol=bound)


def test_learned_variance_is_that_of_the_conditional_output() -> None:
    sde = DDPMSchedule.linear(30)

    def both(x: Tensor, t: Tensor, label: Any = NULL) -> Tensor:
        return torch.cat([net(x, t, label), torch.tanh(x + label)], dim=1)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        (c, v), (u, _) = both(x, t, LABEL).chunk(2, dim=1), both(x, t).chunk(2, dim=1)
        return torch.cat([u + WEIGHT.reshape(-1, 1, 1, 1) * (c - u), v], dim=1)

    for clip in CLIPS.values():
        options: dict[str, Any] = {
            "method": "ddpm", "dtype": torch.float64, "seed": 3, "clip_denoised": clip
        }  # fmt: skip
        kind: dict[str, Any] = {
            "predicts": "eps", "time": "index", "sde": sde, "variance": "learned_range"
        }  # fmt: skip
        model = ScoreModel(both, null_cond={"label": NULL}, **kind)
        got = sample(model, sde, SHAPE, cond={"label": LABEL}, guidance=WEIGHT, **options)
        expected = sample(ScoreModel(by_hand, **kind), sde, SHAPE, **options)
        bound = 1e-11 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)
