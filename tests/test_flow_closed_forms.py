"""The probability flow of data whose network is known: closed forms, the plans, other SDEs."""

from __future__ import annotations

import math

import likelihood_cases as data
import numpy as np
import pytest
import torch
from probability_flow_cases import (
    CONTINUOUS,
    KERNELS,
    LADDERS,
    continuous,
    draw,
    every_prediction,
    name,
)
from torch import Tensor

from sbm_fast import parameterization, sample
from sbm_fast.encoding import encode
from sbm_fast.flow import FlowSystem, ProbabilityFlow
from sbm_fast.model import ScoreModel
from sbm_fast.noise import keys
from sbm_fast.parameterization import PREDICTIONS
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule, Ladder, SubVPSDE


def exact(sde: SDE, predicts: str, sigma_data: float, std: float, mean: float = 0.0) -> ScoreModel:
    """The network of data ½ N(−mean, std²) + ½ N(mean, std²), in every dimension."""

    def net(x: Tensor, label: Tensor) -> Tensor:
        r = label.double().reshape(-1, *[1] * (x.dim() - 1))
        m = data.mean_scale(sde, r)
        h = m * torch.sqrt(r**2 + sigma_data**2)
        state = x.double() * h if predicts == "edm" else x.double()
        variance = std**2 + r**2
        score = (mean * torch.tanh(mean * state / m / variance) - state / m) / (m * variance)
        return data.output(predicts, state, score, m, m * r, h, sigma_data).to(x.dtype)

    return ScoreModel(net, predicts, "sigma", sde, None, sigma_data)


def gaussian(std: float, sde: SDE, predicts: str, sigma_data: float) -> ScoreModel:
    return exact(sde, predicts, sigma_data, std)


def growth(sde: SDE, std: float, low: float, high: float) -> float:
    """Of the standard deviation of N(0, std²) data on the way from time low to high."""
    ends = [math.hypot(float(sde.mean_scale(t)) * std, float(sde.std(t))) for t in (low, high)]
    return ends[1] / ends[0]


@continuous
@every_prediction
def test_gaussian_data_of_the_assumed_scale_stand_still(sde: SDE, predicts: str) -> None:
    std, x = 0.8, draw(4, 3)
    model = gaussian(std, sde, predicts, std)
    flow = ProbabilityFlow(model, sde)
    system = FlowSystem(flow, keys(0, 4), KERNELS, torch.float64)
    system.select(torch.arange(4))
    at = flow.at(torch.linspace(flow.data.position, flow.prior.position, 4, dtype=torch.float64))
    out = torch.empty_like(x)
    system.slope(at, x, at.c_in[:, None] * x, out, integrals=False)
    assert float(out.abs().max()) < 1e-11
    latents, info = encode(model, sde, x, dtype=torch.float64, return_info=True)
    scale = growth(sde, std, sde.t_min, sde.t_max)
    torch.testing.assert_close(latents, x * scale, rtol=1e-9, atol=0)
    assert int(info.nfe.max()) <= 25  # steps that grow tenfold


