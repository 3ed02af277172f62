"""Data that take a finite number of levels, such as the 256 of an 8-bit image.

K levels over data_range = (lo, hi) are the values lo + kΔ, k = 0 … K − 1, Δ = (hi − lo)/(K − 1);
the bin of a level is the interval of width Δ about it. Uniform dequantisation (Theis et al. 2016)
adds uniform noise that fills the bin: a density p of the result then bounds the level's mass P,

    log P(x) ≥ E_u [log p(x + (u − ½)Δ)] + d ln Δ,    u uniform in (0, 1]^d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.process import count, finite

Range = Sequence[float]

_OFF_GRID = 1e-3
"""How far from its level, in bins, a value may lie beyond its own rounding."""
_CHUNK = 1 << 22


def check_range(data_range: Range) -> tuple[float, float]:
    """(lo, hi) of a declared data range; ValueError or TypeError naming it."""
    try:
        ends = tuple(data_range)
    except TypeError:
        raise TypeError(f"data_range: expected (lowest, highest), got {data_range!r}") from None
    if len(ends) != 2:
        raise ValueError(f"data_range: expected (lowest, highest), got {data_range!r}")
    low, high = (finite("data_range", end) for end in ends)
    if not low < high:
        raise ValueError(f"data_range: expected lowest < highest, got {data_range!r}")
    return low, high


def bin_width(data_range: Range, levels: int) -> float:
    """Δ = (hi − lo)/(levels − 1), the distance between neighbouring levels.

    Raises: TypeError, ValueError naming ``data_range`` or ``levels`` (≥ 2).
    """
    low, high = check_range(data_range)
    return (high - low) / (count("levels", levels, least=2) - 1)


def check_levels(x: Tensor, data_range: Range, levels: int) -> None:
    """Asks that every value of x is one of the levels, up to the rounding of its dtype.

    Args:
        x: floating, any shape.
        data_range, levels: what the data are declared to be, see the module.

    Raises:
        TypeError: x is no floating tensor.
        ValueError: naming ``x`` with the first value that is not finite, outside the range or
            between two levels, and its index; or when the dtype of x cannot tell the levels apart.
    """
    low, high = check_range(data_range)
    width = bin_width(data_range, levels)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating tensor, got {got}")
    rounding = 0.5 * torch.finfo(x.dtype).eps * max(abs(low), abs(high)) / width  # in bins
    if rounding > 0.2:
        raise ValueError(
            f"x: {x.dtype} cannot tell levels apart that lie {width:g} from each other at "
            f"{max(abs(low), abs(high)):g}; give the data in a wider dtype"
        )
    tolerance = max(_OFF_GRID, 2 * rounding)
    flat = x.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        position = (flat[start : start + _CHUNK].double() - low) / width
        nearest = position.round().clamp(0, levels - 1)
        off = ~((position - nearest).abs() <= tolerance)  # NaN is off too
        if off.any():
            first = start + int(off.to(torch.uint8).argmax())
            _refuse(x, flat, first, (low, high), levels)


def _refuse(x: Tensor, flat: Tensor, first: int, ends: tuple[float, float], levels: int) -> None:
    value, (low, high) = float(flat[first]), ends
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), x.shape))
    slack = _OFF_GRID * bin_width(ends, levels)
    if low - slack <= value <= high + slack:
        wanted = f"one of the levels={levels} values from {low:g} to {high:g}"
        wanted += f" ({bin_width(ends, levels):.6g} apart)"
    else:
        wanted = f"values in data_range = ({low:g}, {high:g})"
    raise ValueError(f"x: expected {wanted}, got {value:.9g} at index {at}")


def level_index(x: Tensor, data_range: Range, levels: int) -> Tensor:
    """The number k of each value's level, int64 like x; x has passed `check_levels`."""
    low, _ = check_range(data_range)
    position = (x.double() - low) / bin_width(data_range, levels)
    return position.round().clamp(0, levels - 1).long()


def level_values(index: Tensor, data_range: Range, levels: int) -> Tensor:
    """lo + kΔ of levels k, float64."""
    low, _ = check_range(data_range)
    return low + bin_width(data_range, levels) * index.double()


def dequantise(x: Tensor, keys: Tensor, draw: int, data_range: Range, levels: int) -> Tensor:
    """x + (u − ½)Δ with u the uniform of stream DEQUANTISATION: a draw from each value's bin.

    Args:
        x: data [B, …] on the levels (see `check_levels`), float32 or float64.
        keys: int64 [B], see `sbm_fast.noise.keys`.
        draw: which repetition.
        data_range, levels: what the data are declared to be.

    Returns: like x, computed in float64 and rounded once.
    """
    u = noise.uniform(
        None, x.shape, draw=draw, stream=noise.DEQUANTISATION, keys=keys, device=x.device
    )
    return (x.double() + (u.double() - 0.5) * bin_width(data_range, levels)).to(x.dtype)


def discretised_gaussian(
    index: Tensor, mean: Tensor, std: Tensor, data_range: Range, levels: int
) -> Tensor:
    """log of the mass of N(mean, std²) in the bin of a level (Ho et al. 2020, eq. 13).

        log [Φ((x + Δ/2 − μ)/σ) − Φ((x − Δ/2 − μ)/σ)],    x = lo + kΔ,

    the lowest bin reaching down to −∞ and the highest up to ∞, so that the masses sum to 1. The
    logarithm keeps its relative accuracy however far away the bin lies; the paper's code has tanh
    for Φ and replaces masses below 1e-12 by that.

    Args:
        index: int64, levels k.
        mean, std: float64, broadcast with index; std > 0.
        data_range, levels: what the data are declared to be.

    Returns: float64.
    """
    half = 0.5 * bin_width(data_range, levels)
    centre = level_values(index, data_range, levels) - mean
    lower = torch.where(index > 0, (centre - half) / std, -math.inf)
    upper = torch.where(index < levels - 1, (centre + half) / std, math.inf)
    # Φ(u) − Φ(l) = Φ(−l) − Φ(−u): that of the two which lies in the lower tail keeps its digits.
    right = lower + upper > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + _log1mexp(torch.special.log_ndtr(lower) - log_upper)


def _log1mexp(x: Tensor) -> Tensor:
    """ln(1 − eˣ) for x < 0."""
    near = x > -math.log(2)
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), far)
