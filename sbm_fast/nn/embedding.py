"""Embeddings of the scalar time label, and the small MLP behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ORDERS = ("cos_sin", "sin_cos")


class Embedding(nn.Module):
    """Label [B] -> (cos a, sin a) or (sin a, cos a) [B, channels] with angles a [B, channels/2].

    Angles go up to thousands of radians, where half precision knows nothing of the phase. So the
    frequencies stay float32 (or float64) when the network is converted to bf16 or fp16.

    Raises:
        ValueError: ``channels`` is odd or below 4, ``order`` is unknown.
    """

    frequencies: Tensor

    def __init__(self, channels: int, order: str) -> None:
        super().__init__()
        if channels < 4 or channels % 2:
            raise ValueError(f"channels of a time embedding must be even and >= 4, got {channels}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self.pairs, self.order = channels // 2, order

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype not in (torch.float32, torch.float64):
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def angle(self, label: Tensor) -> Tensor:
        """[B] -> [B, channels/2]."""
        return torch.outer(*self._exact(label))

    def _exact(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Label and frequencies in float64 where both are, otherwise in float32."""
        if label.dtype == self.frequencies.dtype == torch.float64:
            return label, self.frequencies
        return label.float(), self.frequencies.float()

    def forward(self, label: Tensor) -> Tensor:
        angle = self.angle(label)
        pair = (angle.cos(), angle.sin())
        return torch.cat(pair if self.order == "cos_sin" else pair[::-1], dim=1)


class PositionalEmbedding(Embedding):
    """Sinusoidal embedding, a = w_k l.

    w_k = max_period^(-k/(K-1)) for k = 0..K-1 and K = channels/2 (Vaswani et al. 2017, sec. 3.5; Ho
    et al. 2020), so that the frequencies span 1 ... 1/max_period; ``endpoint=False``:
    max_period^(-k/K) (Dhariwal & Nichol 2021). Suits labels of order 1000 (``time="999t"`` or
    ``"index"``).
    """

    def __init__(
        self,
        channels: int,
        max_period: float = 10_000.0,
        *,
        endpoint: bool = True,
        order: str = "cos_sin",
    ) -> None:
        super().__init__(channels, order)
        self.max_period = max_period
        self.last = self.pairs - 1 if endpoint else self.pairs
        # Rebuilt from the configuration on load, hence not part of the weights.
        self.register_buffer("frequencies", self._spread(), persistent=False)

    def _spread(self) -> Tensor:
        exponent = torch.arange(self.pairs, dtype=torch.float64) / self.last
        return torch.exp(-math.log(self.max_period) * exponent).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        waited = self.frequencies.is_meta
        super()._apply(fn, recurse)
        if waited and not self.frequencies.is_meta:  # `to_empty`: no file brings them
            self.frequencies = self._spread().to(self.frequencies)
        return self


class FourierEmbedding(Embedding):
    """Random Fourier features, a = w_k l with w_k ~ N(0, (2 pi scale)^2).

    Drawn once and stored with the weights (Tancik et al. 2020; Song et al. 2021, sec. G uses scale
    16 on ln sigma). Labels of order 1 want a scale near 1.
    """

    def __init__(self, channels: int, scale: float = 1.0, *, order: str = "cos_sin") -> None:
        super().__init__(channels, order)
        self.register_buffer("frequencies", torch.randn(self.pairs) * (2 * math.pi * scale))


class TurnsEmbedding(Embedding):
    """Random Fourier features, a = 2 pi w_k l with w_k ~ N(0, scale^2) stored.

    At scale 16 an angle is so large that its rounding shows in the fifth digit of the embedding.
    So the product is made in the order of the published code: (w l) 2 pi in score_sde's, and
    (2 pi w) l with ``angular=True`` in EDM's.
    """

    def __init__(
        self, channels: int, scale: float, *, angular: bool = False, order: str = "sin_cos"
    ) -> None:
        super().__init__(channels, order)
        self.angular = angular
        self.register_buffer("frequencies", torch.randn(self.pairs) * scale)

    def angle(self, label: Tensor) -> Tensor:
        label, turns = self._exact(label)
        if self.angular:
            return torch.outer(label, 2 * math.pi * turns)
        return torch.outer(label, turns) * (2 * math.pi)


SCALES = {"positional": 10_000.0, "fourier": 1.0}
"""``max_period`` or ``scale`` of a `time_embedding` of that kind where none is given."""


def time_embedding(kind: str, scale: float, channels: int, width: int) -> TimeEmbedding:
    """Label [B] -> [B, width] by about ``channels`` features of a kind in `SCALES`."""
    even = max(4, channels + channels % 2)
    features = PositionalEmbedding if kind == "positional" else FourierEmbedding
    return TimeEmbedding(features(even, scale), even, width)


class TimeEmbedding(nn.Module):
    """Label [B] -> SiLU(W2 SiLU(W1 features(label))) [B, width].

    The last SiLU stands here and not in every residual block, because all blocks share its result.
    """

    def __init__(self, features: nn.Module, channels: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, label: Tensor) -> Tensor:
        return self.join(self.features(label))

    def join(self, features: Tensor) -> Tensor:
        """What follows the features [B, channels], to which a network may have added others."""
        hidden = nn.functional.silu(self.linear1(features.to(self.linear1.weight.dtype)))
        return nn.functional.silu(self.linear2(hidden))