@continuous
@every_prediction
def test_what_depends_on_time_alone(sde: SDE, predicts: str) -> None:
    """(p, q, r), c_in and the label; where the data are those of σ_d the divergence is 0 too."""
    std, t_min = 0.8, max(sde.t_min, 1e-3)
    flow = ProbabilityFlow(gaussian(std, sde, predicts, std), sde, t_min)
    position = torch.linspace(flow.data.position, flow.prior.position, 5, dtype=torch.float64)
    r = torch.exp(position)
    at = flow.at(position.expand(2, 5))
    form = parameterization.flow(predicts, data.mean_scale(sde, r), r, std)
    assert at.coef.shape == (2, 5, 3) and at.coef.dtype == torch.float64
    expected = torch.stack([form.x, form.F, form.F * form.c_in], dim=1)
    torch.testing.assert_close(at[1].coef, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(at[1].c_in, form.c_in, rtol=1e-12, atol=0)
    torch.testing.assert_close(at[0].label, r, rtol=1e-12, atol=0)
    torch.testing.assert_close(at[0].steering, r**2 / (std**2 + r**2), rtol=1e-12, atol=0)
    one = torch.ones(5, 3, dtype=torch.float64)
    slope_of_network = flow.model(one, r)[:, 0]  # it is linear
    p, _, scale = at[0].coef.T
    assert float((p + scale * slope_of_network).abs().max()) < 1e-9


PAIRS = list(zip([*CONTINUOUS, VPSDE(0.2, 15.0)], PREDICTIONS, strict=True))


@pytest.mark.parametrize(("sde", "predicts"), PAIRS, ids=name)
def test_gaussian_data_of_another_scale(sde: SDE, predicts: str) -> None:
    model, x = gaussian(0.3, sde, predicts, 0.8), 0.3 * draw(4, 3)
    errors, scale = [], growth(sde, 0.3, sde.t_min, sde.t_max)
    for tol in (1e-4, 1e-7):
        latents = encode(model, sde, x, rtol=tol, atol=tol, dtype=torch.float64)
        errors.append(float((latents / scale - x).abs().max()))
    assert errors[0] < 2e-3 and errors[1] < 2e-6


def first_time(sde: SDE) -> float:
    return max(1e-3, sde.t_min)


@continuous
def test_flow_is_that_of_the_plans(sde: SDE) -> None:
    """For every prediction; among each other they agree to rounding, at any tolerance."""
    start = sde.prior_std * draw(4, 2, seed=3)
    loose = {"rtol": 2e-5, "atol": 2e-5}
    plan = sample(exact(sde, "score", 0.7, std=0.3, mean=1.0), sde, (4, 2), method="ode",
                  solver="rk4", steps=50, schedule="log_snr", x_init=start,
                  dtype=torch.float64, t_min=first_time(sde))  # fmt: skip
    found = [
        sample(exact(sde, predicts, 0.7, std=0.3, mean=1.0), sde, (4, 2), method="ode",
               solver="dopri5", x_init=start, dtype=torch.float64, t_min=first_time(sde), **loose)
        for predicts in PREDICTIONS
    ]  # fmt: skip
    torch.testing.assert_close(found[0], plan, rtol=0, atol=1e-3)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("predicts", ["score", "edm"])
def test_a_network_under_another_sde(predicts: str) -> None:
    """A VP network under every SDE takes x/m one way between two noise levels, to rounding."""
    y, own = draw(3, 2), VPSDE()
    model = exact(own, predicts, 0.7, std=0.3, mean=1.0)

    def carried(run: SDE, t_min: float, t_max: float) -> Tensor:
        ends = [float(run.mean_scale(t)) for t in (t_min, t_max)]
        z = encode(model, run, ends[0] * y, t_min=t_min, t_max=t_max, rtol=1e-4, atol=1e-4,
                   dtype=torch.float64)  # fmt: skip
        return z / ends[1]

    def times(run: SDE, low: float, high: float) -> tuple[float, float]:
        return float(run.time_at_nsr(low)), float(run.time_at_nsr(high))

    expected = carried(own, *times(own, 0.03, 40.0))
    for run in (EDMSDE(), VESDE(), SubVPSDE()):
        found = carried(run, *times(run, 0.03, 40.0))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    for ladder in (LADDERS[0], LADDERS[2]):
        t_min, t_max = (round(t) for t in times(ladder, 0.03, 40.0))
        there = times(own, float(ladder.nsr(t_min)), float(ladder.nsr(t_max)))
        torch.testing.assert_close(
            carried(ladder, t_min, t_max), carried(own, *there), rtol=1e-8, atol=1e-9
        )


def ladder_network(ladder: Ladder, std: float) -> ScoreModel:
    """ε of N(0, std²) data under a ladder, from the index; between levels ln nsr is linear."""
    table = torch.tensor(np.log(ladder.nsr(np.arange(ladder.levels, dtype=np.float64))))

    def net(x: Tensor, index: Tensor) -> Tensor:
        index = index.double()
        assert (index >= 0).all() and (index <= ladder.levels - 1).all()
        below = index.floor().clamp(max=ladder.levels - 2).long()
        r = torch.exp(table[below] + (index - below) * (table[below + 1] - table[below]))
        r = r.reshape(-1, *[1] * (x.dim() - 1))
        m = 1 / torch.sqrt(1 + r**2) if isinstance(ladder, DDPMSchedule) else 1.0
        return r / (m * (std**2 + r**2)) * x

    return ScoreModel(net, "eps", "index", ladder)


@pytest.mark.parametrize("ladder", LADDERS, ids=name)
def test_networks_of_ladders(ladder: Ladder) -> None:
    """Under their ladder, and under continuous SDEs between the ladder's levels."""
    std, x = 0.4, 0.4 * draw(3, 2)
    model, tight = ladder_network(ladder, std), {"rtol": 1e-7, "atol": 1e-7}
    low, high = ladder.nsr_range
    for run in (ladder, VPSDE(), EDMSDE(low / 2, 2 * high)):
        inside = 1.7 * low, min(0.7 * high, 150.0)
        t_min, t_max = (float(run.time_at_nsr(r)) for r in inside)
        if isinstance(run, Ladder):
            t_min, t_max = run.t_min, run.t_max
        z = encode(model, run, x, t_min=t_min, t_max=t_max, dtype=torch.float64, **tight)
        torch.testing.assert_close(
            z, x * growth(run, std, t_min, t_max), rtol=2e-6, atol=1e-7 * float(run.std(t_max))
        )
    z = encode(model, ladder, x, dtype=torch.float64, **tight)
    back = sample(model, ladder, (3, 2), method="ode", solver="dopri5", dtype=torch.float64,
                  x_init=z, **tight)  # fmt: skip
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)
