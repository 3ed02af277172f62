"""A small U-Net with time embedding that knows what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sbm_fast.nn import options
from sbm_fast.nn.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    Stage,
    Upsample,
    group_norm,
    zero,
)
from sbm_fast.nn.conv import Conv2d
from sbm_fast.nn.embedding import SCALES, time_embedding
from sbm_fast.nn.image_network import ImageNetwork


class UNet(ImageNetwork):
    """U-Net F(x, label): x [B, in_channels, H, W], label [B] -> [B, out_channels, H, W].

    A level is ``blocks_per_level`` residual blocks of ``channels * channel_mult[level]`` channels,
    at half the size of the level before. The decoder mirrors the encoder and takes the output of
    each encoder block by concatenation (Ronneberger et al. 2015; Ho et al. 2020, sec. B). The last
    convolution starts at zero: a new network returns 0.

    Args:
        in_channels: channels of x.
        out_channels: channels of F; None: as ``in_channels``.
        channels: width of the first level.
        channel_mult: width factor of each level; its length is the number of levels.
        blocks_per_level: residual blocks in a level, in the encoder and again in the decoder.
        middle_blocks: residual blocks between encoder and decoder.
        attention_levels: levels (0 is the finest) whose blocks are followed by self-attention; the
            deepest one also gets attention after each middle block but the last.
        heads: attention heads.
        embedding: "positional" or "fourier".
        embedding_scale: ``max_period`` (positional, default 10000) or ``scale`` (fourier, default
            1).
        embedding_width: width of the time embedding; None: 4 * channels.
        group_size: channels in a group of GroupNorm.
        resample_conv: resampling by a 3x3 convolution; False: by mean and repetition.
        film: the time embedding scales and shifts after norm2 instead of being added before it.
        dropout: probability, inside the residual blocks.
        predicts: "score", "eps", "x0", "v" or "edm", see `sbm_fast.parameterization`.
        time: what ``label`` is: "t", "999t", "index", "sigma", "log_sigma", "edm" or a callable.
        carried: sde, sample_shape, sigma_data, null_cond; see `Network`.

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

    SIZES: ClassVar[tuple[str, ...]] = (
        *("in_channels", "out_channels", "channels", "channel_mult", "blocks_per_level"),
        *("middle_blocks", "embedding_width"),
    )
    RULES: ClassVar[dict[str, options.Check]] = {
        "in_channels": options.positive,
        "out_channels": options.positive,
        "channels": options.positive,
        "channel_mult": options.positives,
        "blocks_per_level": options.positive,
        "middle_blocks": options.positive,
        "heads": options.positive,
        "embedding": options.one_of(*SCALES),
        "embedding_scale": options.real,
        "embedding_width": options.positive,
        "group_size": options.positive,
        "resample_conv": options.flag,
        "film": options.flag,
        "dropout": options.probability,
    }

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        *,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2),
        blocks_per_level: int = 1,
        middle_blocks: int = 1,
        attention_levels: Sequence[int] = (),
        heads: int = 1,
        embedding: str = "positional",
        embedding_scale: float | None = None,
        embedding_width: int | None = None,
        group_size: int = 8,
        resample_conv: bool = True,
        film: bool = False,
        dropout: float = 0.0,
        predicts: str = "eps",
        time: str | Callable[..., Any] = "999t",
        **carried: Any,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        if embedding_width is None:
            embedding_width = 4 * options.positive("channels", channels)
        if embedding_scale is None:
            embedding_scale = SCALES[options.choice("embedding", embedding, tuple(SCALES))]
        config = options.checked(self.RULES, locals())
        config["attention_levels"] = options.levels(attention_levels, len(config["channel_mult"]))
        super().__init__(config, predicts=predicts, time=time, **carried)
        self._build()
        self._finish()

    def _build(self) -> None:
        c = self.config
        width, emb = c["channels"], c["embedding_width"]
        widths = [width * mult for mult in c["channel_mult"]]
        norm = partial(group_norm, group_size=c["group_size"])

        def stage(inputs: int, level: int, *, attend: bool = True) -> Stage:
            block = ResidualBlock(
                inputs,
                widths[level],
                emb,
                norm=norm,
                film=c["film"],
                dropout=c["dropout"],
            )
            if not attend or level not in c["attention_levels"]:
                return Stage(block)
            attention = SelfAttention(widths[level], c["heads"], norm=norm)
            return Stage(block, attention)

        self.embed = time_embedding(c["embedding"], c["embedding_scale"], width, emb)
        self.first = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.encoder, self.middle, self.decoder = (nn.ModuleList() for _ in range(3))
        now, deepest = widths[0], len(widths) - 1
        for level, outputs in enumerate(widths):
            for _ in range(c["blocks_per_level"]):
                self.encoder.append(stage(now, level))
                now = outputs
            if level < deepest:
                self.encoder.append(Downsample(now, conv=c["resample_conv"]))
        for i in range(c["middle_blocks"]):
            self.middle.append(stage(now, deepest, attend=i + 1 < c["middle_blocks"]))
        for level in reversed(range(len(widths))):
            for _ in range(c["blocks_per_level"]):
                self.decoder.append(stage(now + widths[level], level))
                now = widths[level]
            if level > 0:
                self.decoder.append(Upsample(now, conv=c["resample_conv"]))
        self.norm = norm(now)
        self.last = zero(Conv2d(now, c["out_channels"], 3, padding=1))

    def time_part(self, label: Tensor) -> Tensor:
        return self.embed(label)

    def body(self, x: Tensor, vs: Sequence[Tensor | None], scale: Tensor | None) -> Tensor:
        """F of the image; see `Network.body`."""
        ahead = iter(vs)
        h = self.first(x)
        skips = []
        for module in self.encoder:
            if isinstance(module, Stage):
                h = module(h, next(ahead))
                skips.append(h)
            else:
                h = module(h)
        for module in self.middle:
            h = module(h, next(ahead))
        for module in self.decoder:
            if isinstance(module, Stage):
                h = module(torch.cat((h, skips.pop()), dim=1), next(ahead))
            else:
                h = module(h)
        return self.last(self.norm(h))

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config["channel_mult"]) - 1)

    @classmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        c, emb = config, config["embedding_width"]
        widths = [c["channels"] * level for level in c["channel_mult"]]
        widest, finest, deepest = (max(widths), widths[0], widths[-1]) if widths else (0, 0, 0)
        sizes = {
            f"convolutions of {widest} channels": 9 * widest**2,
            f"in_channels {c['in_channels']}": 9 * c["in_channels"] * finest,
            f"out_channels {c['out_channels']}": 9 * c["out_channels"] * finest,
            f"embedding_width {emb}": emb**2,
        }
        elements = c["blocks_per_level"] * sum(width * (9 * width + emb) for width in widths)
        elements += c["middle_blocks"] * deepest * (9 * deepest + emb)
        return len(widths) * c["blocks_per_level"] + c["middle_blocks"], elements, sizes
