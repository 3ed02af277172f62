"""What a network predicts, as affine forms p·x + q·F of its input state x and its output F.

With x = m x_0 + σ ε, n = √(m² + σ²) and h = √(σ² + m² σ_data²), and D = E[x_0 | x] the denoised
data, s = ∇ log p(x) = (m D − x)/σ² the score and ε = −σ s the noise:

==========  ==================================================  ===================================
prediction  the network's output                                source
==========  ==================================================  ===================================
``score``   s                                                   Song & Ermon 2019; Song et al. 2021
``eps``     ε                                                   Ho et al. 2020, eq. 11, 12
``x0``      D                                                   Ho et al. 2020, sec. 3.2
``v``       (m ε − σ x_0)/n                                     Salimans & Ho 2022, sec. 4
``edm``     F in D = c_skip x/m + c_out F, fed with c_in x      Karras et al. 2022, Table 1
==========  ==================================================  ===================================

EDM's c's are functions of σ/m, because its state is x/m: c_skip = σ_d²/(σ_d² + nsr²),
c_out = nsr σ_d/√(σ_d² + nsr²), c_in = 1/√(σ_d² + nsr²).

Each of D, s and ε has its own closed form for each prediction. Getting one through another cancels:
at σ = 0.002 the score of "edm" by (c_skip − 1)/σ² loses four digits in any precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sbm_fast.process import finite, namespace

PREDICTIONS = ("score", "eps", "x0", "v", "edm")


@dataclass(frozen=True)
class Affine:
    """The form x·(state) + F·(network output)."""

    x: float
    F: float


def denoiser(predicts: str, m: float, sigma: float, sigma_data: float = 0.5) -> Affine:
    """D = E[x_0 | x] as p·x + q·F.

    Args:
        predicts: one of `PREDICTIONS`.
        m, sigma: mean scale and standard deviation of the state, x = m x_0 + σ ε.
        sigma_data: standard deviation of the data, for "edm".

    Raises:
        TypeError, ValueError: predicts is unknown; m, sigma or sigma_data is negative or not
            finite; m = 0 with "score" or "eps", which do not determine x_0 there.
    """
    m, sigma, n, h, sigma_data = _level(predicts, m, sigma, sigma_data)
    if predicts in ("score", "eps") and m == 0:
        raise ValueError(f"m: D from a network that predicts {predicts!r} is singular at m = 0")
    if predicts == "score":
        return Affine(1 / m, sigma * sigma / m)
    if predicts == "eps":
        return Affine(1 / m, -sigma / m)
    if predicts == "x0":
        return Affine(0.0, 1.0)
    if predicts == "v":
        return Affine(m / n / n, -sigma / n)
    return Affine(m * sigma_data / h * sigma_data / h, sigma * sigma_data / h)


def score(predicts: str, m: float, sigma: float, sigma_data: float = 0.5) -> Affine:
    """s = ∇ log p(x) as p·x + q·F. Arguments and errors as `denoiser`, but

    Raises:
        ValueError: σ = 0, unless the network predicts the score.
    """
    m, sigma, n, h, sigma_data = _level(predicts, m, sigma, sigma_data)
    if predicts == "score":
        return Affine(0.0, 1.0)
    if sigma == 0:
        raise ValueError(
            f"sigma: the score from a network that predicts {predicts!r} is singular at σ = 0"
        )
    if predicts == "eps":
        return Affine(0.0, -1 / sigma)
    if predicts == "x0":
        return Affine(-1 / sigma / sigma, m / sigma / sigma)
    if predicts == "v":
        return Affine(-1 / n / n, -m / n / sigma)
    return Affine(-1 / h / h, m * sigma_data / h / sigma)


def noise(predicts: str, m: float, sigma: float, sigma_data: float = 0.5) -> Affine:
    """ε = (x − m D)/σ as p·x + q·F. Arguments and errors as `denoiser`, but

    Raises:
        ValueError: σ = 0 with a network that predicts x_0, which does not determine ε there.
    """
    m, sigma, n, h, sigma_data = _level(predicts, m, sigma, sigma_data)
    if predicts == "score":
        return Affine(0.0, -sigma)
    if predicts == "eps":
        return Affine(0.0, 1.0)
    if predicts == "x0":
        if sigma == 0:
            raise ValueError("sigma: ε from a network that predicts 'x0' is singular at σ = 0")
        return Affine(1 / sigma, -m / sigma)
    if predicts == "v":
        return Affine(sigma / n / n, m / n)
    return Affine(sigma / h / h, -m * sigma_data / h)


def input_scale(predicts: str, m: float, sigma: float, sigma_data: float = 0.5) -> float:
    """c_in: the network is fed c_in·x. 1/√(σ² + m² σ_data²) for "edm", else 1.

    Arguments and errors as `denoiser`.
    """
    h = _level(predicts, m, sigma, sigma_data)[3]
    return 1 / h if predicts == "edm" else 1.0


@dataclass(frozen=True)
class Flow:
    """du/dλ = x·u + F·(network output), the network being fed c_in·u; see `flow`."""

    x: Any
    F: Any
    c_in: Any


def flow(predicts: str, m: Any, nsr: Any, sigma_data: float = 0.5) -> Flow:
    """The probability-flow ODE over λ = ln(σ/m), of the state u = x/√(σ² + m² σ_d²).

    With r = σ/m, s = r/√(σ_d² + r²) and c = σ_d/√(σ_d² + r²), so that s² + c² = 1,

        du/dλ = s (ε − s u)

    which is eq. 13 of Song et al. 2021 in a coordinate of unit scale at every noise level: u has
    the variance of the data over σ_d² at one end and that of pure noise, 1, at the other, and
    stands still for Gaussian data of standard deviation σ_d. It is one ODE for every SDE.

    Each prediction has its own closed form, none of which cancels as r → 0 or ∞.

    Args:
        predicts: one of `PREDICTIONS`.
        m, nsr: mean scale and σ/m of the network's own SDE, float64 arrays or tensors of one shape.
        sigma_data: σ_d, standard deviation of the data.
    """
    check_prediction(predicts)
    xp = namespace(nsr)
    scale = xp.sqrt(sigma_data**2 + nsr**2)
    s, c = nsr / scale, sigma_data / scale
    if predicts == "edm":
        return Flow(0.0 * s, -s * c, xp.ones_like(s))
    c_in = m * scale
    if predicts == "score":
        return Flow(-s * s, -s * m * nsr, c_in)
    if predicts == "eps":
        return Flow(-s * s, s, c_in)
    if predicts == "x0":
        return Flow(c * c, -c / sigma_data, c_in)
    n2 = 1 + nsr**2
    return Flow(s * s * (sigma_data - 1) * (sigma_data + 1) / n2, s / xp.sqrt(n2), c_in)


def check_prediction(predicts: object) -> str:
    """``predicts`` if it is one of `PREDICTIONS`, else ValueError naming it."""
    if not isinstance(predicts, str) or predicts not in PREDICTIONS:
        known = ", ".join(map(repr, PREDICTIONS))
        raise ValueError(f"predicts: expected one of {known}, got {predicts!r}")
    return predicts


def _level(
    predicts: str, m: float, sigma: float, sigma_data: float
) -> tuple[float, float, float, float, float]:
    """The checked (m, σ, n, h, σ_data)."""
    check_prediction(predicts)
    m, sigma = finite("m", m), finite("sigma", sigma)
    sigma_data = finite("sigma_data", sigma_data, above=0)
    for name, value in (("m", m), ("sigma", sigma)):
        if value < 0:
            raise ValueError(f"{name}: expected a number ≥ 0, got {value!r}")
    n = math.hypot(m, sigma)
    if n == 0:
        raise ValueError("m: a state with m = 0 and sigma = 0 holds nothing")
    return m, sigma, n, math.hypot(sigma, m * sigma_data), sigma_data
