"""How a run bounds the denoised estimate D (argument ``clip_denoised``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sbm_fast.process import finite, is_infinite


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of the denoised estimate (Saharia et al. 2022, Imagen, sec. 2.3).

        s = quantile of |D| over the elements of a sample, held in [minimum, maximum]
        D ← clamp(D, ±s) / s

    The quantile is taken in each sample by itself and interpolated linearly between two elements.
    Under guidance D is the guided one. It is for data in [−1, 1]: with ``minimum`` = 1 a sample
    that stays inside is not changed (to the bit), one that leaves is pushed inward and rescaled.
    ``maximum`` = 1 is the static ``clip_denoised=1.0``.

    Everything that a method takes from the network (D, s, ε, a Langevin norm) follows the
    thresholded D.

    Args:
        quantile: p in (0, 1], the paper's percentile; 1 is the largest element.
        minimum, maximum: bounds of s, 0 < minimum ≤ maximum ≤ ∞. A ``minimum`` above 1 divides
            every sample by at least that, also one that stays inside.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    quantile: float = 0.995
    minimum: float = 1.0
    maximum: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < finite("quantile", self.quantile) <= 1:
            raise ValueError(f"quantile: expected a number in (0, 1], got {self.quantile!r}")
        finite("minimum", self.minimum, above=0)
        if not is_infinite(self.maximum) and finite("maximum", self.maximum) < self.minimum:
            raise ValueError(
                f"maximum: expected at least minimum = {self.minimum:g}, got {self.maximum!r}"
            )


Clip = float | DynamicThreshold
"""``clip_denoised``: L > 0 clamps D to ±L."""


def split(clip: object) -> tuple[float | None, DynamicThreshold | None]:
    """The static bound and the dynamic one; at most one of them is not None."""
    if clip is None or isinstance(clip, DynamicThreshold):
        return None, clip
    try:
        return finite("clip_denoised", clip, above=0), None
    except TypeError as error:
        raise TypeError(f"{error}, which is no DynamicThreshold() either") from None
