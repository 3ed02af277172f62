"""What plans promise: counts, starts, ends, networks of another SDE, EDM's grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from method_cases import LADDER, plan_of
from plan_reference import (
    CONTINUOUS,
    GAUSSIAN,
    MIXTURE,
    PREDICTIONS,
    WORLDS,
    Network,
    Noise,
    interpret,
    noises,
    score_model,
)

from sbm_fast.methods import FROM_DATA, METHODS, make_plan
from sbm_fast.model import ScoreModel
from sbm_fast.schedule import time_grid
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule

FROM_NOISE = sorted(set(METHODS) - set(FROM_DATA))  # the others' starts: test_inversion.py


@pytest.mark.parametrize(
    ("method", "options", "nfe"),
    [
        ("em", {}, 1000),
        ("em", {"denoise": "tweedie", "steps": 10}, 11),
        ("reverse_diffusion", {}, 1000),
        ("ancestral", {}, 1000),
        ("pc", {}, 2000),
        ("pc", {"steps": 10, "corrector_steps": 3}, 40),
        ("pc", {"steps": 10, "corrector": "none"}, 10),
        ("pc", {"steps": 10, "predictor": "none"}, 10),
        ("ald", {}, 232 * 5 + 1),
        ("ald", {"steps": 10, "inner_steps": 2, "denoise": "mean"}, 20),
        ("langevin", {}, 1000),
        ("ode", {}, 100),
        ("ode", {"solver": "euler"}, 50),
        ("ode", {"solver": "rk4", "steps": 7, "denoise": "tweedie"}, 29),
        ("ddim", {}, 50),
        ("edm", {}, 35),
        ("edm", {"heun": False}, 18),
        ("edm", {"steps": 1}, 1),
    ],
)
def test_evaluations(method: str, options: dict[str, Any], nfe: int) -> None:
    plan = plan_of(method, **options)
    assert plan.nfe == nfe
    assert plan.rows == nfe + 1


@pytest.mark.parametrize("name", ["ncsn", "ddpm"])
def test_ladders_run_every_level_by_default(name: str) -> None:
    levels = WORLDS[name].sde.levels
    for method, nfe in (
        ("reverse_diffusion", levels),
        ("ancestral", levels),
        ("pc", 2 * levels),
        ("ddim", levels),
        ("ald", 5 * levels + 1),
    ):
        plan = plan_of(method, name)
        assert plan.nfe == nfe
        assert plan.time[plan.evaluates][0] == levels - 1
        assert plan.time[-1] == 0
    assert plan_of("ancestral", name, t_max=8, t_min=3).nfe == 6
    ladder = DDPMSchedule.linear()
    assert make_plan("ddim", ScoreModel(lambda x, t: x, sde=ladder), ladder).nfe == 50


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("method", FROM_NOISE)
def test_very_few_steps(method: str, steps: int) -> None:
    plan = plan_of(method, steps=steps)
    noise = Noise.normal(noises(plan), (3, 2))
    out = interpret(plan, Network(WORLDS["vp"], MIXTURE, "eps"), noise).states[-1]
    assert np.isfinite(out).all()


def test_noise_is_numbered_by_row() -> None:
    plan = plan_of("pc", steps=5, norm="batch_mean")
    assert plan.stream.tolist() == [0] + [1] * 10
    assert plan.draw.tolist() == list(range(11))
    plan = plan_of("edm", steps=5, S_churn=2.0, sigma_max=20.0)
    assert plan.rows == plan.nfe + 2
    assert plan.draw[:2].tolist() == [0, 1]
    assert plan.coef[1, 0, 0] == 1.0
    assert plan.coef[1, 0, 3] > 0


@pytest.mark.parametrize("method", FROM_NOISE)
def test_given_start(method: str) -> None:
    """A given start equal to what the prior row draws gives the same sample."""
    world = WORLDS["vp"]
    drawn = plan_of(method, steps=6, S_churn=1.0) if method == "edm" else plan_of(method, steps=6)
    options = {"S_churn": 1.0} if method == "edm" else {}
    given = plan_of(method, steps=6, given_start=True, **options)
    network = Network(world, GAUSSIAN, "eps")
    noise = Noise.normal(noises(drawn), (3, 1))
    first = interpret(drawn, network, noise.again())
    x_init = first.states[0] / given.start_scale
    rest = Noise(noise.arrays[1:])
    second = interpret(given, network, rest, x_init)
    np.testing.assert_allclose(second.states[-1], first.states[-1], rtol=1e-12)


@pytest.mark.parametrize("name", list(WORLDS))
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_chains_end_on_the_denoiser_exactly(name: str, predicts: str) -> None:
    """The last row is p x + q F with the denoiser's own coefficients, bit for bit."""
    for method in ("ancestral", "ddim", "edm"):
        plan = plan_of(method, name, predicts, steps=4)
        np.testing.assert_array_equal(plan.coef[-1, 0, :2], plan.denoiser[-1, :2])
        assert plan.coef[-1, 0, 2:].any() == False  # noqa: E712
        clipped = plan_of(method, name, predicts, steps=4, clip_denoised=1.0)
        assert clipped.coef[-1, 0, :4].tolist() == [0, 0, 1, 0]
    if WORLDS[name].m(1) == 1:
        plan = plan_of("reverse_diffusion", name, predicts, steps=4)
        np.testing.assert_array_equal(plan.coef[-1, 0, :2], plan.denoiser[-1, :2])


