"""ddim_inversion: the papers' map, its inverse, orders on refined grids, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import textbook
import torch
from plan_reference import (
    GAUSSIAN,
    MIXTURE,
    PREDICTIONS,
    WORLDS,
    Array,
    Mixture,
    Network,
    Noise,
    interpret,
    score_model,
)

from sbm_fast import sample
from sbm_fast.methods import make_plan
from sbm_fast.model import ScoreModel
from sbm_fast.plan import Plan
from sbm_fast.schedule import time_grid
from sbm_fast.sde import DDPMSchedule

ALL = tuple(WORLDS)
RANGES = {"vp": (1.0, 0.01), "subvp": (1.0, 0.03), "ve": (0.9, 0.1), "edm": (80.0, 0.05)}
NONE = Noise(np.zeros((0, 1)))
# MIXTURE is so sharp that between its components the first steps are far from the limit.
SMOOTH = Mixture(MIXTURE.means, 0.4)


def plan_of(name: str, predicts: str = "eps", method: str = "ddim_inversion", **more: Any) -> Plan:
    world = WORLDS[name]
    more = {"given_start": True} | more
    return make_plan(method, score_model(world, predicts), world.sde, **more)


def data(count: int = 6) -> Array:
    rng = np.random.default_rng(3)
    means = MIXTURE.means[rng.integers(0, 3, count)]
    return means + MIXTURE.std * rng.standard_normal((count, 2))


@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("rederive", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_path_is_the_papers(name: str, rederive: bool, clip: float | None) -> None:
    world = WORLDS[name]
    kind = "karras" if name == "edm" else "uniform"
    times = time_grid(world.sde, 8, kind)[::-1]
    for predicts in PREDICTIONS:
        plan = plan_of(name, predicts, steps=7, clip_denoised=clip, rederive_eps=rederive)
        assert (plan.nfe, plan.rows, plan.registers, plan.start_scale) == (7, 8, 0, 1.0)
        np.testing.assert_array_equal(plan.time[1:], times[:-1])
        states = interpret(plan, Network(world, MIXTURE, predicts), NONE, data()).states
        den = textbook.Denoiser(world, MIXTURE, clip)
        out = textbook.ddim_inversion(den, times, data(), rederive=rederive)
        bound = 1e-11 * max(1, np.abs(out).max())
        np.testing.assert_allclose(states[-1], out, rtol=0, atol=bound, err_msg=predicts)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("name", ALL)
def test_law_of_the_latent_for_gaussian_data(name: str, predicts: str) -> None:
    """The affine map of N(0.3, 0.5²) data, from where a step ends and from its slope."""
    world, plan = WORLDS[name], plan_of(name, predicts, steps=7)
    m, sigma = world.level(plan.time[1])
    start = m * 0.3, float(np.hypot(m * 0.5, sigma))
    times = time_grid(world.sde, 8, "karras" if name == "edm" else "uniform")[::-1]
    at = np.array([[start[0]], [start[0] + start[1]]])
    out = textbook.ddim_inversion(textbook.Denoiser(world, GAUSSIAN), times, at)[:, 0]
    mean, std = plan.gaussian(0.3, 0.5, start=start)
    np.testing.assert_allclose((mean[-1], std[-1]), (out[0], out[1] - out[0]), rtol=1e-10)


def slope(steps: Array, errors: list[float]) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", list(RANGES))
def test_ddim_inverts_it_to_order_one(name: str) -> None:
    """On the same levels, down to t_min; the row after that gives D of the data."""
    world, (t_max, t_min) = WORLDS[name], RANGES[name]
    steps, errors, x = np.array([100, 200, 400]), [], data()
    network = Network(world, SMOOTH, "eps")
    options: dict[str, Any] = {"t_max": t_max, "t_min": t_min, "schedule": "log_snr"}
    for n in steps.tolist():
        latent = interpret(plan_of(name, steps=n, **options), network, NONE, x).states[-1]
        back = plan_of(name, method="ddim", steps=n + 1, **options)
        states = interpret(back, network, NONE, latent).states
        errors.append(float(np.abs(states[-2] - x).max()))
        clean = SMOOTH.posterior_mean(x, *world.level(t_min))
        assert np.abs(states[-1] - clean).max() < 2 * errors[-1]
    assert slope(steps, errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", list(RANGES))
def test_latents_converge_to_those_of_the_flow(name: str) -> None:
    """For N(μ, s²) data the flow keeps (x − m μ) / √(m² s² + σ²)."""
    world, (t_max, t_min) = WORLDS[name], RANGES[name]
    (m0, s0), (m1, s1) = world.level(t_min), world.level(t_max)
    start = 0.7, 0.4
    grown = np.hypot(m1 * 0.5, s1) / np.hypot(m0 * 0.5, s0)
    exact = np.array([m1 * 0.3 + (start[0] - m0 * 0.3) * grown, start[1] * grown])
    steps, errors = np.array([100, 200, 400]), []
    for n in steps.tolist():
        plan = plan_of(name, steps=n, t_max=t_max, t_min=t_min, schedule="log_snr")
        mean, std = plan.gaussian(0.3, 0.5, start=start)
        errors.append(float(np.hypot(mean[-1] - exact[0], std[-1] - exact[1])))
    assert slope(steps, errors) == pytest.approx(1, abs=0.1)


def test_defaults_and_times_of_ones_own() -> None:
    assert plan_of("vp").nfe == 50
    assert plan_of("ncsn").nfe == 13
    ladder = DDPMSchedule.linear()
    model = ScoreModel(lambda x, t: x, sde=ladder)
    assert make_plan("ddim_inversion", model, ladder, given_start=True).nfe == 50
    plan = plan_of("ddpm", schedule=[20, 11, 3])
    assert plan.time[1:].tolist() == [3, 11]
    assert plan_of("vp", schedule=[0.9, 0.5, 0.2], steps=2).time[1:].tolist() == [0.2, 0.5]


def torch_network(name: str) -> ScoreModel:
    world = WORLDS[name]

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(Network(world, SMOOTH, "eps")(x.numpy(), float(t[0])))

    return ScoreModel(net, predicts="eps", sde=world.sde)


def test_there_and_back_through_sample() -> None:
    world, model, x = WORLDS["vp"], torch_network("vp"), torch.from_numpy(data())
    run: dict[str, Any] = {"sde": world.sde, "shape": (6, 2), "dtype": torch.float64}
    grid: dict[str, Any] = {"schedule": "log_snr", "t_min": 0.01}
    there = make_plan("ddim_inversion", model, world.sde, steps=200, given_start=True, **grid)
    latent = sample(model, method=there, x_init=x, **run)
    back = sample(model, method="ddim", steps=201, x_init=latent, **run, **grid)
    clean = SMOOTH.posterior_mean(data(), *world.level(0.01))
    assert np.abs(back.numpy() - clean).max() < 0.05


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"given_start": False}, ValueError, "x_init: method 'ddim_inversion' starts from data"),
        ({"eta": 0.5}, TypeError, "eta: no option of method 'ddim_inversion'"),
        ({"denoise": "mean"}, ValueError, "denoise: .* ends at t_max, in the latent"),
        ({"denoise": "tweedie"}, ValueError, "denoise: .* takes None, False"),
        ({"compat": "edm"}, ValueError, "compat: method 'ddim_inversion' reproduces no peer"),
        ({"rederive_eps": 1}, TypeError, "rederive_eps: expected True or False, got 1"),
        ({"t_min": 0.0}, ValueError, "t_min: there is no noise at t = 0"),
        ({"schedule": [0.5]}, ValueError, "schedule: expected at least 2 times"),
        ({"schedule": [0.1, 0.5]}, ValueError, "schedule: expected .* decreasing"),
        ({"steps": 3, "schedule": [0.5, 0.1]}, ValueError, "steps=3 needs 4 times, got 2"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        plan_of("vp", **options)


@pytest.mark.parametrize(
    ("levels", "options", "match"),
    [
        (20, {"steps": 20}, "steps: .*at most 19 steps, got 20"),
        (20, {"steps": 21}, "steps: .*at most 19 steps, got 21"),
        (20, {"steps": 5, "t_max": 9, "t_min": 5}, "steps: .*at most 4 steps, got 5"),
        (1, {}, "sde: method 'ddim_inversion' needs two levels"),
        (1, {"steps": 1}, "sde: method 'ddim_inversion' needs two levels"),
        (20, {"t_max": 0}, "t_max: method 'ddim_inversion' needs two levels"),
        (20, {"t_min": 19}, "t_min: method 'ddim_inversion' needs two levels"),
    ],
)
def test_levels_that_are_not_there(levels: int, options: dict[str, Any], match: str) -> None:
    sde = DDPMSchedule.linear(levels)
    with pytest.raises(ValueError, match=f"^{match}"):
        make_plan("ddim_inversion", lambda x, t: x, sde, given_start=True, **options)


def test_sample_needs_data() -> None:
    with pytest.raises(ValueError, match="x_init: method 'ddim_inversion' starts from data"):
        sample(torch_network("vp"), WORLDS["vp"].sde, (6, 2), method="ddim_inversion")
