"""Building blocks of the U-Nets: normalisation, residual block, attention, resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sbm_fast.nn import resample
from sbm_fast.nn.conv import Conv2d
from sbm_fast.nn.norm import GroupNormSiLU

MakeNorm = Callable[..., GroupNormSiLU]
"""(channels, activation="silu") -> their normalisation: a family's rule for groups and eps."""


class Block(nn.Module):
    """What a network gives a vector v of time: ``time`` projects it from the embedding."""

    time: nn.Linear | None


class ResidualBlock(Block):
    """Residual block with GroupNorm and SiLU, and the time added (or as FiLM).

        h = conv1(R SiLU(norm1(x)))
        h = SiLU(norm2(h + v))                       added (Ho et al. 2020)
        h = SiLU(norm2(h) (1 + v_scale) + v_shift)   FiLM (Dhariwal & Nichol 2021, AdaGN)
        y = gain · (skip(R x) + conv2(dropout(h)))

    x [B, in_channels, H, W], v = time(emb) -> [B, out_channels, H', W']. R resamples by two (BigGAN
    block, Brock et al. 2019; Song et al. 2021, app. H) or is the identity. A network makes the v of
    all its blocks; v is None where there is no time. conv2 starts at zero: a new block is its skip.

    Args:
        in_channels, out_channels: channels of x and y.
        emb_channels: width of the embedding that v is projected from; None: no time.
        norm: makes the normalisations.
        film: v is (scale, shift), twice the channels.
        resampling: "up", "down" or None.
        kernel: filter of R, see `sbm_fast.nn.resample`.
        skip: "auto": a 1x1 convolution where the channels change; "project": also where R is
            not the identity; "3x3": a 3x3 convolution where the channels change.
        gain: 1/√2 keeps the variance (Song et al. 2021, app. H: skip rescaling).
        dropout: probability, before conv2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int | None,
        *,
        norm: MakeNorm,
        film: bool = False,
        resampling: str | None = None,
        kernel: Sequence[float] = resample.BOX,
        skip: str = "auto",
        gain: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.film, self.gain = film, gain
        self.norm1 = norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        width = 2 * out_channels if film else out_channels
        self.time = None if emb_channels is None else nn.Linear(emb_channels, width)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(Conv2d(out_channels, out_channels, 3, padding=1))
        make = {None: nn.Identity, "up": resample.Up, "down": resample.Down}[resampling]
        self.resample = make(kernel)
        self.skip: nn.Module = nn.Identity()
        self.project = skip == "project"
        if in_channels != out_channels or (self.project and resampling is not None):
            size = 3 if skip == "3x3" else 1
            self.skip = Conv2d(in_channels, out_channels, size, padding=size // 2)
        # A 1x1 convolution and repetition commute: a quarter of the products.
        up = isinstance(self.resample, resample.Up) and self.resample.box
        self.skip_first = up and skip != "3x3"

    def forward(self, x: Tensor, v: Tensor | None) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x)))
        if self.film and v is not None:
            scale, shift = v.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, add=v)
        skip = self.resample(self.skip(x)) if self.skip_first else self.skip(self.resample(x))
        return self.conv2(self.dropout(h), gain=self.gain, plus=skip)


class SelfAttention(nn.Module):
    """gain · (x + W softmax(q kᵀ/√d) v) over the positions of the image (Ho et al. 2020, sec. B).

    [B, C, H, W] -> [B, C, H, W]; ``heads`` divides C, d = C/heads; qkv gives the channels (q, k, v)
    of all heads one after the other. The output projection W starts at zero.

    Raises:
        ValueError: ``heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, heads: int, *, norm: MakeNorm, gain: float = 1.0) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must be >= 1 and divide {channels} channels, got {heads}")
        self.heads, self.gain = heads, gain
        self.norm = norm(channels, activation=None)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = zero(Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x))
        # Positions before channels: a view of NHWC memory.
        rows = qkv.permute(0, 2, 3, 1).reshape(
            batch, height * width, 3, self.heads, channels // self.heads
        )
        q, k, v = rows.transpose(1, 3).unbind(2)
        h = attend(q, k, v).transpose(1, 2)
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return self.out(h, gain=self.gain, plus=x)


