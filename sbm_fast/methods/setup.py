"""What every method is given, and the checks of arguments that methods share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbm_fast.methods.builder import PlanBuilder
from sbm_fast.process import count, finite, real_array
from sbm_fast.schedule import time_grid, time_range
from sbm_fast.sde import EDMSDE, SDE, Ladder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sbm_fast.methods.clipping import Clip
    from sbm_fast.model import ScoreModel

    Schedule = str | Sequence[float] | NDArray[np.float64]

Denoise = str | bool

ENDS_CLEAN = "its last step ends at the clean level, where the state is the denoised one"


@dataclass(frozen=True)
class Setup:
    """The run that a method writes its plan for; the arguments of ``make_plan`` behind it."""

    model: ScoreModel
    sde: SDE
    method: str
    t_max: float | None = None
    t_min: float | None = None
    denoise: Denoise | None = None
    clip: Clip | None = None
    compat: str | None = None
    given_start: bool = False

    def builder(self, t_start: float, coordinate: str = "x") -> PlanBuilder:
        """A builder for this run that starts at ``t_start``."""
        return PlanBuilder(
            self.model,
            self.sde,
            method=self.method,
            coordinate=coordinate,
            clip=self.clip,
            given_start=self.given_start,
            t_start=t_start,
        )

    def times(
        self,
        steps: int | None,
        schedule: Schedule | None,
        *,
        default: int,
        ends: bool = False,
        kind: str | None = None,
        t_max: float | None = None,
        t_min: float | None = None,
        rho: float | None = None,
    ) -> NDArray[np.float64]:
        """Evaluation times from t_max to t_min: ``steps`` of them, one more where ``ends``.

        ``ends`` is for methods that integrate up to t_min, so that the last time is an end point.
        On a ladder the default is every level; the default kind is "uniform", "karras" under the
        EDM SDE, where uniform times would spend all steps at high noise. ``rho`` is the
        Karras grid's ρ.
        """
        extra = int(ends)
        if schedule is not None and not isinstance(schedule, str):
            schedule = real_array("schedule", schedule)
            if schedule.ndim != 1 or len(schedule) <= extra:
                raise ValueError(
                    f"schedule: expected at least {1 + extra} times in one dimension, got shape "
                    f"{schedule.shape}"
                )
            if steps is not None and len(schedule) != count("steps", steps) + extra:
                raise ValueError(
                    f"schedule: steps={steps} needs {steps + extra} times, got {len(schedule)}"
                )
            points: int | None = len(schedule)
        else:
            points = None if steps is None else count("steps", steps) + extra
        if schedule is None:
            schedule = kind or ("karras" if isinstance(self.sde, EDMSDE) else "uniform")
        t_max = self.t_max if t_max is None else t_max
        t_min = self.t_min if t_min is None else t_min
        if points is None:
            points = self._levels(t_max, t_min) or default + extra
        options = {} if rho is None else {"rho": rho}
        return time_grid(self.sde, points, schedule, t_max=t_max, t_min=t_min, **options)

    @property
    def levels(self) -> int:
        """Number of a ladder's levels between t_min and t_max, 0 for a continuous SDE.

        ValueError or TypeError naming ``t_max`` or ``t_min``.
        """
        return self._levels(self.t_max, self.t_min)

    def _levels(self, t_max: float | None, t_min: float | None) -> int:
        if not isinstance(self.sde, Ladder):
            return 0
        high, low = time_range(self.sde, t_max, t_min, strict=False)
        return round(high - low) + 1

    def nsr_range(self) -> tuple[float, float]:
        """Lowest and highest nsr = σ/m that both the SDE and the network know."""
        known = [sde for sde in (self.sde, self.model.sde) if sde is not None]
        low = max(float(sde.nsr(0.0)) for sde in known)
        return low, min(float(sde.nsr(sde.t_max)) for sde in known)

    def denoise_mode(self, default: Denoise, *allowed: Denoise, because: str = "") -> Denoise:
        """The run's ``denoise``, ``default`` for None.

        ValueError, with what ``because`` adds, for one that is not ``allowed``.
        """
        if self.denoise is None:
            return default
        for mode in allowed:
            if isinstance(self.denoise, type(mode)) and self.denoise == mode:
                return mode
        names = ", ".join(repr(mode) for mode in (None, *allowed))
        raise ValueError(
            f"denoise: method {self.method!r} under {self.sde!r} takes {names}, "
            f"got {self.denoise!r}" + (f"; {because}" if because else "")
        )

    def check_compat(self, *peers: str) -> None:
        """ValueError unless ``compat`` is None or one of ``peers``."""
        if self.compat is None:
            return
        if not isinstance(self.compat, str) or self.compat not in peers:
            known = ", ".join(map(repr, peers)) or "no peer"
            raise ValueError(
                f"compat: method {self.method!r} reproduces {known}, got {self.compat!r}"
            )

    def continuous(self) -> None:
        """ValueError on a discrete ladder, for methods that need drift and diffusion."""
        if isinstance(self.sde, Ladder):
            raise ValueError(
                f"sde: method {self.method!r} needs a continuous SDE, got the ladder "
                f"{self.sde!r}; use reverse_diffusion, ancestral or ddim there"
            )


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean 'x'?" for the nearest of ``known``, else the list of them."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    options = ", ".join(sorted(known))
    return (f"did you mean {close[0]!r}? " if close else "") + f"(known: {options})"


def choice(argument: str, value: object, known: Sequence[str]) -> str:
    """``value`` if it is one of ``known``, else ValueError with the nearest name."""
    if isinstance(value, str) and value in known:
        return value
    raise ValueError(f"{argument}: unknown value {value!r}; {nearest(str(value), known)}")


def not_negative(argument: str, value: object) -> float:
    """``value`` as a finite float ≥ 0."""
    number = finite(argument, value)
    if number < 0:
        raise ValueError(f"{argument}: expected a finite number ≥ 0, got {value!r}")
    return number
