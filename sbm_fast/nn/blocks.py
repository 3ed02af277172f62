"""Building blocks of the U-Net: residual block, attention, resampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """GroupNorm + SiLU residual block with the time embedding added (or as FiLM).

        h = conv1(SiLU(norm1(x))) ;  v = linear(emb)
        h = SiLU(norm2(h + v))                       added (Ho et al. 2020)
        h = SiLU(norm2(h) (1 + v_scale) + v_shift)   FiLM (Dhariwal & Nichol 2021, AdaGN)
        y = skip(x) + conv2(dropout(h))

    x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H, W]. ``skip`` is the
    identity or a 1x1 convolution; conv2 starts at zero: a new block is its ``skip``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        group_size: int,
        film: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.film = film
        self.norm1 = group_norm(in_channels, group_size)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(emb_channels, 2 * out_channels if film else out_channels)
        self.norm2 = group_norm(out_channels, group_size)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        v = self.time(emb)[:, :, None, None]
        if self.film:
            scale, shift = v.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + v)
        return self.skip(x) + self.conv2(self.dropout(nn.functional.silu(h)))


class SelfAttention(nn.Module):
    """x + W softmax(q k^T / sqrt(d)) v over the positions of the image (Ho et al. 2020, sec. B).

    [B, C, H, W] -> [B, C, H, W]; ``heads`` divides C; the output projection W starts at zero.

    Raises:
        ValueError: ``heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, heads: int, *, group_size: int) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must be >= 1 and divide {channels} channels, got {heads}")
        self.heads = heads
        self.norm = group_norm(channels, group_size)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(batch, channels, height, width))


class Stage(nn.Module):
    """A residual block, followed by self-attention where there is one."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = nn.Identity() if attention is None else attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


class Downsample(nn.Module):
    """Halve both sides: [B, C, H, W] -> [B, C, H/2, W/2].

    By a 3x3 convolution of stride 2, or without parameters by the mean of 2x2 pixels.
    """

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """Nearest doubling, then a 3x3 convolution unless ``conv=False``: -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


def group_norm(channels: int, group_size: int) -> nn.GroupNorm:
    """GroupNorm with groups of about ``group_size`` channels; their number divides ``channels``."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // group_size)), channels, eps=1e-5)


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Set weight and bias to zero, so that a residual branch or a network starts at zero."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
