"""Every method's table against its paper's loop: laws for Gaussian data, paths for mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import textbook
from plan_reference import (
    CONTINUOUS,
    GAUSSIAN,
    MIXTURE,
    PREDICTIONS,
    WORLDS,
    Array,
    Mixture,
    Network,
    Noise,
    World,
    interpret,
    moments,
    noises,
    score_model,
)
from textbook import Denoiser

from sbm_fast.methods import make_plan
from sbm_fast.plan import Plan
from sbm_fast.schedule import time_grid

Loop = Callable[[Denoiser, Noise, World], Array]
ALL = tuple(WORLDS)
STEPS = 7


def grid(world: World, points: int, kind: str | None = None) -> Array:
    kind = kind or ("karras" if world is WORLDS["edm"] else "uniform")
    return time_grid(world.sde, points, kind)


def prior(den: Denoiser, z: Noise) -> Array:
    return den.world.sde.prior_std * z()


def pc_loop(ends: bool = False, **options: Any) -> Loop:
    def loop(den: Denoiser, z: Noise, world: World) -> Array:
        chosen = dict(options)
        if chosen.get("variance") == "default":
            chosen["variance"] = "large" if world.vp else "posterior"
        return textbook.pc(den, z, grid(world, STEPS + ends), prior(den, z), **chosen)

    return loop


def em_loop(denoise: object) -> Loop:
    return lambda den, z, w: textbook.em(den, z, grid(w, STEPS + 1), prior(den, z), denoise)


def ode_loop(solver: str, denoise: object = False) -> Loop:
    return lambda den, z, w: textbook.ode(den, grid(w, STEPS + 1), prior(den, z), solver, denoise)


def ddim_loop(eta: float, rederive: bool = True) -> Loop:
    return lambda den, z, w: textbook.ddim(
        den, z, grid(w, STEPS), prior(den, z), eta, rederive=rederive
    )


def ald_loop(denoise: object) -> Loop:
    def loop(den: Denoiser, z: Noise, w: World) -> Array:
        kind = "uniform" if w.f is None else "log_snr"
        times = grid(w, STEPS, kind)
        start = prior(den, z) / w.m(times[0])
        return textbook.ald(den, z, times, start, 3, 0.05 * w.nsr(times[-1]) ** 2, denoise)

    return loop


def langevin_loop(denoise: object) -> Loop:
    def loop(den: Denoiser, z: Noise, w: World) -> Array:
        return textbook.langevin(den, z, w.sde.t_min, 0.7 * z(), STEPS, 1e-5, denoise)

    return loop


def edm_loop(**options: Any) -> Loop:
    def loop(den: Denoiser, z: Noise, w: World) -> Array:
        low = max(0.002, w.nsr(0.0) if w is not WORLDS["edm"] else 0.0)
        high = min(80.0, w.nsr(w.sde.t_max))
        ramp = np.arange(STEPS) / (STEPS - 1)
        sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        if w.f is None:
            sigmas = np.array([w.nsr(t) for t in time_grid(w.sde, STEPS, "karras")])
        highest = w.nsr(w.sde.t_max)
        return textbook.edm(den, z, sigmas, sigmas[0] * z(), highest=highest, **options)

    return loop


CHURN = {"S_churn": 4.0, "S_min": 0.05, "S_max": 200.0, "S_noise": 1.003}
CHURN_LOOP = {"churn": 4.0, "s_min": 0.05, "s_max": 200.0, "s_noise": 1.003}
LD = {"corrector": "langevin", "corrector_steps": 2, "snr": 0.2}
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Loop]] = {
    "em": ("em", {}, CONTINUOUS, em_loop("mean")),
    "em-noisy": ("em", {"denoise": False}, CONTINUOUS, em_loop(False)),
    "em-tweedie": ("em", {"denoise": "tweedie"}, CONTINUOUS, em_loop("tweedie")),
    "rd": ("reverse_diffusion", {}, ALL, pc_loop(predictor="reverse_diffusion")),
    "rd-noisy": (
        "reverse_diffusion",
        {"denoise": False},
        ALL,
        pc_loop(predictor="reverse_diffusion", denoise=False),
    ),
    "ancestral": ("ancestral", {}, ALL, pc_loop(predictor="ancestral", variance="default")),
    "ancestral-noisy": (
        "ancestral",
        {"denoise": False},
        ALL,
        pc_loop(predictor="ancestral", variance="default", denoise=False),
    ),
    "ancestral-small": (
        "ancestral",
        {"variance": "posterior"},
        ("vp", "ddpm"),
        pc_loop(predictor="ancestral"),
    ),
    "ancestral-large": (
        "ancestral",
        {"variance": "large"},
        ("ve", "subvp"),
        pc_loop(predictor="ancestral", variance="large"),
    ),
    "pc-rd": ("pc", LD, ALL, pc_loop(predictor="reverse_diffusion", **LD)),
    "pc-ancestral": (
        "pc",
        LD | {"predictor": "ancestral", "denoise": False},
        ALL,
        pc_loop(predictor="ancestral", variance="default", denoise=False, **LD),
    ),
    "pc-em": (
        "pc",
        LD | {"predictor": "euler_maruyama", "denoise": "tweedie"},
        CONTINUOUS,
        pc_loop(ends=True, predictor="em", denoise="tweedie", **LD),
    ),
    "pc-ald": (
        "pc",
        {"corrector": "ald", "predictor": "ancestral_sampling"},
        ALL,
        pc_loop(predictor="ancestral", variance="default", corrector="ald"),
    ),
    "c-only": ("pc", LD | {"predictor": "none"}, ALL, pc_loop(predictor="none", **LD)),
    "c-only-tweedie": (
        "pc",
        LD | {"predictor": "none", "denoise": "tweedie"},
        ALL,
        pc_loop(predictor="none", denoise="tweedie", **LD),
    ),
    "ode-euler": ("ode", {"solver": "euler"}, CONTINUOUS, ode_loop("euler")),
    "ode-heun": ("ode", {"solver": "heun"}, CONTINUOUS, ode_loop("heun")),
    "ode-rk4": ("ode", {"solver": "rk4"}, CONTINUOUS, ode_loop("rk4")),
    "ode-tweedie": ("ode", {"denoise": "tweedie"}, CONTINUOUS, ode_loop("heun", "tweedie")),
    "ddim-0": ("ddim", {}, ALL, ddim_loop(0.0)),
    "ddim-half": ("ddim", {"eta": 0.5}, ALL, ddim_loop(0.5)),
    "ddim-1": ("ddim", {"eta": 1.0}, ALL, ddim_loop(1.0)),
    "edm": ("edm", {}, ALL, edm_loop()),
    "edm-euler": ("edm", {"heun": False}, ALL, edm_loop(heun=False)),
    "edm-churn": ("edm", CHURN, CONTINUOUS, edm_loop(**CHURN_LOOP)),
}
ALD_STEP = {"inner_steps": 3, "step_size": "relative"}
for _mode in ("tweedie", "mean", False):
    _options = {"denoise": _mode} | ALD_STEP
    CASES[f"ald-{_mode}"] = ("ald", _options, ALL, ald_loop(_mode))
    _options = {"denoise": _mode, "step_size": 1e-5, "start_std": 0.7}
    CASES[f"langevin-{_mode}"] = ("langevin", _options, ALL, langevin_loop(_mode))

PAIRS = [(case, world) for case, entry in CASES.items() for world in entry[2]]
NORM_CASES = [
    (norm, predictor, world)
    for norm in ("batch_mean", "per_sample", "sqrt_d")
    for predictor in ("reverse_diffusion", "ancestral", "none")
    for world in ALL
]


def plan_for(case: str, name: str, predicts: str, clip: float | None = None) -> Plan:
    method, options, _, _ = CASES[case]
    world = WORLDS[name]
    options = dict(options)
    if options.get("step_size") == "relative":
        kind = "uniform" if world.f is None else "log_snr"
        options["step_size"] = 0.05 * world.nsr(grid(world, STEPS, kind)[-1]) ** 2
    model = score_model(world, predicts)
    return make_plan(method, model, world.sde, steps=STEPS, clip_denoised=clip, **options)


def run_both(
    plan: Plan, loop: Loop, world: World, data: Mixture, noise: Noise, predicts: str, clip: Any
) -> tuple[list[Array], Array]:
    """The states of the table's rows, and the loop's sample, under the same noise."""
    trace = interpret(plan, Network(world, data, predicts), noise.again())
    den = Denoiser(world, data, clip)
    other = noise.again()
    out = loop(den, other, world)
    assert trace.calls == plan.nfe == den.calls
    assert other.used == noises(plan) == len(noise.arrays)
    return trace.states, out


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_law_for_gaussian_data_is_the_papers(case: str, name: str) -> None:
    world, close = WORLDS[name], {"rtol": 1e-10, "atol": 1e-10}
    for predicts in PREDICTIONS:
        plan = plan_for(case, name, predicts)
        noise = Noise.one_hot(noises(plan))
        states, out = run_both(plan, CASES[case][3], world, GAUSSIAN, noise, predicts, None)
        papers, every = moments(out), np.array([moments(state) for state in states])
        np.testing.assert_allclose(every[-1], papers, err_msg=predicts, **close)
        mean, std = plan.gaussian(0.3, 0.5)
        np.testing.assert_allclose((mean[-1], std[-1]), papers, err_msg=predicts, **close)
        np.testing.assert_allclose(np.stack([mean, std], 1), every, err_msg=predicts, **close)


@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_path_for_mixtures_is_the_papers(case: str, name: str, clip: float | None) -> None:
    world = WORLDS[name]
    for predicts in PREDICTIONS:
        plan = plan_for(case, name, predicts, clip)
        noise = Noise.normal(noises(plan), (5, 2))
        states, out = run_both(plan, CASES[case][3], world, MIXTURE, noise, predicts, clip)
        bound = 1e-11 * max(1, np.abs(out).max())
        np.testing.assert_allclose(states[-1], out, rtol=0, atol=bound, err_msg=predicts)


@pytest.mark.parametrize("rederive", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_clipped_ddim_with_either_epsilon(predicts: str, eta: float, rederive: bool) -> None:
    world = WORLDS["ddpm"]
    options = {"eta": eta, "rederive_eps": rederive}
    model = score_model(world, predicts)
    plan = make_plan("ddim", model, world.sde, steps=STEPS, clip_denoised=0.5, **options)
    both = (plan.coef[:, 0, 1] != 0) & (plan.coef[:, 0, 2] != 0)
    assert both.any() != rederive
    noise = Noise.normal(noises(plan), (5, 2))
    loop = ddim_loop(eta, rederive)
    states, out = run_both(plan, loop, world, MIXTURE, noise, predicts, 0.5)
    np.testing.assert_allclose(states[-1], out, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "predictor", "name"), NORM_CASES)
def test_langevin_norms(norm: str, predictor: str, name: str) -> None:
    world, denoise = WORLDS[name], False if predictor == "none" else "mean"
    loop = pc_loop(predictor=predictor, norm=norm, variance="default", denoise=denoise, **LD)
    data = Mixture(np.random.default_rng(1).uniform(-1, 1, (3, 16)), 0.15)
    for predicts in PREDICTIONS:
        model, options = score_model(world, predicts), {"predictor": predictor, "norm": norm}
        plan = make_plan("pc", model, world.sde, steps=STEPS, **options, **LD)
        noise = Noise.normal(noises(plan), (5, 16))
        states, out = run_both(plan, loop, world, data, noise, predicts, None)
        bound = 1e-9 * max(1, np.abs(out).max())
        np.testing.assert_allclose(states[-1], out, rtol=0, atol=bound, err_msg=predicts)
