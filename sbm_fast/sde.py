"""Forward processes with closed-form marginals, in float64 and without torch.

Song et al. 2021 (arXiv 2011.13456): `VESDE`, `VPSDE`, `SubVPSDE`; Karras et al. 2022 (arXiv
2206.00364): `EDMSDE`. Discrete noise levels are in `sbm_fast.ladder` and are given from here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sbm_fast.ladder import DDPMSchedule, Ladder, NCSNLadder, largest_pairwise_distance
from sbm_fast.process import SDE, finite, namespace

if TYPE_CHECKING:
    from sbm_fast.process import Array

__all__ = ["EDMSDE", "SDE", "VESDE", "VPSDE", "DDPMSchedule", "Ladder", "NCSNLadder", "SubVPSDE"]
__all__ += ["as_sde", "largest_pairwise_distance"]

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding (Song et al. 2021, eq. 9 and app. C), t in [0, 1].

        f = 0,   g = σ(t) √(2 ln(σ_max/σ_min)),   m = 1,   σ(t) = σ_min (σ_max/σ_min)^t

    σ(t)² is the variance given clean data, with σ_min as the level of t = 0. What the SDE itself
    adds from time 0 on has the variance σ(t)² − σ_min² (their eq. 29; their app. C and their code
    leave the σ_min² out, and so does this).

    Args:
        sigma_min, sigma_max: standard deviation of the noise at t = 0 and t = 1, in units of the
            data.

    Raises: TypeError, ValueError unless 0 < sigma_min < sigma_max < ∞.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: ClassVar[float] = 1e-5
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_sigmas(self)

    @property
    def prior_std(self) -> float:
        """σ_max: the prior N(0, σ_max² I) stands for data + σ_max noise."""
        return self.sigma_max

    def _mean_scale(self, t: Array) -> Array:
        return namespace(t).ones_like(t)

    def _std(self, t: Array) -> Array:
        # This product is exact at both ends.
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def _nsr(self, t: Array) -> Array:
        return self._std(t)

    def _drift_coef(self, t: Array) -> Array:
        return np.zeros_like(t)

    def _diffusion(self, t: Array) -> Array:
        return self._std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def _time_at_nsr(self, r: Array) -> Array:
        return namespace(r).log(r / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


class _VariancePreserving(SDE):
    """What VP and sub-VP share: β(t), its integral B(t), and m = e^(−B/2)."""

    beta_min: float
    beta_max: float
    t_min: ClassVar[float] = 1e-3
    t_max: ClassVar[float] = 1.0
    prior_std: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        low = finite("beta_min", self.beta_min, above=0)
        high = finite("beta_max", self.beta_max)
        if high < low:
            raise ValueError(f"beta_max: expected at least beta_min = {low:g}, got {high:g}")
        if (low + high) / 2 > _LARGEST_EXPONENT:
            raise ValueError(
                f"beta_max: the mean scale exp(-(beta_min + beta_max)/4) underflows, got {high:g}"
            )
        object.__setattr__(self, "beta_min", low)
        object.__setattr__(self, "beta_max", high)

    def _beta(self, t: Array) -> Array:
        """β(t) = β_min + t (β_max − β_min)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Array) -> Array:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_at_integral(self, b: Array) -> Array:
        # The root of ½Δt² + β_min t = b in the form that neither cancels nor divides by Δ = 0.
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + namespace(b).sqrt(self.beta_min**2 + 2 * slope * b))

    def _mean_scale(self, t: Array) -> Array:
        return namespace(t).exp(-0.5 * self._integral(t))

    def _drift_coef(self, t: Array) -> Array:
        return -0.5 * self._beta(t)


