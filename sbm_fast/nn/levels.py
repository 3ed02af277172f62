"""`LevelNetwork`: the U-Net of score_sde and EDM, of which NCSN++, DDPM++, DDPM and ADM are cases.

Encoder and decoder of Ho et al. 2020, sec. B: each level has its residual blocks; the encoder's
outputs, those of the resampling too, go to the decoder by concatenation, whose levels have one
block more. Beside it, an image pyramid may join at each level (Song et al. 2021, app. H, fig. 7):

    input skip:       a' = ↓a,           h' = h + W a'  (or [W a', h])     a = x at first
    input residual:   h' = a' = gain · (h + conv ↓a)
    output skip:      o' = ↑o + conv SiLU(norm(h))                         F = o at last
    output residual:  h' = o' = gain · (h + conv ↑o)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sbm_fast.nn import options, resample
from sbm_fast.nn.blocks import (
    Downsample,
    MakeNorm,
    ResidualBlock,
    SelfAttention,
    Stage,
    Upsample,
    zero,
)
from sbm_fast.nn.conv import Conv2d
from sbm_fast.nn.image_network import ImageNetwork


@dataclass(frozen=True)
class Design:
    """What sets one family of networks apart.

    Attributes:
        norm: makes every normalisation.
        block: (in_channels, out_channels, resampling=None) -> residual block.
        attention: channels -> self-attention.
        attention_gain: scale of the initial qkv weights.
        first: channels of the first convolution.
        kernel, gain: filter and skip scale of the pyramids.
        conv_resampling: levels are joined by `Downsample` and `Upsample`, with (True) or without
            (False) their convolutions; None: by residual blocks.
        every: attention after every block of a decoder level, not only after the last.
        input, combine, output: the pyramids.
        smooth: whether "residual" input filters before its convolutions; None: unless by (1, 1).
    """

    norm: MakeNorm
    block: Callable[..., ResidualBlock]
    attention: Callable[[int], SelfAttention]
    first: int
    attention_gain: float = 1.0
    kernel: Sequence[float] = resample.BOX
    gain: float = 1.0
    conv_resampling: bool | None = None
    every: bool = False
    input: str = "none"
    combine: str = "sum"
    output: str = "none"
    smooth: bool | None = None


class InputSkip(nn.Module):
    """a' = ↓a; h' = h + W a', or [W a', h] with ``cat``."""

    def __init__(self, image: int, channels: int, kernel: Sequence[float], *, cat: bool) -> None:
        super().__init__()
        self.filter = resample.Down(kernel)
        self.conv = Conv2d(image, channels, 1)
        self.cat = cat

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """(h', a') of h and a."""
        pyramid = self.filter(pyramid)
        if self.cat:
            return torch.cat((self.conv(pyramid), h), dim=1), pyramid
        return self.conv(pyramid, plus=h), pyramid


class InputResidual(nn.Module):
    """h' = a' = gain · (h + conv ↓a)."""

    def __init__(
        self,
        image: int,
        channels: int,
        kernel: Sequence[float],
        gain: float,
        *,
        smooth: bool | None,
    ) -> None:
        super().__init__()
        self.down = Downsample(image, channels, conv=True, kernel=kernel, smooth=smooth, far=True)
        self.gain = gain

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """(h', a') of h and a."""
        h = self.down(pyramid, gain=self.gain, plus=h)
        return h, h


class Head(nn.Module):
    """conv SiLU(norm(h)), and ↑o added to it: the output, or the pyramid's part of one level."""

    def __init__(
        self, channels: int, outputs: int, norm: MakeNorm, kernel: Sequence[float] = resample.BOX
    ) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.conv = Conv2d(channels, outputs, 3, padding=1)
        self.filter = resample.Up(kernel)

    def forward(self, h: Tensor, pyramid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(h, o') of h and o."""
        plus = None if pyramid is None else self.filter(pyramid)
        return h, self.conv(self.norm(h), plus=plus)


class OutputResidual(nn.Module):
    """h' = o' = gain · (h + conv ↑o)."""

    def __init__(self, pyramid: int, channels: int, kernel: Sequence[float], gain: float) -> None:
        super().__init__()
        self.up = Upsample(pyramid, channels, conv=True, kernel=kernel)
        self.gain = gain

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """(h', o') of h and o."""
        h = self.up(pyramid, gain=self.gain, plus=h)
        return h, h


class Level(nn.Module):
    """One resolution: ``stages``, then ``head`` (decoder), ``resample``, ``join`` (encoder)."""

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self.stages: Any = nn.ModuleList(stages)
        self.head: nn.Module | None = None
        self.resample: nn.Module | None = None
        self.join: nn.Module | None = None

    def resampled(self, h: Tensor, vs: Iterator[Tensor | None]) -> Tensor:
        if isinstance(self.resample, ResidualBlock):
            return self.resample(h, next(vs))
        return h if self.resample is None else self.resample(h)


class LevelNetwork(ImageNetwork):
    """The U-Net of this module; subclasses give the embedding and a `Design`.

    ``config`` holds ``image_size``, ``in_channels``, ``out_channels``, ``channels``,
    ``channel_mult``, ``num_blocks`` and ``attention_resolutions``.
    """

    SIZES: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "channels",
        "channel_mult",
        "num_blocks",
    )
    RULES: ClassVar[dict[str, options.Check]] = {
        "image_size": options.positive,
        "in_channels": options.positive,
        "out_channels": options.positive,
        "channels": options.positive,
        "channel_mult": options.positives,
        "num_blocks": options.positive,
        "attention_resolutions": options.resolutions,
        "dropout": options.probability,
    }
    """The checks of a constructor's arguments; subclasses add theirs."""
    embed: nn.Module

    @classmethod
    def _checked(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` of a constructor's arguments: those that `RULES` name."""
        outputs = given["out_channels"]
        outputs = given["in_channels"] if outputs is None else outputs
        return options.checked(cls.RULES, {**given, "out_channels": outputs})

    def _build(self, design: Design) -> None:
        c = self.config
        sizes = [c["image_size"] >> level for level in range(len(c["channel_mult"]))]
        self._attends = [size in c["attention_resolutions"] for size in sizes]
        self._widths = [c["channels"] * mult for mult in c["channel_mult"]]
        self._design = design
        self.first = Conv2d(c["in_channels"], design.first, 3, padding=1)
        # The order of registration is that of use, here and in each level: `blocks` and the
        # published lists of weights go by it.
        self.encoder = nn.ModuleList()
        skips = self._build_encoder()
        now = skips[-1]
        first = Stage(design.block(now, now), design.attention(now))
        self.middle = nn.ModuleList([first, Stage(design.block(now, now))])
        self.decoder = nn.ModuleList()
        now = self._build_decoder(now, skips)
        if design.output != "skip":
            self.last = Head(now, c["out_channels"], design.norm)
        self._initialise()
        self._finish()

    def _build_encoder(self) -> list[int]:
        """Fill ``encoder``; the channels of all skips."""
        design, now, image = self._design, self._design.first, self.config["in_channels"]
        skips = [now]
        for level, width in enumerate(self._widths):
            stages = []
            for _ in range(self.config["num_blocks"]):
                stages.append(self._stage(now, level, attend=True))
                now = width
                skips.append(now)
            made = Level(stages)
            if level + 1 < len(self._widths):
                made.resample = (
                    design.block(now, now, resampling="down")
                    if design.conv_resampling is None
                    else Downsample(
                        now, conv=design.conv_resampling, kernel=design.kernel, far=True
                    )
                )
                if design.input == "skip":
                    cat = design.combine == "cat"
                    made.join = InputSkip(image, now, design.kernel, cat=cat)
                    now = 2 * now if cat else now
                elif design.input == "residual":
                    made.join = InputResidual(
                        image, now, design.kernel, design.gain, smooth=design.smooth
                    )
                    image = now
                skips.append(now)
            self.encoder.append(made)
        return skips

    def _build_decoder(self, now: int, skips: list[int]) -> int:
        """Fill ``decoder``; the channels of its output."""
        design, outputs = self._design, self.config["out_channels"]
        deepest = len(self._widths) - 1
        pyramid = 0
        for level in reversed(range(deepest + 1)):
            stages = []
            for i in range(self.config["num_blocks"] + 1):
                attend = design.every or i == self.config["num_blocks"]
                stages.append(self._stage(now + skips.pop(), level, attend=attend))
                now = self._widths[level]
            made = Level(stages)
            if design.output == "skip":
                made.head = Head(now, outputs, design.norm, design.kernel)
            elif design.output == "residual" and level == deepest:
                made.head = Head(now, now, design.norm)
            elif design.output == "residual":
                made.head = OutputResidual(pyramid, now, design.kernel, design.gain)
            pyramid = now
            if level > 0:
                made.resample = (
                    design.block(now, now, resampling="up")
                    if design.conv_resampling is None
                    else Upsample(now, conv=design.conv_resampling, kernel=design.kernel)
                )
            self.decoder.append(made)
        return now

    def _stage(self, inputs: int, level: int, *, attend: bool) -> Stage:
        width = self._widths[level]
        attention = self._design.attention(width) if attend and self._attends[level] else None
        return Stage(self._design.block(inputs, width), attention)

    def _initialise(self) -> None:
        """Uniform with variance 2/(fan in + fan out), biases 0; outputs of branches stay zero."""
        zeros = {id(m.conv2) for m in self.modules() if isinstance(m, ResidualBlock)}
        zeros |= {id(m.out) for m in self.modules() if isinstance(m, SelfAttention)}
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) not in zeros:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                nn.init.xavier_uniform_(module.qkv.weight, gain=self._design.attention_gain)
        for head in self.modules():
            if isinstance(head, Head) and head.conv.out_channels == self.config["out_channels"]:
                zero(head.conv)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config["channel_mult"]) - 1)

    @classmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        channels, levels, blocks = (
            config[name] for name in ("channels", "channel_mult", "num_blocks")
        )
        widths = [channels * level for level in levels]
        widest, finest = (max(widths), widths[0]) if widths else (0, 0)
        sizes = {
            f"convolutions of {widest} channels": 9 * widest**2,
            f"in_channels {config['in_channels']}": 9 * config["in_channels"] * channels,
            f"out_channels {config['out_channels']}": 9 * config["out_channels"] * finest,
        }
        return len(widths) * blocks, blocks * sum(9 * width**2 for width in widths), sizes

    def body(self, x: Tensor, vs: Sequence[Tensor | None], scale: Tensor | None) -> Tensor:
        """F of the image; see `Network.body`."""
        ahead = iter(vs)
        pyramid: Tensor | None = x
        h = self.first(x)
        skips = [h]
        for level in cast("list[Level]", self.encoder):
            for stage in level.stages:
                h = stage(h, next(ahead))
                skips.append(h)
            if level.resample is not None:
                h = level.resampled(h, ahead)
                if level.join is not None:
                    h, pyramid = level.join(h, pyramid)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, next(ahead))
        pyramid = None
        for level in cast("list[Level]", self.decoder):
            for stage in level.stages:
                h = stage(torch.cat((h, skips.pop()), dim=1), next(ahead))
            if level.head is not None:
                h, pyramid = level.head(h, pyramid)
            h = level.resampled(h, ahead)
        if self._design.output != "skip":
            pyramid = self.last(h)[1]
        assert pyramid is not None
        return pyramid if scale is None else pyramid / scale.to(pyramid.dtype)[:, None, None, None]