def test_ends_of_euler_maruyama() -> None:
    plan = plan_of("em", steps=5, denoise="tweedie", t_min=0.01)
    times = plan.time[plan.evaluates]
    np.testing.assert_allclose(times, np.linspace(1, 0.01, 6), rtol=1e-15)
    assert plan_of("em", steps=5).coef[-1, 0, 3] == 0
    assert plan_of("em", steps=5, denoise=False).coef[-1, 0, 3] > 0


def test_corrector_alone_with_a_data_dependent_norm_keeps_its_noise() -> None:
    plan = plan_of("pc", steps=3, predictor="none", norm="per_sample")
    assert plan.description["denoise"] == False  # noqa: E712
    assert plan.norm.tolist() == [0, 2, 2, 2]
    plan = plan_of("pc", steps=3, predictor="none", norm="per_sample", denoise="tweedie")
    assert plan.norm.tolist() == [0, 2, 2, 2, 0]


def test_schedules_and_explicit_times() -> None:
    world = WORLDS["vp"]
    plan = plan_of("ancestral", steps=6, schedule="log_snr")
    np.testing.assert_array_equal(plan.time[1:], time_grid(world.sde, 6, "log_snr"))
    times = [0.9, 0.5, 0.1, 0.01]
    for method, evaluated in (("ancestral", times), ("ddim", times), ("em", times[:-1])):
        assert plan_of(method, schedule=times).time[1:].tolist() == evaluated
    plan = plan_of("ddim", "ddpm", schedule=[20, 11, 3])
    assert plan.time[1:].tolist() == [20, 11, 3]
    assert plan_of("edm", schedule=times).nfe == 7
    assert plan_of("ode", "edm", steps=4, solver="euler").time[1] == 80.0


NETWORKS = [
    ("ve", "vp", "t", lambda label: label),
    ("vp", "ve", "999t", lambda label: label / 999),
    ("edm", "vp", "edm", lambda label: float(np.exp(4 * label))),
    ("edm", "ve", "log_sigma", lambda label: float(np.exp(label))),
    ("edm", "subvp", "sigma", lambda label: label),
]


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize(("trained", "run", "time", "time_of"), NETWORKS)
def test_a_network_runs_under_another_sde(
    trained: str, run: str, time: str, time_of: Any, predicts: str
) -> None:
    """The same perfect denoiser, wherever it was trained: the same sample."""
    sde = WORLDS[run].sde
    theirs = score_model(WORLDS[trained], predicts, time=time)
    network = Network(WORLDS[trained], MIXTURE, predicts, time_of)
    own = Network(WORLDS[run], MIXTURE, "x0")
    limits = {"t_max": 0.6, "t_min": 0.01}
    for method in ("em", "ancestral", "pc", "ddim", "edm", "ald"):
        plan = make_plan(method, theirs, sde, steps=5, **limits)
        expected = make_plan(method, score_model(WORLDS[run], "x0"), sde, steps=5, **limits)
        noise = Noise.normal(noises(plan), (4, 2))
        out = interpret(plan, network, noise.again()).states[-1]
        same = interpret(expected, own, noise.again()).states[-1]
        np.testing.assert_allclose(out, same, rtol=0, atol=1e-9 * max(1, np.abs(same).max()))


def test_edm_clamps_its_range_to_the_network() -> None:
    plan = make_plan("edm", score_model(WORLDS["ve"]), VPSDE(), steps=5)
    assert plan.description["sigma_max"] == pytest.approx(50.0)
    assert plan.description["sigma_min"] == pytest.approx(0.01)
    plan = plan_of("edm", "vp", steps=5)
    assert plan.description["sigma_max"] == pytest.approx(80.0)
    assert plan.description["sigma_min"] == pytest.approx(0.002)
    plan = plan_of("edm", "vp", steps=5, t_max=0.5, t_min=0.01)
    assert plan.description["sigma_max"] == pytest.approx(WORLDS["vp"].nsr(0.5))


