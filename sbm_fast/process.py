"""What every forward process offers: `SDE`, and the checks of arguments that they share."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Numbers = NDArray[Any]

TOLERANCE = 1e-9
"""Relative slack at the ends of a range, for times and noise levels that were computed."""


_MAX_INT64 = 2**63 - 1


def namespace(values: Any) -> Any:
    """The module whose functions take these: numpy, or torch for its tensors.

    What a sampler on a GPU asks per sample and step has to stay on it; so those formulas are
    written for both, and no torch is imported for the others.
    """
    return np if isinstance(values, (np.ndarray, np.generic)) else sys.modules["torch"]


class SDE(ABC):
    """A forward process dx = f(t) x dt + g(t) dw with x_t | x_0 ~ N(m(t) x_0, σ(t)² I).

    Song et al. 2021 (arXiv 2011.13456), eq. 5 with a drift linear in x, and eq. 29. The moments
    obey dm/dt = f m and dσ²/dt = 2 f σ² + g². The level of a state is its noise-to-signal ratio
    nsr = σ/m, which grows with t.

    Every method takes a time (float or array of any shape, in [0, t_max]) and gives float64 of the
    same shape. Units: t is the SDE's own time; m and nsr have none; σ is in units of the data,
    f per time and g in units of the data per √time.

    Raises (every method): TypeError for what is not a real number or an array of them, ValueError
    for NaN, ±∞ and times outside [0, t_max], each naming ``t``.
    """

    @property
    @abstractmethod
    def t_min(self) -> float:
        """Where a sampler stops by default."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """Where a sampler starts by default, the end of the process."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the prior that stands for the law of x at t_max."""

    @abstractmethod
    def _mean_scale(self, t: Array) -> Array: ...
    @abstractmethod
    def _std(self, t: Array) -> Array: ...
    @abstractmethod
    def _nsr(self, t: Array) -> Array: ...
    @abstractmethod
    def _drift_coef(self, t: Array) -> Array: ...
    @abstractmethod
    def _diffusion(self, t: Array) -> Array: ...
    @abstractmethod
    def _time_at_nsr(self, r: Array) -> Array: ...

    @overload
    def mean_scale(self, t: float) -> float: ...
    @overload
    def mean_scale(self, t: Numbers) -> Array: ...
    def mean_scale(self, t: float | Numbers) -> float | Array:
        """m(t), the factor of x_0 in x_t."""
        return self._at(self._mean_scale, t)

    @overload
    def std(self, t: float) -> float: ...
    @overload
    def std(self, t: Numbers) -> Array: ...
    def std(self, t: float | Numbers) -> float | Array:
        """σ(t), the standard deviation of x_t given x_0."""
        return self._at(self._std, t)

    @overload
    def nsr(self, t: float) -> float: ...
    @overload
    def nsr(self, t: Numbers) -> Array: ...
    def nsr(self, t: float | Numbers) -> float | Array:
        """σ(t)/m(t), the noise-to-signal ratio."""
        return self._at(self._nsr, t)

    @overload
    def drift_coef(self, t: float) -> float: ...
    @overload
    def drift_coef(self, t: Numbers) -> Array: ...
    def drift_coef(self, t: float | Numbers) -> float | Array:
        """f(t): the drift is f(t) x. TypeError on a discrete ladder."""
        return self._at(self._drift_coef, t)

    @overload
    def diffusion(self, t: float) -> float: ...
    @overload
    def diffusion(self, t: Numbers) -> Array: ...
    def diffusion(self, t: float | Numbers) -> float | Array:
        """g(t), the factor of dw. TypeError on a discrete ladder."""
        return self._at(self._diffusion, t)

    @overload
    def time_at_nsr(self, r: float) -> float: ...
    @overload
    def time_at_nsr(self, r: Numbers) -> Array: ...
    def time_at_nsr(self, r: float | Numbers) -> float | Array:
        """The time at which σ/m is r: the inverse of `nsr`, in closed form.

        Raises:
            TypeError: r is not a real number or an array of them.
            ValueError: r lies outside [nsr(0), nsr(t_max)] by more than 1e-9 of its value.
        """
        low, high = self.nsr_range
        if type(r) is float and low <= r <= high:
            return min(self._time_at_nsr(np.float64(r))[()], np.float64(self.t_max))
        values = real_array("r", r)
        outside = ~((values >= low * (1 - TOLERANCE)) & (values <= high * (1 + TOLERANCE)))
        if outside.any():
            raise ValueError(
                f"r: {type(self).__name__} has noise-to-signal ratios in [{low:.6g}, {high:.6g}], "
                f"got {values[outside].flat[0]:.6g}"
            )
        return np.minimum(self._time_at_nsr(np.clip(values, low, high)), self.t_max)[()]

    def level(self, r: Any) -> tuple[Any, Any]:
        """(t, m) where σ/m is r, a float64 array or tensor known to lie in `nsr_range`.

        Unchecked and elementwise: tensors stay on their device.
        """
        t = namespace(r).clip(self._time_at_nsr(r), 0.0, self.t_max)
        return t, self._mean_scale(t)

    @cached_property
    def nsr_range(self) -> tuple[float, float]:
        """(nsr(0), nsr(t_max)), the noise-to-signal ratios that the process passes through."""
        return float(self.nsr(0.0)), float(self.nsr(self.t_max))

    @property
    def _t_limit(self) -> float:
        return self.t_max

    def _at(self, function: Callable[[Array], Array], t: object) -> Any:
        limit = self._t_limit * (1 + TOLERANCE)
        if type(t) is float and 0 <= t <= limit and t < math.inf:
            # One time in range: ten times faster, and training matches every sample on its own.
            return function(np.float64(t))[()]
        times = real_array("t", t)
        outside = ~((times >= 0) & (times <= limit) & (times < math.inf))
        if outside.any():
            raise ValueError(
                f"t: {type(self).__name__} has times in [0, {self._t_limit:g}], "
                f"got {times[outside].flat[0]:g}"
            )
        return function(times)[()]


