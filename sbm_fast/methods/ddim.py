"""DDIM (Song, Meng & Ermon 2021, eq. 12 and 16), for any SDE and any sub-sequence of times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sbm_fast.methods.chain import chain_steps
from sbm_fast.methods.setup import ENDS_CLEAN, Setup, not_negative

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan


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
        eta: η ≥ 0.
        rederive_eps: with clip_denoised, take ε from the clamped D (guided-diffusion), or False:
            straight from the network (diffusers' default).

    ``denoise``: the last row is D in any case, without noise and without a further evaluation.
    """
    run.check_compat()
    eta = not_negative("eta", eta)
    if not isinstance(rederive_eps, bool):
        raise TypeError(f"rederive_eps: expected True or False, got {rederive_eps!r}")
    run.denoise_mode("mean", "mean", False, because=ENDS_CLEAN)
    times = run.times(_steps(run, steps, schedule), schedule, default=50)
    b = run.builder(float(times[0]))
    b.start()
    levels = [b.level(float(t)) for t in times]
    for i, step in enumerate(chain_steps(times, b.level, ends=False)):
        e = b.evaluate(step.t)
        if step.clean:
            b.row(e.D)
            continue
        m_next, sigma_next = levels[i + 1]
        std = eta * step.posterior_std
        eps = e.eps if rederive_eps else e.eps_raw
        x = m_next * e.D + math.sqrt(max(0.0, sigma_next**2 - std**2)) * eps
        b.row(x + std * e.z if std > 0 else x)
    return b.build(steps=len(times), eta=eta, rederive_eps=rederive_eps)


def _steps(run: Setup, steps: int | None, schedule: Schedule | None) -> int | None:
    """50 also on a ladder that has as many levels: DDIM is there to skip most of them."""
    if steps is None and (schedule is None or isinstance(schedule, str)):
        return min(50, run.levels) if run.levels else 50
    return steps
