"""The stochastic Heun sampler of Karras et al. 2022 (EDM), Algorithm 2, from the paper's equations.

It runs on the state x/m at the noise-to-signal ratio σ/m, so VP, sub-VP and ladder networks run
too. The paper's σ is called nsr where the two could be confused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbm_fast.methods.setup import ENDS_CLEAN, Setup, not_negative
from sbm_fast.process import finite
from sbm_fast.schedule import time_grid
from sbm_fast.sde import EDMSDE, Ladder

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""The paper's range (Table 1)."""

_PEER = "edm"
_STEPS = 18

Rounding = Callable[[float], float]
"""σ → the noise level nearest to it that the network was trained at."""


@dataclass(frozen=True)
class _Churn:
    """The paper's noise increase: σ̂ = rounded(σ + γσ) inside [S_min, S_max]."""

    gamma: float
    s_min: float
    s_max: float
    s_noise: float
    highest: float
    rounded: Rounding

    def raised(self, sigma: float) -> float:
        """σ̂, not beyond the highest level that the network knows."""
        if self.gamma == 0 or not self.s_min <= sigma <= self.s_max:
            return sigma
        return max(sigma, self.rounded(min(sigma * (1 + self.gamma), self.highest)))

    def noise_std(self, sigma: float) -> float:
        """S_noise √(σ̂² − σ²), what takes x from σ to σ̂."""
        return self.s_noise * math.sqrt(max(0.0, self.raised(sigma) ** 2 - sigma**2))


def edm(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    heun: bool = True,
) -> Plan:
    """EDM's sampler: churn, an Euler step, and Heun's correction except in the last step.

    With σ_0 > … > σ_{n−1} > σ_n = 0, γ = min(S_churn/n, √2 − 1) where S_min ≤ σ_i ≤ S_max:

        σ̂ = σ_i + γ σ_i,  x̂ = x + √(σ̂² − σ_i²) S_noise z
        d = (x̂ − D(x̂; σ̂)) / σ̂,  x' = x̂ + (σ_{i+1} − σ̂) d
        d' = (x' − D(x'; σ_{i+1})) / σ_{i+1},  x' = x̂ + (σ_{i+1} − σ̂) (d + d') / 2

    Evaluations: 2n − 1, or n without ``heun``. The churn of step i is the noise of the row before,
    so that its z is, for the ``noise`` argument of ``sample``, number (draw, stream) = (2i + c, 1),
    without ``heun`` (i + c, 1), with c = 1 if step 0 is churned and 0 else; steps without churn
    draw none. The start is σ_0 times number (0, 0).

    Args:
        run: the run.
        steps: n, default 18.
        schedule: kind of time grid ("karras" by default), or the n times themselves.
        rho: ρ of the Karras grid.
        sigma_min, sigma_max: range of σ (nsr), default 0.002 to 80; clamped to the range that
            SDE and network know. ``t_max`` and ``t_min`` say the same in times.
        S_churn, S_min, S_max, S_noise: the paper's churn parameters.
        heun: False leaves out the correction.

    σ̂ is held inside the network's trained range. ``denoise``: the last step ends at σ = 0, on D.

    ``compat="edm"``: exactly the steps of the authors' sampler. σ̂ is never altered: what leaves the
    network's range is an error (for churn above sigma_max declare the network under an EDMSDE that
    reaches as high). For a network that was trained on a ladder σ_i and σ̂ are rounded to its
    nearest levels, as their ``round_sigma`` does, and n is 18 there too. Their precision is
    ``dtype=torch.float64`` with ``net_dtype=torch.float32``.
    """
    run.check_compat(_PEER)
    run.denoise_mode("mean", "mean", False, because=ENDS_CLEAN)
    if not isinstance(heun, bool):
        raise TypeError(f"heun: expected True or False, got {heun!r}")
    sigmas = _grid(run, steps, schedule, rho, sigma_min, sigma_max)
    n = len(sigmas)
    churn = _Churn(
        gamma=min(not_negative("S_churn", S_churn) / n, math.sqrt(2) - 1),
        s_min=not_negative("S_min", S_min),
        s_max=math.inf if S_max == math.inf else not_negative("S_max", S_max),
        s_noise=not_negative("S_noise", S_noise),
        highest=math.inf if run.compat else run.nsr_range()[1],
        rounded=_rounding(run) or float,
    )
    b = run.builder(float(run.sde.time_at_nsr(sigmas[0])), coordinate="x/m")
    b.start(sigmas[0])
    if churn.noise_std(sigmas[0]) > 0:
        b.start_row(b.state + churn.noise_std(sigmas[0]) * b.z)
    for sigma, sigma_next in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        e = b.evaluate(run.sde.time_at_nsr(churn.raised(sigma)))
        if sigma_next == 0.0:
            b.row(e.D)
            break
        h = sigma_next - e.sigma
        x = e.x + h * e.eps
        if heun:
            b.row(x, (0, e.x + h / 2 * e.eps))
            e = b.evaluate(run.sde.time_at_nsr(sigma_next))
            x = b.H(0) + h / 2 * e.eps
        std = churn.noise_std(sigma_next)
        b.row(x + std * e.z if std > 0 else x)
    return b.build(
        steps=n,
        rho=rho,
        sigma_min=sigmas[-1],
        sigma_max=sigmas[0],
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
        heun=heun,
    )