@dataclass(frozen=True)
class VPSDE(_VariancePreserving):
    """Variance preserving (Song et al. 2021, eq. 11 and 29), t in [0, 1].

        β = β_min + t (β_max − β_min),   B = ∫₀ᵗ β = β_min t + ½ t² (β_max − β_min)
        f = −β/2,   g = √β,   m = e^(−B/2),   σ = √(1 − e^(−B)),   nsr = √(e^B − 1)

    σ and nsr are taken from expm1, so they keep their digits as t → 0.

    Args:
        beta_min, beta_max: β at t = 0 and t = 1, per time.

    Raises: TypeError, ValueError unless 0 < beta_min ≤ beta_max, with m(1) inside float64.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _std(self, t: Array) -> Array:
        return np.sqrt(-np.expm1(-self._integral(t)))

    def _nsr(self, t: Array) -> Array:
        return np.sqrt(np.expm1(self._integral(t)))

    def _diffusion(self, t: Array) -> Array:
        return np.sqrt(self._beta(t))

    def _time_at_nsr(self, r: Array) -> Array:
        return self._time_at_integral(namespace(r).log1p(r**2))


@dataclass(frozen=True)
class SubVPSDE(_VariancePreserving):
    """Sub-variance preserving (Song et al. 2021, eq. 12 and 29), t in [0, 1].

        f = −β/2,   g = √(β (1 − e^(−2B))),   m = e^(−B/2),   σ = 1 − e^(−B),   nsr = 2 sinh(B/2)

    with β and B of `VPSDE`. σ is the standard deviation, the square of VP's at the same t.

    Args:
        beta_min, beta_max: β at t = 0 and t = 1, per time.

    Raises: TypeError, ValueError unless 0 < beta_min ≤ beta_max, with m(1) inside float64.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _std(self, t: Array) -> Array:
        return -np.expm1(-self._integral(t))

    def _nsr(self, t: Array) -> Array:
        return 2 * np.sinh(0.5 * self._integral(t))

    def _diffusion(self, t: Array) -> Array:
        return np.sqrt(-self._beta(t) * np.expm1(-2 * self._integral(t)))

    def _time_at_nsr(self, r: Array) -> Array:
        return self._time_at_integral(2 * namespace(r).arcsinh(0.5 * r))


@dataclass(frozen=True)
class EDMSDE(SDE):
    """Time is the noise level (Karras et al. 2022, eq. 1 and Table 1, column "Ours").

        f = 0,   g = √(2t),   m = 1,   σ(t) = t

    The formulas hold for every t ≥ 0 and are given there too (churn lifts t above sigma_max);
    t_min = sigma_min and t_max = sigma_max are the ends of a sampler's grid.

    Args:
        sigma_min, sigma_max: lowest and highest noise level, in units of the data.

    Raises: TypeError, ValueError unless 0 < sigma_min < sigma_max < ∞.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_sigmas(self)

    @property
    def t_min(self) -> float:
        """sigma_min."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """sigma_max."""
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        """sigma_max: the prior N(0, σ_max² I) stands for data + σ_max noise."""
        return self.sigma_max

    @property
    def _t_limit(self) -> float:
        return math.inf

    def _mean_scale(self, t: Array) -> Array:
        return namespace(t).ones_like(t)

    def _std(self, t: Array) -> Array:
        return t

    def _nsr(self, t: Array) -> Array:
        return t

    def _drift_coef(self, t: Array) -> Array:
        return np.zeros_like(t)

    def _diffusion(self, t: Array) -> Array:
        return np.sqrt(2 * t)

    def _time_at_nsr(self, r: Array) -> Array:
        return r


def as_sde(sde: object) -> SDE:
    """An `SDE` of this package from one of its own, or from an object of score_sde.

    score_sde's ``VPSDE``, ``subVPSDE`` (attributes ``beta_0``, ``beta_1``) and ``VESDE``
    (``sigma_min``, ``sigma_max``) are known by their class name and give the continuous SDE; their
    N, the number of steps, is an argument of the sampler here.

    Raises: TypeError naming ``sde`` for anything else; ValueError for parameters out of range.
    """
    if isinstance(sde, SDE):
        return sde
    known = {
        "VPSDE": (VPSDE, "beta_0", "beta_1"),
        "subVPSDE": (SubVPSDE, "beta_0", "beta_1"),
        "VESDE": (VESDE, "sigma_min", "sigma_max"),
    }
    found = known.get(type(sde).__name__)
    if found and hasattr(sde, "N") and all(hasattr(sde, name) for name in found[1:]):
        build, low, high = found
        return build(float(getattr(sde, low)), float(getattr(sde, high)))
    raise TypeError(
        "sde: expected one of VESDE, VPSDE, SubVPSDE, EDMSDE, NCSNLadder, DDPMSchedule or an SDE "
        f"of score_sde, got {repr(sde)[:80]}"
    )


def _check_sigmas(sde: VESDE | EDMSDE) -> None:
    low = finite("sigma_min", sde.sigma_min, above=0)
    high = finite("sigma_max", sde.sigma_max)
    if high <= low:
        raise ValueError(f"sigma_max: expected more than sigma_min = {low:g}, got {high:g}")
    object.__setattr__(sde, "sigma_min", low)
    object.__setattr__(sde, "sigma_max", high)
