"""Steps of a predictor: their evaluation times, and the transition down to the next level.

Between two levels (m, σ) → (m', σ') the forward process is x = k x' + √β w with

    k = m / m',    β = σ² − k² σ'²,

and the noise of its posterior given x_0 has the standard deviation σ' √β / σ. For the VP SDE
β = 1 − k², DDPM's β_i; for the VE SDE k = 1, β = σ_i² − σ_{i−1}². The last level is clean:
m' = 1, σ' = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLEAN = (1.0, 0.0)
"""(m, σ) of data without noise."""


@dataclass(frozen=True)
class Step:
    """One predictor step.

    Attributes:
        t: time of its evaluations.
        k, beta: scale and variance of the forward transition (k = √(1 − β) for VP).
        posterior_std: σ' √β / σ.
        alpha: Song's α in the corrector's step size, k² (VP: 1 − β; VE: 1).
        dt: length of the step in time, negative (Euler–Maruyama).
        t_next: where the step ends, NaN at the clean level and in a peer's grid.
        clean: the step ends exactly at data without noise, so that (x + β s) / k is D.
    """

    t: float
    k: float
    beta: float
    posterior_std: float
    alpha: float
    dt: float = math.nan
    t_next: float = math.nan
    clean: bool = False


def transition(level: tuple[float, float], following: tuple[float, float]) -> tuple[float, ...]:
    """(k, β, posterior std) between two levels (m, σ)."""
    (m, sigma), (m_next, sigma_next) = level, following
    if sigma == 0:
        raise ValueError("t_min: there is no noise at this time (σ = 0), so no step to take")
    k = m / m_next
    beta = max(0.0, sigma**2 - (k * sigma_next) ** 2)
    return k, beta, sigma_next * math.sqrt(beta) / sigma


def posterior_mean(
    step: Step, sigma: float, m_next: float, sigma_next: float
) -> tuple[float, float]:
    """(weight of x_0, weight of x) in the mean of x' given x and x_0 (Ho et al. 2020, eq. 7)

        (m' β x_0 + k σ'² x)/σ²,

    the step going from level (m, σ) to (m', σ'). The posterior's variance is β̃ = posterior_std².
    """
    return m_next * step.beta / sigma**2, step.k * sigma_next**2 / sigma**2


def check_falling(times: Sequence[float], nsr: Sequence[float]) -> None:
    """ValueError naming ``schedule`` unless σ/m falls from every time to the next, in float64."""
    for (t, high), (t_next, low) in pairwise(zip(times, nsr, strict=True)):
        if not low < high:
            raise ValueError(
                f"schedule: expected times with less and less noise, the times {float(t)!r} and "
                f"{float(t_next)!r} have the same σ/m in float64"
            )


def chain_steps(
    times: NDArray[np.float64], level: Callable[[float], tuple[float, float]], *, ends: bool
) -> list[Step]:
    """Steps down a grid of times.

    With ``ends`` the last time is an end point, so there is one step fewer than times; without,
    every time is an evaluation and the last step ends at the clean level.
    """
    levels = [level(float(t)) for t in times] + ([] if ends else [CLEAN])
    after = [float(t) for t in times[1:]] + ([] if ends else [math.nan])
    path = []
    for t, t_next, here, following in zip(times, after, levels, levels[1:], strict=False):
        k, beta, posterior_std = transition(here, following)
        dt = t_next - float(t)
        path.append(Step(float(t), k, beta, posterior_std, k**2, dt, t_next, following is CLEAN))
    return path