def test_edm_grid_is_the_papers() -> None:
    plan = plan_of("edm", "edm", steps=6, heun=False, rho=5.0, sigma_min=0.01, sigma_max=70.0)
    ramp = np.arange(6) / 5
    grid = (70 ** (1 / 5) + ramp * (0.01 ** (1 / 5) - 70 ** (1 / 5))) ** 5
    np.testing.assert_allclose(plan.marginal[1:, 1], grid, rtol=1e-13)


def test_edm_churn_stays_in_the_networks_range_unless_compat() -> None:
    plan = plan_of("edm", "edm", steps=5, S_churn=4.0)
    assert plan.marginal[:, 1].max() == 80.0
    assert plan.rows == plan.nfe + 1
    with pytest.raises(ValueError, match="noise-to-signal ratios"):
        plan_of("edm", "edm", steps=5, S_churn=4.0, compat="edm")
    inner = {"steps": 5, "S_churn": 4.0, "S_max": 50.0}
    assert plan_of("edm", **inner).difference(plan_of("edm", compat="edm", **inner)) == ""


def test_a_bare_callable_is_a_score() -> None:
    plan = make_plan("em", lambda x, t: -x, VESDE(), steps=3)
    assert plan.description["predicts"] == "score"
    np.testing.assert_array_equal(plan.label[1:], plan.time[1:])


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_changed_coefficient_is_seen(name: str) -> None:
    """1e-6 in one coefficient shows above the 1e-11 that the comparisons with the papers allow."""
    from dataclasses import replace

    world = WORLDS[name]
    plan = plan_of("ode", name, steps=5, solver="rk4")
    network = Network(world, MIXTURE, "eps")
    noise = Noise.normal(1, (4, 2))
    right = interpret(plan, network, noise.again()).states[-1]
    used = np.argwhere(plan.coef)
    for at in used[:: max(1, len(used) // 12)]:
        coef = np.array(plan.coef)
        coef[tuple(at)] *= 1 + 1e-6
        wrong = interpret(replace(plan, coef=coef), network, noise.again()).states[-1]
        assert np.abs(wrong - right).max() > 1e-11, tuple(at)


def test_a_changed_norm_or_an_open_register_gate_is_seen() -> None:
    from dataclasses import replace

    plan = plan_of("pc", steps=4, norm="batch_mean")
    network = Network(WORLDS["vp"], MIXTURE, "eps")
    noise = Noise.normal(noises(plan), (4, 2))
    right = interpret(plan, network, noise.again()).states[-1]
    for norm in (2, 3):
        other = replace(plan, norm=np.where(plan.norm == 1, norm, 0))
        wrong = interpret(other, network, noise.again()).states[-1]
        assert np.abs(wrong - right).max() > 1e-3
    plan = plan_of("ode", steps=2)
    coef = np.array(plan.coef)
    coef[1, 0, 4] = 1e-300
    with pytest.raises(ValueError, match="reads register H0 before it is written"):
        replace(plan, coef=coef)


@pytest.mark.parametrize(
    ("sde", "times"),
    [(VPSDE(), [1.0, 0.5, 0.01]), (EDMSDE(0.002, 200.0), [150.0, 5.0, 0.001]), (LADDER, [19, 0])],
)
def test_edm_takes_times_beyond_its_default_range(sde: SDE, times: list[float]) -> None:
    net = lambda x, t: x  # noqa: E731
    plan = make_plan("edm", net, sde, schedule=times, heun=False)
    np.testing.assert_allclose(plan.time[1:], times, rtol=1e-12)
    narrow = {"sigma_max": float(sde.nsr(times[0])) / 2, "sigma_min": float(sde.nsr(times[-1])) * 2}
    for name, value in narrow.items():
        with pytest.raises(ValueError, match=r"^schedule: expected times in"):
            make_plan("edm", net, sde, schedule=times, **{name: value})  # type: ignore[arg-type]


def test_edm_on_ladders() -> None:
    """The default range is that of the levels inside 0.002 … 80; a single level has none."""
    net, high = (lambda x, t: x), DDPMSchedule.linear(1000)
    plan = make_plan("edm", net, high, steps=5, heun=False)
    assert high.nsr(plan.time[1]) <= 80 < high.nsr(plan.time[1] + 1) and plan.time[-1] == 0
    one = DDPMSchedule.linear(1)
    with pytest.raises(ValueError, match=r"^sde: method 'edm' needs a range"):
        make_plan("edm", net, one)
    assert make_plan("edm", net, one, schedule=[0]).nfe == 1