class Stage(nn.Module):
    """A residual block, followed by self-attention where there is one."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = nn.Identity() if attention is None else attention

    def forward(self, x: Tensor, v: Tensor | None) -> Tensor:
        return self.attention(self.block(x, v))


class Downsample(nn.Module):
    """Halve both sides: [B, C, H, W] -> [B, out_channels, H/2, W/2].

    Without parameters by the filter (``conv=False``), or by a 3x3 convolution of stride 2: after
    the filter (``smooth=True``; None: unless that is (1, 1)), or alone, with a border of zeros
    around the image or at its far ends only (``far=True``: Ho et al. 2020, "SAME" of TensorFlow).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        conv: bool,
        kernel: Sequence[float] = resample.BOX,
        smooth: bool | None = None,
        far: bool = False,
    ) -> None:
        super().__init__()
        self.filter = resample.Down(kernel)
        self.smooth = conv and (not self.filter.box if smooth is None else smooth)
        self.far = far and not self.smooth
        padding = 0 if self.far or self.smooth else 1
        outputs = channels if out_channels is None else out_channels
        self.conv = Conv2d(channels, outputs, 3, 2, padding) if conv else None

    def forward(self, x: Tensor, *, gain: float = 1.0, plus: Tensor | None = None) -> Tensor:
        """gain · (y + plus); without a convolution, y."""
        if self.conv is None:
            return self.filter(x)
        if self.smooth:
            x = self.filter.smooth(x)
        elif self.far:
            x = nn.functional.pad(x, (0, 1, 0, 1))
        return self.conv(x, gain=gain, plus=plus)


class Upsample(nn.Module):
    """Double both sides: [B, C, H, W] -> [B, out_channels, 2H, 2W].

    By the filter, then a 3x3 convolution unless ``conv=False``. A filter longer than (1, 1) reaches
    beyond the image; the convolution reads that and not zeros, as score_sde pads once, before both.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        conv: bool,
        kernel: Sequence[float] = resample.BOX,
    ) -> None:
        super().__init__()
        self.filter = resample.Up(kernel)
        self.border = 1 if conv and not self.filter.box else 0
        outputs = channels if out_channels is None else out_channels
        self.conv = Conv2d(channels, outputs, 3, padding=1 - self.border) if conv else None

    def forward(self, x: Tensor, *, gain: float = 1.0, plus: Tensor | None = None) -> Tensor:
        """gain · (y + plus); without a convolution, y."""
        x = self.filter(x, self.border)
        return x if self.conv is None else self.conv(x, gain=gain, plus=plus)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v over [B, heads, positions, d].

    torch's fused kernels have no forward-mode derivative; inside of one (and of torch.func's
    transforms, which may be one) the formula is made of its parts.
    """
    if torch.compiler.is_compiling() or not _transformed():
        return nn.functional.scaled_dot_product_attention(q, k, v)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return weights @ v


def _transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def group_norm(channels: int, group_size: int, activation: str | None = "silu") -> GroupNormSiLU:
    """Groups of about ``group_size`` channels; their number divides ``channels``."""
    groups = math.gcd(channels, max(1, channels // group_size))
    return GroupNormSiLU(groups, channels, activation=activation)


def capped_norm(channels: int, eps: float, activation: str | None = "silu") -> GroupNormSiLU:
    """Up to 32 groups of four channels or more (Song et al. 2021; Karras et al. 2022)."""
    return GroupNormSiLU(max(1, min(channels // 4, 32)), channels, eps, activation=activation)


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Set weight and bias to zero, so that a residual branch or a network starts at zero."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
