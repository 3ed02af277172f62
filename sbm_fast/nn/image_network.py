"""`ImageNetwork`: what networks of images share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sbm_fast.nn import options
from sbm_fast.nn.network import Network


class ImageNetwork(Network):
    """A `Network` of x [B, in_channels, H, W]; ``config`` holds ``in_channels``."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """H and W of x must be divisible by this."""

    def check_input(self, x: Tensor) -> None:
        channels, factor = self.config["in_channels"], self.factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must be [B, {channels}, H, W] with H and W divisible by {factor}, "
                f"got {list(x.shape)}"
            )

    def _checked_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels = self.config["in_channels"]
        sizes = options.positives("sample_shape", shape)
        if len(sizes) != 3 or sizes[0] != channels:
            raise ValueError(f"sample_shape must be ({channels}, H, W), got {sizes}")
        return sizes

    def _finish(self) -> None:
        """For subclasses, once their modules stand."""
        # oneDNN and cuDNN run convolutions up to three times as fast on NHWC; the weights' layout
        # decides, so x may come in either.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
