"""Embeddings of the scalar time label, and the small MLP behind them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding: label l [B] -> (cos(w_k l), sin(w_k l)) [B, channels].

    w_k = max_period^(-k/(K-1)) for k = 0..K-1 and K = channels/2 (Vaswani et al. 2017, sec. 3.5; Ho
    et al. 2020). The frequencies span 1 ... 1/max_period, which suits labels of order 1000
    (``time="999t"`` or ``"index"``).

    Raises:
        ValueError: ``channels`` is odd or below 4.
    """

    frequencies: Tensor

    def __init__(self, channels: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        half = _half(channels)
        exponent = torch.arange(half, dtype=torch.float64) / (half - 1)
        frequencies = torch.exp(-math.log(max_period) * exponent).float()
        # Rebuilt from the configuration on load, hence not part of the weights.
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        return _cos_sin(label, self.frequencies)


class FourierEmbedding(nn.Module):
    """Random Fourier features: label l [B] -> (cos(2 pi w_k l), sin(2 pi w_k l)) [B, channels].

    w_k ~ N(0, scale^2), drawn once and stored with the weights (Tancik et al. 2020; Song et al.
    2021, sec. G uses scale 16 on ln sigma). Labels of order 1 want a scale near 1.

    Raises:
        ValueError: ``channels`` is odd or below 4.
    """

    frequencies: Tensor

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(_half(channels)) * (2 * math.pi * scale))

    def forward(self, label: Tensor) -> Tensor:
        return _cos_sin(label, self.frequencies)


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
        features = self.features(label).to(self.linear1.weight.dtype)
        return nn.functional.silu(self.linear2(nn.functional.silu(self.linear1(features))))


def _half(channels: int) -> int:
    if channels < 4 or channels % 2:
        raise ValueError(f"channels of a time embedding must be even and >= 4, got {channels}")
    return channels // 2


def _cos_sin(label: Tensor, frequencies: Tensor) -> Tensor:
    # Labels up to 1000 lose their fraction in bf16 or fp16: the angle is always float32.
    angle = torch.outer(label.float(), frequencies.float())
    return torch.cat((angle.cos(), angle.sin()), dim=1)
