"""Options, models and SDEs that a method refuses: each error names what was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from method_cases import LADDER, plan_of
from plan_reference import WORLDS, score_model

from sbm_fast.methods import make_plan
from sbm_fast.schedule import time_grid
from sbm_fast.sde import SDE, VESDE, VPSDE, DDPMSchedule


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("pcc", {}, "method: unknown method 'pcc'; did you mean 'pc'"),
        ("heun", {}, "method: unknown method 'heun'"),
        ("pc", {"predictor": "ancestrol"}, "predictor: unknown value 'ancestrol'; did you mean 'a"),
        ("pc", {"predictor": ["em"]}, "predictor: unknown value"),
        ("pc", {"corrector": "langvin"}, "corrector: .* did you mean 'langevin'"),
        ("pc", {"norm": "batchmean"}, "norm: .* did you mean 'batch_mean'"),
        ("pc", {"predictor": "none", "corrector": "none"}, "predictor, corrector: 'none'"),
        ("pc", {"corrector": "ald", "norm": "sqrt_d"}, "norm: corrector='ald' is norm='sigma'"),
        ("pc", {"corrector": "none", "norm": "sigma"}, "norm: corrector='none' takes no norm"),
        ("pc", {"variance": "large"}, "variance: is an option of ancestral"),
        ("ancestral", {"variance": "small"}, "variance: unknown value 'small'"),
        ("pc", {"corrector_steps": 0}, "corrector_steps: expected an integer ≥ 1, got 0"),
        ("pc", {"snr": 0.0}, "snr: expected a finite number > 0"),
        ("pc", {"norm": "per_sample", "clip_denoised": 1.0}, "clip_denoised: norm='per_sample'"),
        ("pc", {"denoise": "tweedie"}, "denoise: method 'pc'"),
        ("pc", {"denoise": True}, "denoise: method 'pc'"),
        ("ancestral", {"denoise": "tweedie"}, "denoise: method 'ancestral'.* ends at the clean"),
        ("ode", {"denoise": "mean"}, "denoise: method 'ode'"),
        ("ddim", {"denoise": "tweedie"}, "denoise: method 'ddim'.* ends at the clean"),
        ("pc", {"predictor": "none", "norm": "sqrt_d", "denoise": "mean"}, "keeps its noise"),
        ("em", {"steps": 0}, "steps: expected an integer ≥ 1, got 0"),
        ("em", {"schedule": [0.9, 0.5], "steps": 2}, "schedule: steps=2 needs 3 times, got 2"),
        ("em", {"schedule": [0.9]}, "schedule: expected at least 2 times"),
        ("ddim", {"schedule": []}, "schedule: expected at least 1 times"),
        ("ode", {"solver": "dopri5"}, "solver: 'dopri5' makes its own .*'euler', 'heun', 'rk4'"),
        ("ode", {"solver": "dopri6"}, "solver: unknown value 'dopri6'; did you mean 'dopri5'"),
        ("ode", {"compat": "score_sde"}, "compat: method 'ode' reproduces no peer"),
        ("em", {"compat": "ddpm"}, "compat: method 'em' reproduces 'score_sde', got 'ddpm'"),
        ("ddim", {"eta": -0.1}, "eta: expected a finite number ≥ 0"),
        ("ddim", {"clip_denoised": -1.0}, "clip_denoised: expected a finite number > 0"),
        ("edm", {"sigma_min": 90.0}, "sigma_min, sigma_max: expected sigma_min < sigma_max"),
        ("edm", {"sigma_max": 9.0, "t_max": 0.5}, "sigma_max: .* say the same"),
        ("edm", {"sigma_min": 0.1, "t_min": 0.1}, "sigma_min: .* say the same"),
        ("edm", {"S_churn": -1.0}, "S_churn: expected a finite number ≥ 0"),
        ("edm", {"S_max": float("nan")}, "S_max: expected a finite number"),
        ("edm", {"rho": 0.0}, "rho: expected a finite number > 0"),
        ("ald", {"inner_steps": 0}, "inner_steps: expected an integer"),
        ("ald", {"step_size": -1.0}, "step_size: expected a finite number > 0"),
        ("ald", {"t_min": 0.0}, "t_min"),
        ("langevin", {"t_max": 0.5}, "t_max: langevin runs at one level"),
        ("langevin", {"t": 0.1, "t_min": 0.1}, "t_min: langevin runs at t"),
        ("langevin", {"start_std": 0.0}, "start_std: expected a finite number > 0"),
        ("langevin", {"step_size": 0.0}, "step_size: expected a finite number > 0"),
    ],
)
def test_values_that_are_refused(method: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan_of(method, **options)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("pc", {"correcter": "ald"}, "correcter: no option of method 'pc'; did you mean 'correct"),
        ("langevin", {"schedule": "karras"}, "schedule: no option of method 'langevin'"),
        ("em", {"eta": 1.0}, "eta: no option of method 'em'"),
        ("em", {"run": 1}, "run: no option of method 'em'"),
        ("em", {"steps": 2.5}, "steps: expected an integer ≥ 1, got 2.5"),
        ("em", {"steps": True}, "steps: expected an integer ≥ 1, got True"),
        ("pc", {"snr": "big"}, "snr: expected a number, got 'big'"),
        ("edm", {"heun": 1}, "heun: expected True or False, got 1"),
        ("ddim", {"rederive_eps": 1}, "rederive_eps: expected True or False, got 1"),
    ],
)
def test_types_that_are_refused(method: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        plan_of(method, **options)


@pytest.mark.parametrize("method", ["em", "ode"])
def test_methods_that_need_a_continuous_sde(method: str) -> None:
    with pytest.raises(ValueError, match=f"sde: method '{method}' needs a continuous SDE"):
        plan_of(method, "ddpm")
    with pytest.raises(ValueError, match="sde: method 'pc' needs a continuous SDE"):
        plan_of("pc", "ncsn", predictor="em")


def test_models_and_sdes_that_are_refused() -> None:
    with pytest.raises(TypeError, match="sde"):
        make_plan("em", lambda x, t: x, "vp")
    with pytest.raises(TypeError, match="model"):
        make_plan("em", 3, VPSDE())
    with pytest.raises(ValueError, match="that the network was trained in"):
        make_plan("em", score_model(WORLDS["ve"]), VPSDE(), steps=5)


@pytest.mark.parametrize(
    ("sde", "steps"), [(VPSDE(), 5), (DDPMSchedule.linear(20), 20), (VESDE(0.1, 1.0), 9)]
)
def test_ddim_refuses_noise_beyond_the_next_level(sde: SDE, steps: int) -> None:
    """η is bounded by σ/√β of the steps that draw noise; there σ'² − ς² = 0."""
    net = lambda x, t: x  # noqa: E731
    times = time_grid(sde, steps)
    (m, sigma) = sde.mean_scale(times), sde.std(times)
    beta = sigma[:-1] ** 2 - (m[:-1] / m[1:] * sigma[1:]) ** 2
    largest = float((sigma[:-1] / np.sqrt(beta)).min())
    assert largest > 1
    for eta in (1.0, largest * (1 - 1e-9), largest):
        make_plan("ddim", net, sde, steps=steps, eta=eta)
    for eta in (largest * (1 + 1e-6), 1.5 * largest):
        with pytest.raises(ValueError, match=r"^eta: expected at most ") as caught:
            make_plan("ddim", net, sde, steps=steps, eta=eta)
        named = float(str(caught.value).split("at most ")[1].split(" ")[0])
        assert named == pytest.approx(largest, rel=1e-12)
        make_plan("ddim", net, sde, steps=steps, eta=named)
    assert make_plan("ddim", net, sde, steps=1, eta=9.0).nfe == 1  # draws none


