"""Resampling by two with a separable FIR filter, in plain torch.

Zero insertion, padding and filtering as in upfirdn2d of StyleGAN 2 (Karras et al. 2019), which
NCSN++ uses (Song et al. 2021, app. H). With K taps k, brought to the sum 1, and x = 0 outside of
the image, along each side:

    up:    y[n] = 2 Σ_i k[n + s − 2i] x[i],           s = K − 2 − ⌊(K − 1)/2⌋
    down:  y[n] = Σ_j k[j] x[2n + K − 1 − j − p],     p = ⌊(K − 1)/2⌋

(1, 1) is repetition and the mean of 2×2 pixels, (1, 3, 3, 1) is bilinear. Inputs are [B, C, H, W]
in any memory format; channels_last is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BOX = (1, 1)
"""The filter of nearest and average resampling."""


class _Resampling(nn.Module):
    """Holds the filter of both sides [1, 1, K, K]; rebuilt from the configuration, not stored."""

    weight: Tensor

    def __init__(self, kernel: Sequence[float], gain: float, *, flip: bool) -> None:
        super().__init__()
        self.kernel, self.gain, self.flip = tuple(kernel), gain, flip
        self.taps = len(self.kernel)
        self.box = self.kernel == BOX
        self.register_buffer("weight", self._square(), persistent=False)

    def _square(self) -> Tensor:
        taps = torch.tensor([float(tap) for tap in self.kernel], dtype=torch.float64)
        taps = self.gain * taps / taps.sum()
        square = torch.outer(taps, taps).float()[None, None]
        return square.flip(2, 3) if self.flip else square

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        waited = self.weight.is_meta
        super()._apply(fn, recurse)
        if waited and not self.weight.is_meta:  # `to_empty`: no file brings it
            self.weight = self._square().to(self.weight)
        return self

    def extra_repr(self) -> str:
        return f"taps={self.taps}"

    def _each(self, channels: int) -> Tensor:
        return self.weight.expand(channels, 1, -1, -1)


class Up(_Resampling):
    """[B, C, H, W] -> [B, C, 2H + 2 border, 2W + 2 border].

    The ``border`` is what the filter gives outside of the image, for a convolution that follows
    without padding of its own.
    """

    def __init__(self, kernel: Sequence[float] = BOX) -> None:
        super().__init__(kernel, 2.0, flip=False)

    def forward(self, x: Tensor, border: int = 0) -> Tensor:
        if self.box and not border:
            return functional.interpolate(x, scale_factor=2.0, mode="nearest")
        low = border - (self.taps - 2 - (self.taps - 1) // 2)
        high = 2 * border - low - (self.taps - 2)
        crop = max(0, min(-low, -high))
        channels = x.shape[1]
        weight = self._each(channels)
        y = functional.conv_transpose2d(x, weight, stride=2, padding=crop, groups=channels)
        low, high = low + crop, high + crop
        return functional.pad(y, (low, high, low, high)) if low or high else y


class Down(_Resampling):
    """[B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, kernel: Sequence[float] = BOX) -> None:
        super().__init__(kernel, 1.0, flip=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return functional.avg_pool2d(x, 2)
        return self._filter(x, (self.taps - 1) // 2, (self.taps - 2) // 2, stride=2)

    def smooth(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H + 1, W + 1], filtered and not yet decimated.

        A 3x3 convolution of stride 2 without padding brings it to [H/2, W/2].
        """
        return self._filter(x, (self.taps + 1) // 2, self.taps // 2, stride=1)

    def _filter(self, x: Tensor, low: int, high: int, stride: int) -> Tensor:
        padding = low
        if low != high:
            x, padding = functional.pad(x, (low, high, low, high)), 0
        channels = x.shape[1]
        weight = self._each(channels)
        return functional.conv2d(x, weight, stride=stride, padding=padding, groups=channels)
