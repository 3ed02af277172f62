"""Predictor–corrector samplers and their discrete predictors (Song et al. 2021, Algorithms 1–5).

At each time t_i first the corrector runs (Langevin steps at fixed noise level), then the predictor
steps down to the next level, both with evaluations at t_i, as score_sde does. Predictors, with
k, β and σ' of the transition (``methods/chain.py``):

    reverse_diffusion   x' = (2 − k) x + β s + √β z                 (App. E; VE: k = 1)
    ancestral           x' = (x + β s) / k + ς z                    (App. F; Ho et al. 2020)
                        ς = √β ("large", VP) or σ' √β / σ ("posterior", the others)
    em                  x' = x + [f x − g² s] Δt + g √|Δt| z
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sbm_fast.methods.builder import Evaluation, Lin, PlanBuilder
from sbm_fast.methods.chain import Step, chain_steps
from sbm_fast.methods.compat import PEER, score_sde_steps
from sbm_fast.methods.euler_maruyama import euler_maruyama_steps, euler_maruyama_update
from sbm_fast.methods.setup import ENDS_CLEAN, Denoise, Setup, choice
from sbm_fast.process import count, finite
from sbm_fast.sde import VPSDE, DDPMSchedule, SubVPSDE

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan

PREDICTORS = ("reverse_diffusion", "ancestral", "em", "none")
CORRECTORS = ("langevin", "ald", "none")
NORM_NAMES = ("sigma", "batch_mean", "per_sample", "sqrt_d")
VARIANCES = ("large", "posterior")
_ALIASES = {"euler_maruyama": "em", "ancestral_sampling": "ancestral"}


def pc(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norm: str | None = None,
    variance: str | None = None,
) -> Plan:
    """Predictor–corrector sampling: ``corrector_steps`` corrector rows, then a predictor row.

    Corrector: x' = x + ε s + √(2ε) z with ε = 2α (r ‖z‖ / ‖s‖)² (``norm``) or ε = 2α (r σ)²
    (norm "sigma", and corrector "ald"); α = k², which is 1 − β for VP and 1 for VE.

    Args:
        run: the run.
        steps: number of predictor steps, default 1000, on a ladder its number of levels.
        schedule: kind of time grid, or the evaluation times.
        predictor: "reverse_diffusion", "ancestral", "em" (or score_sde's "euler_maruyama"), "none".
        corrector: "langevin", "ald" (the same with norm "sigma") or "none".
        corrector_steps: corrector rows at each time.
        snr: signal-to-noise ratio r of the corrector.
        norm: "sigma" (default; exact in law in every dimension), "batch_mean" (what score_sde
            runs, its default under compat), "per_sample", "sqrt_d".
        variance: noise of the ancestral predictor, "large" (default for VP) or "posterior".

    ``denoise``: "mean" (default) drops the last noise, "tweedie" adds an evaluation at t_min
    (predictors "em" and "none", which end there), False keeps the noise. A corrector with a
    data-dependent norm and no predictor keeps its last noise (so its default is False).
    ``compat="score_sde"``: its grid, tables, indices and order; with predictor "none" it returns
    the noisy state.

    Raises:
        ValueError: unknown names; predictor and corrector both "none"; options that contradict
            each other; what the peer does not have under compat.
    """
    options = {
        "predictor": predictor,
        "corrector": corrector,
        "corrector_steps": corrector_steps,
        "snr": snr,
        "norm": norm,
        "variance": variance,
    }
    return pc_plan(run, steps=steps, schedule=schedule, **options)  # type: ignore[arg-type]


def reverse_diffusion(
    run: Setup, *, steps: int | None = None, schedule: Schedule | None = None
) -> Plan:
    """Reverse diffusion sampling, x' = (2 − k) x + β s + √β z (Song et al. 2021, App. E).

    The forward discretisation run backwards: N evaluations from t_max to t_min, then the clean
    level. On a ladder the default is every level; fewer ``steps`` respace it.

    ``denoise``: "mean" (default) drops the last noise, False keeps it.
    ``compat="score_sde"`` keeps its tables; sub-VP then runs Euler–Maruyama with Δt = 1/N, its
    default discretisation.
    """
    return pc_plan(
        run, predictor="reverse_diffusion", corrector="none", steps=steps, schedule=schedule
    )


def ancestral(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    variance: str | None = None,
) -> Plan:
    """Ancestral sampling, x' = (x + β s) / k + ς z (Song et al. 2021, App. F; Ho et al. 2020).

    Args:
        run: the run.
        steps: number of evaluations, default 1000, on a ladder every level.
        schedule: kind of time grid, or the evaluation times.
        variance: "large" ς = √β (default for VP: DDPM's β, what score_sde runs) or "posterior"
            ς = σ' √β / σ (default for all others).

    ``denoise``: "mean" (default) drops the last noise, so that the last row is D; False keeps it
    (with "posterior" the last noise is 0 anyway).
    """
    return pc_plan(
        run,
        predictor="ancestral",
        corrector="none",
        steps=steps,
        schedule=schedule,
        variance=variance,
    )


def pc_plan(
    run: Setup,
    *,
    predictor: str,
    corrector: str,
    steps: int | None = None,
    schedule: Schedule | None = None,
    corrector_steps: int = 1,
    snr: float = 0.16,
    norm: str | None = None,
    variance: str | None = None,
) -> Plan:
    """The rows of :func:`pc`, and of its predictors alone."""
    run.check_compat(PEER)
    predictor = choice("predictor", predictor, (*PREDICTORS, *_ALIASES))
    predictor = _ALIASES.get(predictor, predictor)
    corrector = choice("corrector", corrector, CORRECTORS)
    if predictor == corrector == "none":
        raise ValueError("predictor, corrector: 'none' and 'none' leave nothing to run")
    norm = _norm(run, corrector, norm)
    variance = _variance(run, predictor, variance)
    corrector_steps = count("corrector_steps", corrector_steps)
    snr = finite("snr", snr, above=0)
    denoise = _denoise(run, predictor, norm)

    stepper, path = _steps(run, predictor, corrector, steps, schedule)
    b = run.builder(run.sde.t_max if run.compat else path[0].t)
    b.start()
    for step in path:
        noisy = not (denoise == "mean" and step is path[-1])
        if corrector != "none":
            for j in range(corrector_steps):
                last_row = predictor == "none" and j == corrector_steps - 1
                b.evaluate(step.t)
                b.langevin(step.alpha, snr, norm, noise=noisy or not last_row)
        if stepper != "none":
            b.row(_predict(b, b.evaluate(step.t), step, stepper, variance, noise=noisy))
    if denoise == "tweedie":
        b.row(b.evaluate(path[-1].t_next if predictor == "em" else path[-1].t).D)
    about: dict[str, object] = {"predictor": predictor, "corrector": corrector}
    if predictor == "ancestral":
        about["variance"] = variance
    if corrector != "none":
        about |= {"corrector_steps": corrector_steps, "snr": snr, "norm": norm}
    return b.build(steps=len(path), **about, denoise=denoise, compat=run.compat or "none")


def _predict(
    b: PlanBuilder, e: Evaluation, step: Step, predictor: str, variance: str, *, noise: bool
) -> Lin:
    """The predictor's x' from its evaluation."""
    if predictor == "em":
        return euler_maruyama_update(b.sde, e, step.dt, noise=noise)
    k, beta = step.k, step.beta
    if predictor == "reverse_diffusion":
        # at the clean level and k = 1 (VE) the mean is D; its own form has no cancellation
        mean = e.D if step.clean and k == 1 else (2 - k) * e.x + beta * e.s
        std = math.sqrt(beta)
    else:
        mean = e.D if step.clean else (e.x + beta * e.s) / k
        std = math.sqrt(beta) if variance == "large" else step.posterior_std
    return mean + std * e.z if noise and std > 0 else mean


def _steps(
    run: Setup, predictor: str, corrector: str, steps: int | None, schedule: Schedule | None
) -> tuple[str, list[Step]]:
    """The steps, and the predictor that takes them (score_sde's for sub-VP is Euler–Maruyama)."""
    if predictor == "em":
        corrected = corrector != "none"
        return predictor, euler_maruyama_steps(run, steps, schedule, corrected=corrected)
    if run.compat is None:
        times = run.times(steps, schedule, default=1000)
        return predictor, chain_steps(times, run.builder(float(times[0])).level, ends=False)
    if isinstance(run.sde, SubVPSDE):
        if predictor == "ancestral":
            raise ValueError(f"predictor: {PEER!r} has no ancestral sampling for the sub-VP SDE")
        if corrector != "none":
            raise ValueError(f"corrector: {PEER!r} has no corrector for the sub-VP SDE")
        return "em", euler_maruyama_steps(run, steps, schedule)
    return predictor, score_sde_steps(run, steps, schedule)


def _norm(run: Setup, corrector: str, norm: str | None) -> str:
    if corrector == "none":
        if norm is not None:
            raise ValueError(f"norm: corrector='none' takes no norm, got {norm!r}")
        return "sigma"
    if corrector == "ald":
        if norm not in (None, "sigma"):
            raise ValueError(f"norm: corrector='ald' is norm='sigma', got {norm!r}")
        return "sigma"
    default = "batch_mean" if run.compat else "sigma"
    return default if norm is None else choice("norm", norm, NORM_NAMES)


def _variance(run: Setup, predictor: str, variance: str | None) -> str:
    default = "large" if isinstance(run.sde, (VPSDE, DDPMSchedule)) else "posterior"
    if variance is None:
        return default
    if predictor != "ancestral":
        raise ValueError(f"variance: is an option of ancestral, got {variance!r} for {predictor!r}")
    variance = choice("variance", variance, VARIANCES)
    if run.compat and variance != default:
        raise ValueError(f"variance: compat={PEER!r} runs {default!r} here, got {variance!r}")
    return variance


def _denoise(run: Setup, predictor: str, norm: str) -> Denoise:
    """How the run ends; a level that is clean already has no Tweedie step."""
    if predictor == "none" and run.compat:
        return run.denoise_mode(False, False, because=f"{PEER} returns the noisy state here")
    if predictor == "none" and norm != "sigma":
        because = f"a row with norm={norm!r} keeps its noise"
        return run.denoise_mode(False, "tweedie", False, because=because)
    if predictor in ("em", "none") and not run.compat:
        return run.denoise_mode("mean", "mean", "tweedie", False)
    because = f"{PEER} has no further step" if run.compat else ENDS_CLEAN
    return run.denoise_mode("mean", "mean", False, because=because)