def _grid(
    run: Setup,
    steps: int | None,
    schedule: Schedule | None,
    rho: float,
    sigma_min: float | None,
    sigma_max: float | None,
) -> list[float]:
    """σ_0 … σ_{n−1} as nsr values of the run's SDE."""
    for sigma, t, ours, theirs in (
        (sigma_min, run.t_min, "sigma_min", "t_min"),
        (sigma_max, run.t_max, "sigma_max", "t_max"),
    ):
        if sigma is not None and t is not None:
            raise ValueError(f"{ours}: {ours}={sigma!r} and {theirs}={t!r} say the same, give one")
    low, high = run.nsr_range()
    if run.t_min is None:
        low = max(low, finite("sigma_min", SIGMA_MIN if sigma_min is None else sigma_min, above=0))
    if run.t_max is None:
        high = min(
            high, finite("sigma_max", SIGMA_MAX if sigma_max is None else sigma_max, above=0)
        )
    if not low < high:
        raise ValueError(f"sigma_min, sigma_max: expected sigma_min < sigma_max, got {low}, {high}")
    karras = schedule is None or (isinstance(schedule, str) and schedule == "karras")
    rho = finite("rho", rho, above=0)
    rounded = _rounding(run)
    if rounded and karras:
        low = low if run.t_min is None else float(run.sde.nsr(run.t_min))
        high = high if run.t_max is None else float(run.sde.nsr(run.t_max))
        sigmas = time_grid(EDMSDE(low, high), _STEPS if steps is None else steps, "karras", rho=rho)
    else:
        t_min = float(run.sde.time_at_nsr(low)) if run.t_min is None else run.t_min
        t_max = float(run.sde.time_at_nsr(high)) if run.t_max is None else run.t_max
        times = run.times(
            steps,
            schedule,
            default=_STEPS,
            kind="karras",
            t_min=t_min,
            t_max=t_max,
            rho=rho if karras else None,
        )
        sigmas = run.sde.nsr(times)
    return [rounded(float(sigma)) if rounded else float(sigma) for sigma in sigmas]


def _rounding(run: Setup) -> Rounding | None:
    """The peer's round_sigma, which rounds for networks of a ladder only."""
    own = run.sde if run.model.sde is None else run.model.sde
    if run.compat != _PEER or not isinstance(own, Ladder):
        return None
    levels = own.nsr(np.arange(own.levels))
    return lambda sigma: float(levels[np.abs(levels - sigma).argmin()])
