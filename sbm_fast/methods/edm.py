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
from sbm_fast.process import finite, is_infinite
from sbm_fast.schedule import time_grid, time_range
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
        sigma_min, sigma_max: range of σ (nsr), default 0.002 to 80, or all of it where
            ``schedule`` gives the times; clamped to the range that SDE and network know, and on a
            ladder to the levels inside. ``t_max`` and ``t_min`` say the same in times.
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
        s_max=math.inf if is_infinite(S_max) else not_negative("S_max", S_max),
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
    karras = schedule is None or (isinstance(schedule, str) and schedule == "karras")
    own_times = schedule is not None and not isinstance(schedule, str)
    rho = finite("rho", rho, above=0)
    rounded = _rounding(run)
    low, high = _nsr_range(run, sigma_min, sigma_max, own_times)
    if rounded and karras:
        sigmas = time_grid(EDMSDE(low, high), _STEPS if steps is None else steps, "karras", rho=rho)
    else:
        free_min = run.t_min is None and own_times and sigma_min is None
        free_max = run.t_max is None and own_times and sigma_max is None
        t_max, t_min = _times_of(run, low, high)
        times = run.times(
            steps,
            schedule,
            default=_STEPS,
            kind="karras",
            t_min=None if free_min else t_min,
            t_max=None if free_max else t_max,
            rho=rho if karras else None,
        )
        sigmas = run.sde.nsr(times)
    return [rounded(float(sigma)) if rounded else float(sigma) for sigma in sigmas]


def _nsr_range(
    run: Setup, sigma_min: float | None, sigma_max: float | None, own_times: bool
) -> tuple[float, float]:
    """Lowest and highest σ/m of the grid; the paper's range is not one for times of one's own."""
    low, high = run.nsr_range()
    given = sigma_min is not None or sigma_max is not None
    if not own_times:
        sigma_min = SIGMA_MIN if sigma_min is None else sigma_min
        sigma_max = SIGMA_MAX if sigma_max is None else sigma_max
    # A range of times is checked as such, down to 0: what is not given shall not be blamed.
    t_max, t_min = time_range(
        run.sde, run.t_max, 0.0 if run.t_min is None else run.t_min, strict=False
    )
    if run.t_min is not None:
        low = float(run.sde.nsr(t_min))
    elif sigma_min is not None:
        low = max(low, finite("sigma_min", sigma_min, above=0))
    if run.t_max is not None:
        high = float(run.sde.nsr(t_max))
    elif sigma_max is not None:
        high = min(high, finite("sigma_max", sigma_max, above=0))
    if low < high or (own_times and not given):
        return low, high
    if given:
        raise ValueError(f"sigma_min, sigma_max: expected sigma_min < sigma_max, got {low}, {high}")
    name = "t_max" if run.t_max is not None else "t_min" if run.t_min is not None else "sde"
    raise ValueError(
        f"{name}: method {run.method!r} needs a range of noise levels σ/m, by default from "
        f"{SIGMA_MIN:g} to {SIGMA_MAX:g}, got {low:g} to {high:g}; give the times as schedule"
    )


def _times_of(run: Setup, low: float, high: float) -> tuple[float, float]:
    """(t_max, t_min) with these σ/m; on a ladder the levels inside."""
    t_max = float(run.sde.time_at_nsr(high)) if run.t_max is None else run.t_max
    t_min = float(run.sde.time_at_nsr(low)) if run.t_min is None else run.t_min
    if isinstance(run.sde, Ladder):
        t_max, t_min = float(math.floor(t_max)), float(math.ceil(t_min))
        if t_min > t_max:
            raise ValueError(
                f"sigma_min, sigma_max: the ladder has no level with σ/m from {low:g} to {high:g}"
            )
    return t_max, t_min


def _rounding(run: Setup) -> Rounding | None:
    """The peer's round_sigma, which rounds for networks of a ladder only."""
    own = run.sde if run.model.sde is None else run.model.sde
    if run.compat != _PEER or not isinstance(own, Ladder):
        return None
    levels = own.nsr(np.arange(own.levels))
    return lambda sigma: float(levels[np.abs(levels - sigma).argmin()])
