"""Time grids: where a sampler evaluates its network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sbm_fast.ladder import Ladder
from sbm_fast.process import SDE, TOLERANCE, count, finite, real_array

if TYPE_CHECKING:
    from sbm_fast.process import Array

KINDS = ("uniform", "karras", "log_snr", "quadratic", "trailing")


def time_grid(
    sde: SDE,
    steps: int | None,
    kind: str | Sequence[float] | Array = "uniform",
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    **options: float,
) -> Array:
    """Evaluation times, strictly decreasing from t_max to t_min inclusive.

    With u_k = k/(steps−1), k = 0 … steps−1, and r = σ/m the noise-to-signal ratio:

    - "uniform": t = t_max + u (t_min − t_max) (Song et al. 2021);
    - "karras": r^(1/ρ) is linear, option ``rho`` = 7 (Karras et al. 2022, eq. 5);
    - "log_snr": ln r is linear (Lu et al. 2022, DPM-Solver);
    - "quadratic": √t is linear (Song et al. 2020, DDIM, app. D.2);
    - "trailing": t = t_max (1 − k/steps), the clean time 0 being the step after the last one; on a
      ladder the levels t_min + round(n − k n/steps) − 1, n the levels from t_min to t_max (Lin et
      al. 2024, Table 2). It does not end at t_min, which only bounds it;
    - or the times themselves.

    On a ladder the times are whole levels, rounded and all different: where two would be the same,
    the later one and those behind it move down. One step is [t_max].

    Args:
        sde: gives the range and, for "karras" and "log_snr", the noise levels.
        steps: the number of times; None with times of one's own.
        kind: one of `KINDS`, or a decreasing array of times.
        t_max, t_min: the range; None: the SDE's own. Times of one's own may go down to 0.

    Returns: float64 [steps].

    Raises:
        TypeError, ValueError: naming ``steps`` (less than 1, more than the ladder's levels, not as
            many as the times given), ``schedule`` (unknown, not decreasing, outside the range),
            ``t_max``, ``t_min`` (not 0 ≤ t_min < t_max ≤ sde.t_max) or the option.
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"sde: expected an SDE, got {sde!r}")
    if not isinstance(kind, str):
        _check_options(options)
        return _given(sde, steps, kind, t_max, t_min)
    if kind not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"schedule: expected one of {known} or an array of times, got {kind!r}")
    rho = finite("rho", options.pop("rho"), above=0) if "rho" in options and kind == "karras" else 7
    _check_options(options)
    n = count("steps", steps)
    # t_min does not matter to a single step, so a t_max below the SDE's own t_min is fine there.
    high, low = time_range(sde, t_max, 0.0 if n == 1 and t_min is None else t_min, strict=n > 1)
    if isinstance(sde, Ladder):
        return _on_ladder(sde, n, kind, high, low, rho)
    if n == 1:
        return np.array([high])
    grid = _continuous(sde, n, kind, high, low, rho)
    if not (np.diff(grid) < 0).all():
        raise ValueError(f"steps: {n} times between {high:g} and {low:g} are not all different")
    return grid


def _continuous(sde: SDE, n: int, kind: str, high: float, low: float, rho: float) -> Array:
    if kind == "trailing":
        grid = high * (n - np.arange(n)) / n
        if grid[-1] < low * (1 - TOLERANCE):
            raise ValueError(
                f"steps: a trailing schedule of {n} steps from {high:g} ends at {grid[-1]:g}, "
                f"below t_min = {low:g}"
            )
        return grid
    if kind == "uniform":
        grid = _line(high, low, n)
    elif kind == "quadratic":
        grid = _line(math.sqrt(high), math.sqrt(low), n) ** 2
    else:
        grid = _in_nsr(sde, kind, high, low, rho, n)
    grid[0], grid[-1] = high, low
    return grid


