"""dpmpp_2m and dpmpp_2m_sde: the papers' recursion, order, laws, ends, options and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
import sampling_cases
import textbook
import torch
from plan_reference import (
    GAUSSIAN,
    MIXTURE,
    PREDICTIONS,
    WORLDS,
    Array,
    Network,
    Noise,
    World,
    interpret,
    moments,
    noises,
    score_model,
)
from test_law import (
    WEIGHTS,
    N,
    directions,
    energy_distance,
    exact_sample,
    law_violation,
    mixture,
)
from test_textbook import Loop, prior, run_both

from sbm_fast import sample
from sbm_fast.methods import make_plan
from sbm_fast.methods.dpmpp import _slope_weight
from sbm_fast.model import ScoreModel
from sbm_fast.plan import Plan, Z
from sbm_fast.schedule import time_grid
from sbm_fast.sde import EDMSDE, VESDE, DDPMSchedule

ALL = tuple(WORLDS)
STEPS = 7
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "2m": ("dpmpp_2m", {}, {}),
    "2m-heun": ("dpmpp_2m", {"solver": "heun"}, {"solver": "heun"}),
    "2m-karras": ("dpmpp_2m", {"schedule": "karras"}, {}),
    "2m-uniform": ("dpmpp_2m", {"schedule": "uniform"}, {}),
    "sde": ("dpmpp_2m_sde", {}, {"eta": 1.0}),
    "sde-heun": ("dpmpp_2m_sde", {"solver": "heun"}, {"eta": 1.0, "solver": "heun"}),
    "sde-half": ("dpmpp_2m_sde", {"eta": 0.5, "schedule": "karras"}, {"eta": 0.5}),
}
PAIRS = [(case, name) for case in CASES for name in ALL]


def plan_of(method: str, name: str = "vp", predicts: str = "eps", **options: Any) -> Plan:
    world = WORLDS[name]
    return make_plan(method, score_model(world, predicts), world.sde, **options)


def loop_of(case: str) -> Loop:
    _, options, arguments = CASES[case]

    def loop(den: textbook.Denoiser, z: Noise, world: World) -> Array:
        times = time_grid(world.sde, STEPS, options.get("schedule", "log_snr"))
        return textbook.dpmpp_2m(den, z, times, prior(den, z), **arguments)

    return loop


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_law_for_gaussian_data_is_the_papers(case: str, name: str) -> None:
    method, options, _ = CASES[case]
    close = {"rtol": 1e-10, "atol": 1e-10}
    for predicts in PREDICTIONS:
        plan = plan_of(method, name, predicts, steps=STEPS, **options)
        noise = Noise.one_hot(noises(plan))
        states, out = run_both(plan, loop_of(case), WORLDS[name], GAUSSIAN, noise, predicts, None)
        every = np.array([moments(state) for state in states])
        np.testing.assert_allclose(every[-1], moments(out), err_msg=predicts, **close)
        made = np.stack(plan.gaussian(0.3, 0.5), 1)
        np.testing.assert_allclose(made[-1], moments(out), err_msg=predicts, **close)
        np.testing.assert_allclose(made, every, rtol=1e-10, atol=1e-10, err_msg=predicts)


@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_path_for_mixtures_is_the_papers(case: str, name: str, clip: float | None) -> None:
    method, options, _ = CASES[case]
    for predicts in PREDICTIONS:
        plan = plan_of(method, name, predicts, steps=STEPS, clip_denoised=clip, **options)
        noise = Noise.normal(noises(plan), (5, 2))
        states, out = run_both(plan, loop_of(case), WORLDS[name], MIXTURE, noise, predicts, clip)
        bound = 1e-11 * max(1, np.abs(out).max())
        np.testing.assert_allclose(states[-1], out, rtol=0, atol=bound, err_msg=predicts)


def flow_error(name: str, steps: int, **options: Any) -> float:
    """Against the exact flow, which keeps (y − μ)/√(s² + σ²), at the state before the last row."""
    world, (high, low) = WORLDS[name], options.pop("nsr")
    plan = plan_of(
        "dpmpp_2m",
        name,
        "x0",
        steps=steps,
        t_max=float(world.sde.time_at_nsr(high)),
        t_min=float(world.sde.time_at_nsr(low)),
        **options,
    )
    mean, std = plan.gaussian(0.3, 0.5)
    start = std[0]
    shrink = np.hypot(0.5, low) / np.hypot(0.5, high)
    return float(np.hypot(mean[-2] - 0.3 * (1 - shrink), std[-2] - start * shrink))


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("schedule", ["log_snr", "karras"])
@pytest.mark.parametrize("name", ["vp", "ve", "subvp", "edm"])
def test_order_two(name: str, schedule: str, solver: str) -> None:
    steps = np.array([80, 160, 320])
    errors = [
        flow_error(name, n, nsr=(30.0, 0.05), schedule=schedule, solver=solver)
        for n in steps.tolist()
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.15)
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
def test_laws_of_every_eta_converge_to_the_data(eta: float, solver: str) -> None:
    """Of order two in law for Gaussian data, whose marginals do not depend on η."""
    steps, errors = np.array([50, 100, 200]), []
    for n in steps.tolist():
        options = {"eta": eta, "solver": solver, "t_min": 0.01}
        std = plan_of("dpmpp_2m_sde", "edm", "x0", steps=n, **options).gaussian(0.0, 0.5)[1]
        errors.append(abs(std[-2] - np.hypot(0.5, 0.01)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("name", ALL)
def test_without_noise_the_sde_form_is_dpmpp_2m(name: str, solver: str) -> None:
    flow = plan_of("dpmpp_2m", name, steps=STEPS, solver=solver)
    assert plan_of("dpmpp_2m_sde", name, steps=STEPS, solver=solver, eta=0.0).difference(flow) == ""


def test_weight_of_the_slope_keeps_its_digits() -> None:
    with mpmath.workdps(60):
        for k in (1e-12, 1e-6, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 3.0, 40.0):
            exact = {
                "midpoint": -mpmath.expm1(-mpmath.mpf(k)) / 2,
                "heun": 1 + mpmath.expm1(-mpmath.mpf(k)) / k,
            }
            for solver, value in exact.items():
                assert _slope_weight(k, solver) == pytest.approx(float(value), rel=1e-15, abs=0)


@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_ends_on_the_denoiser_exactly(predicts: str, name: str, method: str) -> None:
    plan = plan_of(method, name, predicts, steps=4)
    np.testing.assert_array_equal(plan.coef[-1, 0, :2], plan.denoiser[-1, :2])
    assert not plan.coef[-1, 0, 2:].any()
    clipped = plan_of(method, name, predicts, steps=4, clip_denoised=1.0)
    assert clipped.coef[-1, 0].tolist() == [0, 0, 1, 0, 0]
    assert not clipped.coef[:, :, 1].any()  # the raw output shows in D alone


def test_one_register_that_holds_what_the_next_row_reads() -> None:
    plan = plan_of("dpmpp_2m_sde", steps=6)
    assert (plan.nfe, plan.rows, plan.registers) == (6, 7, 1)
    assert plan.slot.tolist() == [-1, 0, 0, 0, 0, -1, -1]
    assert (plan.coef[:, 0, 4] != 0).tolist() == [False] * 2 + [True] * 4 + [False]
    assert (plan.coef[:, 0, 3] != 0).tolist() == [True] * 6 + [False]
    assert plan_of("dpmpp_2m", steps=2).registers == 0
    one = plan_of("dpmpp_2m", steps=1)
    np.testing.assert_array_equal(one.coef[-1, 0, :2], one.denoiser[-1, :2])


def test_defaults() -> None:
    for method in ("dpmpp_2m", "dpmpp_2m_sde"):
        plan = plan_of(method)
        assert plan.nfe == 20
        np.testing.assert_array_equal(plan.time[1:], time_grid(WORLDS["vp"].sde, 20, "log_snr"))
        assert plan_of(method, "ncsn").nfe == 14
        assert plan_of(method, "ddpm", t_max=9, t_min=2).nfe == 8
        ladder = DDPMSchedule.linear()
        assert make_plan(method, ScoreModel(lambda x, t: x, sde=ladder), ladder).nfe == 20
    assert plan_of("dpmpp_2m_sde").description["eta"] == 1.0
    times = [0.9, 0.5, 0.1, 0.01]
    assert plan_of("dpmpp_2m", schedule=times).time[1:].tolist() == times
    assert plan_of("dpmpp_2m", "ddpm", schedule=[20, 11, 3]).time[1:].tolist() == [20, 11, 3]


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_network_trained_under_another_sde(predicts: str) -> None:
    theirs = score_model(WORLDS["edm"], predicts, time="edm")
    network = Network(WORLDS["edm"], MIXTURE, predicts, lambda label: float(np.exp(4 * label)))
    options: dict[str, Any] = {"steps": 6, "t_max": 0.6, "t_min": 0.01}
    plan = make_plan("dpmpp_2m_sde", theirs, WORLDS["vp"].sde, **options)
    own = plan_of("dpmpp_2m_sde", "vp", "x0", **options)
    noise = Noise.normal(noises(plan), (4, 2))
    out = interpret(plan, network, noise.again()).states[-1]
    same = interpret(own, Network(WORLDS["vp"], MIXTURE, "x0"), noise.again()).states[-1]
    np.testing.assert_allclose(out, same, rtol=0, atol=1e-9)


def test_through_sample_with_given_noise() -> None:
    world, data = WORLDS["vp"], MIXTURE
    noise = Noise.normal(8, (5, 2))

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        m, sigma = world.level(float(t[0]))
        return torch.from_numpy(data.posterior_mean(x.numpy(), m, sigma))

    x = sample(
        ScoreModel(net, predicts="x0"),
        world.sde,
        (5, 2),
        method="dpmpp_2m_sde",
        steps=8,
        dtype=torch.float64,
        noise=lambda draw, stream: torch.from_numpy(noise.arrays[draw]),
    )
    times = time_grid(world.sde, 8, "log_snr")
    den, other = textbook.Denoiser(world, data), noise.again()
    expected = textbook.dpmpp_2m(den, other, times, prior(den, other), eta=1.0)
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-12)


def test_the_mixture_is_reached() -> None:
    """By the bounds of tests/test_law.py; with a tenth less noise a step it is not."""
    pairs = [(exact_sample("plane", 2 * i), exact_sample("plane", 2 * i + 1)) for i in range(4)]
    v = directions("plane")
    null = {"plane": float(np.mean([energy_distance(a @ v, b @ v) for a, b in pairs]))}
    means, std, shape = mixture("plane")
    vp = WORLDS["vp"].sde
    model = sampling_cases.score_of_mixture(means, std, vp, WEIGHTS)
    plans = {m: make_plan(m, model, vp, steps=40) for m in ("dpmpp_2m", "dpmpp_2m_sde")}
    coef = plans["dpmpp_2m_sde"].coef.copy()
    coef[1:, 0, Z] *= 0.9
    plans["quiet"] = replace(plans["dpmpp_2m_sde"], coef=coef)
    broken = {}
    for name, plan in plans.items():
        x = sample(model, vp, (N, *shape), method=plan, seed=12)
        broken[name] = law_violation("plane", x.double().numpy(), null)
    assert broken["dpmpp_2m"] == broken["dpmpp_2m_sde"] == ""
    assert broken["quiet"] != ""


@pytest.mark.parametrize(
    ("method", "options", "error", "match"),
    [
        ("dpmpp_2m", {"solver": "middle"}, ValueError, "solver: .* did you mean 'midpoint'"),
        ("dpmpp_2m", {"eta": 1.0}, TypeError, "eta: no option of method 'dpmpp_2m'"),
        ("dpmpp_2m_sde", {"eta": -1.0}, ValueError, "eta: expected a finite number ≥ 0, got -1"),
        ("dpmpp_2m_sde", {"eta": float("inf")}, ValueError, "eta: expected a finite number"),
        ("dpmpp_2m", {"denoise": "tweedie"}, ValueError, "denoise: .* ends at the clean"),
        ("dpmpp_2m", {"compat": "edm"}, ValueError, "compat: method 'dpmpp_2m' reproduces no peer"),
        ("dpmpp_2m", {"steps": 0}, ValueError, "steps: expected an integer ≥ 1, got 0"),
        ("dpmpp_2m", {"schedule": []}, ValueError, "schedule: expected at least 1 times"),
        ("dpmpp_2m", {"t_min": 0.0}, ValueError, "t_min: .* needs noise at t_min"),
        ("dpmpp_2m", {"schedule": [0.5, 0.0]}, ValueError, "t_min: there is no noise at t = 0"),
        ("dpmpp_2m", {"clip_denoised": 0.0}, ValueError, "clip_denoised: expected a finite"),
    ],
)
def test_what_is_refused(method: str, options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        plan_of(method, **options)


@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_times_with_one_noise_level_leave_no_step(method: str, solver: str) -> None:
    net, sde = (lambda x, t: x), VESDE()
    for times in ([0.9, 1e-17, 9e-18], [1e-17, 9e-18], [0.9, 2e-17, 1e-17, 0.0]):
        with pytest.raises(ValueError, match=r"^schedule: .* have the same σ/m in float64"):
            make_plan(method, net, sde, schedule=times, solver=solver)
    # neighbours in float64 that are two levels
    times = [9.0, 1.0, float(np.nextafter(1.0, 0.0)), 0.1]
    assert make_plan(method, net, EDMSDE(), schedule=times, solver=solver).nfe == 4