def real_array(name: str, value: object) -> Array:
    """``value`` as a float64 array; TypeError naming ``name`` for what is not real."""
    if type(value) is int:
        value = finite(name, value)  # numpy takes one beyond 64 bits for an object
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a real number or an array of them, got {type(value).__name__} "
            f"({error})"
        ) from None
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"{name}: expected a real number or an array of them, got {type(value).__name__}"
            + (f" of {array.dtype}" if array.ndim else f" {value!r}")
        )
    return array.astype(np.float64)


def finite(name: str, value: object, *, above: float | None = None) -> float:
    """``value`` as a finite float, greater than ``above`` where that is given."""
    # The plain float goes first: the abstract Real is slow, and a training step asks hundreds.
    if type(value) is not float and (
        isinstance(value, (bool, np.bool_)) or not isinstance(value, Real)
    ):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"{name}: expected a number that float64 holds, got {kind}") from None
    if not math.isfinite(number) or (above is not None and number <= above):
        bound = "" if above is None else f" > {above:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}")
    return number


def is_infinite(value: object) -> bool:
    """Whether it is the number +∞ (an array is none, whatever it holds)."""
    return isinstance(value, Real) and bool(value == math.inf)


def positive_table(name: str, values: object, *, below: float = math.inf) -> Array:
    """``values`` as an immutable float64 [N], N ≥ 1, every entry in (0, below)."""
    table = real_array(name, values)
    if table.ndim != 1 or table.size == 0:
        raise ValueError(f"{name}: expected one dimension of at least one, got {table.shape}")
    if not ((table > 0) & (table < below)).all():
        bad = table[~((table > 0) & (table < below))][0]
        raise ValueError(f"{name}: expected numbers in (0, {below:g}), got {bad!r}")
    table.setflags(write=False)
    return table


def count(name: str, value: object, *, least: int = 1) -> int:
    """``value`` as an int that is at least ``least``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    if value > _MAX_INT64:
        raise ValueError(f"{name}: expected an integer ≥ {least} that int64 holds, got more")
    return int(value)
