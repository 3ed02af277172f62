"""DDIM (Song, Meng & Ermon 2021, eq. 12 and 16) for any SDE and any sub-sequence of times, and its
inversion, which takes data to their latent."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from sbm_fast.methods.chain import Step, chain_steps
from sbm_fast.methods.clipping import DynamicThreshold
from sbm_fast.methods.setup import ENDS_CLEAN, Setup, not_negative
from sbm_fast.process import count
from sbm_fast.sde import Ladder

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan

_STEPS = 50
_SLACK = 1e-12
"""Rounding of ς against σ', which are equal where η = σ/√β."""


def ddim(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    eta: float = 0.0,
    rederive_eps: bool = True,
) -> Plan:
    """DDIM: x' = m' D + √(σ'² − ς²) ε + ς z with ς = η σ' √β / σ, ending at x' = D.

    (m, σ) → (m', σ') are neighbouring levels, β = σ² − (m/m')² σ'². η = 0 is deterministic;
    η = 1 is ancestral sampling with the posterior variance.

    Args:
        run: the run.
        steps: number of evaluations, default 50 (a ladder is respaced to that many levels).
        schedule: kind of time grid, or the sub-sequence of times itself, descending.
        eta: η ≥ 0 with ς ≤ σ' in every step but the last: η ≤ 1 always is, more (up to the least
            σ/√β) where the steps are long. ValueError beyond.
        rederive_eps: with clip_denoised, take ε from the clamped D (guided-diffusion), or False:
            straight from the network (diffusers' default); True only with a `DynamicThreshold`.

    ``denoise``: the last row is D in any case, without noise and without a further evaluation.
    """
    run.check_compat()
    eta = not_negative("eta", eta)
    _check_rederive_eps(run, rederive_eps)
    run.denoise_mode("mean", "mean", False, because=ENDS_CLEAN)
    times = run.times(few_levels(run, steps, schedule, _STEPS), schedule, default=_STEPS)
    b = run.builder(float(times[0]))
    b.start()
    levels = [b.level(float(t)) for t in times]
    path = chain_steps(times, b.level, ends=False)
    for i, step in enumerate(path):
        e = b.evaluate(step.t)
        if step.clean:
            b.row(e.D)
            continue
        m_next, sigma_next = levels[i + 1]
        std = eta * step.posterior_std
        if std > sigma_next * (1 + _SLACK):
            raise _beyond(eta, path, levels)
        eps = e.eps if rederive_eps else e.eps_raw
        x = m_next * e.D + math.sqrt(max(0.0, sigma_next**2 - std**2)) * eps
        b.row(x + std * e.z if std > 0 else x)
    return b.build(steps=len(times), eta=eta, rederive_eps=rederive_eps)


def _beyond(eta: float, path: list[Step], levels: list[tuple[float, float]]) -> ValueError:
    noisy = zip(path, levels[1:], strict=False)  # the clean step has no level after it
    largest = min(sigma / step.posterior_std for step, (_, sigma) in noisy if step.posterior_std)
    return ValueError(
        f"eta: expected at most {largest!r} on these times (ς ≤ σ' in every step; 1 always is), "
        f"got {eta!r}"
    )


def ddim_inversion(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    rederive_eps: bool = True,
) -> Plan:
    """DDIM with η = 0 the other way, from data at t_min up to their latent at t_max.

        x' = m' D(x; t) + σ' ε(x; t)

    (m, σ) at t → (m', σ') at the next time t' > t; the network is evaluated at the lower level of
    each step. Song, Meng & Ermon 2021, sec. 4.3; Dhariwal & Nichol 2021, app. F. It starts from
    ``x_init``, the data taken as the state at t_min in the SDE's own scale (clean data will do
    where σ(t_min) is small), and ends in the state at t_max, which
    ``sample(method="ddim", x_init=latent)`` takes: with ``steps + 1`` it comes down the same
    levels to the data at t_min, up to an error of order 1/steps, and then gives their D.

    Args:
        run: the run.
        steps: number of evaluations, default 50 (a ladder is respaced to one level more).
        schedule: kind of time grid, or the N + 1 times themselves, descending as everywhere.
        rederive_eps: as in :func:`ddim`.

    ``denoise``: only False, it ends in noise. There is no ``eta``: noise could not be undone.

    Raises:
        ValueError: naming ``x_init`` where none is given, and ``t_min`` where there is no noise.
    """
    run.check_compat()
    _check_rederive_eps(run, rederive_eps)
    run.denoise_mode(False, False, because="it ends at t_max, in the latent")
    if not run.given_start:
        raise ValueError(
            f"x_init: method {run.method!r} starts from data, give them as x_init (the state at "
            "t_min in the SDE's own scale)"
        )
    _check_levels(run, steps)
    steps = few_levels(run, steps, schedule, _STEPS, ends=True)
    times = run.times(steps, schedule, default=_STEPS, ends=True)[::-1].tolist()
    b = run.builder(times[0])
    b.start()
    if b.level(times[0])[1] == 0:
        raise ValueError(f"t_min: there is no noise at t = {times[0]:g} (σ = 0), so ε is unknown")
    for t, t_next in pairwise(times):
        e = b.evaluate(t)
        m_next, sigma_next = b.level(t_next)
        b.row(m_next * e.D + sigma_next * (e.eps if rederive_eps else e.eps_raw))
    return b.build(steps=len(times) - 1, rederive_eps=rederive_eps)


def _check_levels(run: Setup, steps: int | None) -> None:
    """A ladder needs a level more than steps; the grid would speak of its times."""
    if not isinstance(run.sde, Ladder):
        return
    if run.levels < 2:
        name = "sde" if run.sde.levels < 2 else "t_min" if run.t_max is None else "t_max"
        raise ValueError(
            f"{name}: method {run.method!r} needs two levels of the ladder in its range, got one"
        )
    if steps is not None and count("steps", steps) >= run.levels:
        raise ValueError(
            f"steps: {run.levels} levels of the ladder are in the range, so method {run.method!r} "
            f"takes at most {run.levels - 1} steps, got {steps}"
        )


def few_levels(
    run: Setup, steps: int | None, schedule: Schedule | None, default: int, *, ends: bool = False
) -> int | None:
    """``steps``, or ``default`` also on a ladder, as far as it has so many levels.

    For methods that are there to skip most levels. ``ends``: the grid has one time more.
    """
    if steps is None and (schedule is None or isinstance(schedule, str)):
        return min(default, run.levels - int(ends)) if run.levels else default
    return steps


def _check_rederive_eps(run: Setup, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"rederive_eps: expected True or False, got {value!r}")
    if not value and isinstance(run.clip, DynamicThreshold):
        raise ValueError(
            "rederive_eps: with a DynamicThreshold ε follows the thresholded D, got False"
        )
