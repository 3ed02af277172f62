"""DDPM++ for CIFAR-10 in plain PyTorch, as users of score_sde run it: the timings' other side.

The architecture of Song et al. 2021, App. H (BigGAN blocks, naive resampling, attention at 16²,
skip connections scaled by 1/√2), one call an operation, NCHW. Parameters stand in the order of the
published checkpoints, so the weights of the library's network go over by position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, MULTIPLIERS, BLOCKS, SIDE, ATTENTION = 128, (1, 2, 2, 2), 4, 32, 16


class EagerDDPMpp(nn.Module):
    """F(x, label): x [B, 3, 32, 32], label [B] of order 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.embedding2 = nn.Linear(4 * WIDTH, 4 * WIDTH)
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.encoder, self.middle, self.decoder = (nn.ModuleList() for _ in range(3))
        now, skips, deepest = WIDTH, [WIDTH], len(MULTIPLIERS) - 1
        for level, multiplier in enumerate(MULTIPLIERS):
            for _ in range(BLOCKS):
                self.encoder.append(Block(now, multiplier * WIDTH))
                now = multiplier * WIDTH
                if SIDE >> level == ATTENTION:
                    self.encoder.append(Attention(now))
                skips.append(now)
            if level < deepest:
                self.encoder.append(Block(now, now, "down"))
                skips.append(now)
        self.middle.extend([Block(now, now), Attention(now), Block(now, now)])
        for level in range(deepest, -1, -1):
            for _ in range(BLOCKS + 1):
                self.decoder.append(Block(now + skips.pop(), MULTIPLIERS[level] * WIDTH))
                now = MULTIPLIERS[level] * WIDTH
            if SIDE >> level == ATTENTION:
                self.decoder.append(Attention(now))
            if level > 0:
                self.decoder.append(Block(now, now, "up"))
        self.norm = norm(now)
        self.last = nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        half = WIDTH // 2
        dtype = self.first.weight.dtype
        w = torch.exp(torch.arange(half, dtype=dtype) * (-math.log(10000) / (half - 1)))
        angle = label.to(dtype)[:, None] * w[None, :]
        embedding = self.embedding1(torch.cat((torch.sin(angle), torch.cos(angle)), dim=1))
        embedding = self.embedding2(functional.silu(embedding))
        h = self.first(x)
        skips = [h]
        for part in self.encoder:
            if isinstance(part, Attention):
                h = skips[-1] = part(h)
            else:
                h = part(h, embedding)
                skips.append(h)
        for part in self.middle:
            h = part(h) if isinstance(part, Attention) else part(h, embedding)
        for part in self.decoder:
            if isinstance(part, Attention):
                h = part(h)
                continue
            if not part.resample:
                h = torch.cat((h, skips.pop()), dim=1)
            h = part(h, embedding)
        return self.last(functional.silu(self.norm(h)))


class Block(nn.Module):
    """The residual block of BigGAN (Brock et al. 2019) with a time embedding."""

    def __init__(self, inputs: int, outputs: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(4 * WIDTH, outputs)
        self.norm2 = norm(outputs)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or resample else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = functional.silu(self.norm1(x))
        if self.resample == "up":
            h, x = (functional.interpolate(v, scale_factor=2.0, mode="nearest") for v in (h, x))
        elif self.resample == "down":
            h, x = (functional.avg_pool2d(v, 2) for v in (h, x))
        h = self.conv1(h)
        h += self.time(functional.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        if self.skip is not None:
            x = self.skip(x)
        return (x + h) / math.sqrt(2)


class Attention(nn.Module):
    """Self-attention of one head over the pixels; projections [in, out]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (Projection(channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        w = torch.einsum("bchw,bcij->bhwij", q, k) * channels**-0.5
        w = functional.softmax(w.reshape(batch, height, width, height * width), dim=-1)
        w = w.reshape(batch, height, width, height, width)
        h = self.out(torch.einsum("bhwij,bcij->bchw", w, v))
        return (x + h) / math.sqrt(2)


class Projection(nn.Module):
    """A 1×1 convolution as a matrix product."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels) / math.sqrt(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bhwc,cd->bhwd", x.permute(0, 2, 3, 1), self.weight) + self.bias
        return h.permute(0, 3, 1, 2)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)