def _in_nsr(sde: SDE, kind: str, high: float, low: float, rho: float, n: int) -> Array:
    top, bottom = sde.nsr(high), sde.nsr(low)
    if bottom == 0:
        raise ValueError(f"t_min: a {kind!r} schedule needs noise at t_min, got {low!r}")
    if kind == "log_snr":
        ratios = np.exp(_line(math.log(top), math.log(bottom), n))
    else:
        ratios = _line(top ** (1 / rho), bottom ** (1 / rho), n) ** rho
    return sde.time_at_nsr(ratios)


def _line(start: float, end: float, n: int) -> Array:
    # Integer weights: exact at the half levels that a ladder rounds, and small values keep digits.
    k = np.arange(n)
    return (start * (n - 1 - k) + end * k) / (n - 1)


def _on_ladder(sde: Ladder, n: int, kind: str, high: float, low: float, rho: float) -> Array:
    levels = round(high - low) + 1
    if n > levels:
        raise ValueError(f"steps: the ladder has {levels} levels in its range, got {n} steps")
    if n == 1:
        return np.array([high])
    k = np.arange(n)
    if kind == "trailing":
        wanted = low + np.rint(levels * (n - k) / n) - 1
    else:
        wanted = np.rint(_continuous(sde, n, kind, high, low, rho))
    # Strictly decreasing, then with room for those behind: the bound falls by one a step as well.
    falling = np.minimum.accumulate(wanted + k) - k
    return np.maximum(falling, low + n - 1 - k)


def _given(
    sde: SDE, steps: int | None, times: object, t_max: float | None, t_min: float | None
) -> Array:
    grid = real_array("schedule", times)
    if grid.ndim != 1 or grid.size == 0:
        raise ValueError(f"schedule: expected times in one dimension, got shape {grid.shape}")
    if steps is not None and count("steps", steps) != grid.size:
        raise ValueError(f"steps: the schedule has {grid.size} times, got steps={steps}")
    high, low = time_range(sde, t_max, 0.0 if t_min is None else t_min, strict=False)
    if not np.isfinite(grid).all() or not (np.diff(grid) < 0).all():
        raise ValueError("schedule: expected finite and strictly decreasing times")
    slack = TOLERANCE * high
    if grid[0] > high + slack or grid[-1] < low - slack:
        raise ValueError(
            f"schedule: expected times in [{low:g}, {high:g}], got {grid[0]:g} to {grid[-1]:g}"
        )
    if isinstance(sde, Ladder) and not (grid == np.rint(grid)).all():
        raise ValueError("schedule: the times of a ladder are whole levels")
    return np.clip(grid, low, high)


def time_range(
    sde: SDE, t_max: float | None, t_min: float | None, *, strict: bool
) -> tuple[float, float]:
    """(t_max, t_min) of a grid; ValueError or TypeError naming the one of them that is wrong."""
    high = sde.t_max if t_max is None else finite("t_max", t_max)
    low = sde.t_min if t_min is None else finite("t_min", t_min)
    if high > sde.t_max * (1 + TOLERANCE) or high < 0:
        raise ValueError(f"t_max: expected a time in [0, {sde.t_max:g}], got {t_max!r}")
    if low < 0:
        raise ValueError(f"t_min: expected a time ≥ 0, got {t_min!r}")
    if isinstance(sde, Ladder):
        for name, value in (("t_max", high), ("t_min", low)):
            if value != round(value):
                raise ValueError(f"{name}: the times of a ladder are whole levels, got {value!r}")
        strict = False
    if low > high or (strict and low == high):
        if t_min is None and t_max is not None:
            raise ValueError(
                f"t_max: expected more than t_min, {low:g} where none is given, got {high:g}"
            )
        raise ValueError(f"t_min: expected less than t_max = {high:g}, got {low:g}")
    return min(high, sde.t_max), low


def _check_options(options: dict[str, float]) -> None:
    if options:
        raise TypeError(f"{next(iter(options))}: no option of this schedule (karras has rho)")
