"""Labels of published networks that none of `ScoreModel`'s names for ``time`` covers.

Each is a function of the time t of the network's own SDE, and of values that a checkpoint can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbm_fast.sde import SDE, DDPMSchedule


@dataclass(frozen=True)
class HalfLog:
    """The label ln(σ/2) at time t of ``sde``, of EDM's VE networks."""

    sde: SDE

    def __post_init__(self) -> None:
        if not isinstance(self.sde, SDE):
            raise ValueError(f"sde: expected an SDE, got {self.sde!r:.80}")

    def __call__(self, t: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.log(self.sde.nsr(t) / 2)


@dataclass(frozen=True)
class Steps:
    """The label (M − 1) t of EDM's VP networks with M steps."""

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 2:
            kind = type(self.steps).__name__
            raise ValueError(f"M: expected a number of steps, at least 2, got a {kind}")

    def __call__(self, t: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (self.steps - 1) * t


@dataclass(frozen=True)
class NearestLevel:
    """The index of the level of ``sde`` whose σ/m is nearest, of EDM's iDDPM networks."""

    sde: DDPMSchedule

    def __post_init__(self) -> None:
        if not isinstance(self.sde, DDPMSchedule):
            raise ValueError(f"sde: expected a DDPMSchedule, got {self.sde!r:.80}")

    def __call__(self, t: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        levels = self.sde.nsr(np.arange(self.sde.levels, dtype=np.float64))
        between = (levels[1:] + levels[:-1]) / 2
        return np.searchsorted(between, self.sde.nsr(t)).astype(np.float64)
