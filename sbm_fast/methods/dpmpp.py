"""DPM-Solver++(2M) and SDE-DPM-Solver++(2M) (Lu et al. 2022b, arXiv 2211.01095), for any SDE.

Both integrate y = x/m over the half log-SNR λ = −ln(σ/m), holding the denoised estimate D linear
between two evaluations. In y the noise level is σ/m, written σ below, so that e^(−h) = σ'/σ for a
step h = λ' − λ, and one formula serves VE, VP, sub-VP and ladders.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from sbm_fast.methods.chain import check_falling
from sbm_fast.methods.ddim import few_levels
from sbm_fast.methods.setup import ENDS_CLEAN, Setup, choice, not_negative

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan

SOLVERS = ("midpoint", "heun")

_STEPS = 20
_SERIES_BELOW = 0.5


def dpmpp_2m(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    solver: str = "midpoint",
) -> Plan:
    """DPM-Solver++(2M): second order with one evaluation a step (Lu et al. 2022b, Algorithm 2).

        y' = (σ'/σ) y + (1 − e^(−h)) D_i + w(h) (D_i − D_{i−1}) / r,   r = h_{i−1}/h
        w(h) = (1 − e^(−h)) / 2 ("midpoint", the paper's),   1 − (1 − e^(−h)) / h ("heun")

    "heun" is the exact integral of the line through D_{i−1} and D_i, the paper's Taylor expansion;
    "midpoint" agrees with it up to O(h²). The first step has no D_{i−1} and is of first order. So
    is the last one, which ends at σ = 0 on D: what Lu et al. do below 15 steps
    ("lower_order_final") holds here always.

    Args:
        run: the run.
        steps: number of evaluations, default 20 (a ladder is respaced to that many levels).
        schedule: kind of time grid, "log_snr" (steps even in λ, as in the paper) by default, or
            the times themselves.
        solver: "midpoint" or "heun".

    ``denoise``: the last row is D in any case. With ``clip_denoised`` D is the clamped one
    everywhere.
    """
    return _multistep(run, steps, schedule, solver, eta=0.0)


def dpmpp_2m_sde(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    solver: str = "midpoint",
    eta: float = 1.0,
) -> Plan:
    """SDE-DPM-Solver++(2M): the same for the reverse SDE (Lu et al. 2022b, on diffusion SDEs).

        y' = (σ'/σ) e^(−ηh) y + (1 − e^(−k)) D_i + w(k) (D_i − D_{i−1}) / r
             + σ' √(1 − e^(−2ηh)) z,      k = (1 + η) h,   r = h_{i−1}/h

    with w of :func:`dpmpp_2m`. This solves dy = (1 + η) (D − y) dλ + √(2η) e^(−λ) dw, which has
    the same marginals for every η: the linear part and the noise exactly, D extrapolated. η = 1 is
    the reverse SDE and the paper's formula, η = 0 the flow and :func:`dpmpp_2m`; values between
    and "heun" are known from k-diffusion's sampler of this name.

    Args:
        run: the run.
        steps, schedule, solver: as in :func:`dpmpp_2m`.
        eta: η ≥ 0, how much noise is renewed.

    ``denoise``: the last row is D in any case, without noise. With ``clip_denoised`` D is the
    clamped one everywhere.
    """
    return _multistep(run, steps, schedule, solver, eta=not_negative("eta", eta))


def _multistep(
    run: Setup, steps: int | None, schedule: Schedule | None, solver: str, eta: float
) -> Plan:
    run.check_compat()
    solver = choice("solver", solver, SOLVERS)
    run.denoise_mode("mean", "mean", False, because=ENDS_CLEAN)
    steps = few_levels(run, steps, schedule, _STEPS)
    times = run.times(steps, schedule, default=_STEPS, kind="log_snr").tolist()
    b = run.builder(times[0], coordinate="x/m")
    b.start()
    sigmas = [b.level(t)[1] for t in times]
    if sigmas[-1] == 0:
        raise ValueError(f"t_min: there is no noise at t = {times[-1]:g} (σ = 0), λ is infinite")
    check_falling(times, sigmas)
    lengths = [math.log(high / low) for high, low in pairwise(sigmas)]
    for i, h in enumerate(lengths):
        e = b.evaluate(times[i])
        k = (1 + eta) * h
        x = sigmas[i + 1] / sigmas[i] * math.exp(-eta * h) * e.x - math.expm1(-k) * e.D
        if i > 0:
            x = x + _slope_weight(k, solver) * (h / lengths[i - 1]) * (e.D - b.H(0))
        if eta > 0:
            x = x + sigmas[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * e.z
        b.row(x, (0, e.D) if i + 1 < len(lengths) else None)
    b.row(b.evaluate(times[-1]).D)  # σ' = 0: λ' is infinite, the limit is D
    return b.build(steps=len(times), solver=solver, eta=eta)


def _slope_weight(k: float, solver: str) -> float:
    """w(k), what D_i − D_{i−1} weighs in a step as long as the one before."""
    if solver == "midpoint":
        return -0.5 * math.expm1(-k)
    if k >= _SERIES_BELOW:
        return 1 + math.expm1(-k) / k
    # 1 − (1 − e^(−k))/k = k/2! − k²/3! + …; the closed form cancels where k is small
    return sum(-((-k) ** n) / math.factorial(n + 1) for n in range(1, 16))