@pytest.mark.parametrize(
    "method", ["ddim", "ddim_inversion", "dpmpp_2m", "ald", "ancestral", "edm"]
)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"t_max": "x"}, TypeError, "t_max: expected a number"),
        ({"t_max": float("nan")}, ValueError, "t_max: expected a finite number"),
        ({"t_max": -5}, ValueError, r"t_max: expected a time in \[0, 19\]"),
        ({"t_max": 3.5}, ValueError, "t_max: the times of a ladder are whole"),
        ({"t_max": 10**400}, ValueError, "t_max: expected a number that float64 holds"),
        ({"t_min": "x"}, TypeError, "t_min: expected a number"),
        ({"t_min": 99}, ValueError, "t_min: expected less than t_max = 19"),
        ({"t_min": 5, "t_max": 0}, ValueError, "t_min: expected less than t_max = 0"),
    ],
)
def test_a_range_is_checked_before_levels_are_counted(
    method: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"^{match}"):
        make_plan(method, lambda x, t: x, LADDER, given_start=True, **options)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("langevin", {"t_min": 2.0}, "t_min: expected a time in"),
        ("langevin", {"t_min": 0.0}, "t_min: there is no noise"),
        ("langevin", {"t": -1.0}, "t: expected a time in"),
        ("langevin", {"t": 0.0}, "t: there is no noise"),
        ("ddim", {"t_max": 0}, "t_max: expected more than t_min, 0.001 where none is given"),
        ("em", {"t_max": 1e-4}, "t_max: expected more than t_min"),
        ("edm", {"t_max": 0}, "t_max: method 'edm' needs a range"),
        ("pc", {"t_min": 2.0, "compat": "score_sde"}, "t_min: expected less than t_max = 1"),
    ],
)
def test_what_was_given_is_named(method: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"^{match}"):
        plan_of(method, **options)


def test_arrays_are_no_names_and_no_bounds() -> None:
    array = np.array([1.0, 2.0])
    for method, name in (("edm", "S_max"), ("ddim", "eta"), ("pc", "snr"), ("em", "steps")):
        with pytest.raises(TypeError, match=f"^{name}: expected "):
            plan_of(method, **{name: array})
    for name in ("compat", "denoise"):
        with pytest.raises(ValueError, match=f"^{name}: method"):
            plan_of("pc", **{name: array})
