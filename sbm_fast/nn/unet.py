"""A small U-Net with time embedding that knows what it predicts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sbm_fast.nn import checkpoint
from sbm_fast.nn.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    Stage,
    Upsample,
    group_norm,
    zero,
)
from sbm_fast.nn.embedding import FourierEmbedding, PositionalEmbedding, TimeEmbedding

if TYPE_CHECKING:
    from sbm_fast.sde import SDE

PREDICTIONS = ("score", "eps", "x0", "v", "edm")
TIMES = ("t", "999t", "index", "sigma", "log_sigma", "edm")


class UNet(nn.Module):
    """U-Net F(x, label): x [B, in_channels, H, W], label [B] -> [B, out_channels, H, W].

    A level is ``blocks_per_level`` residual blocks of ``channels * channel_mult[level]`` channels,
    at half the size of the level before. The decoder mirrors the encoder and takes the output of
    each encoder block by concatenation (Ronneberger et al. 2015; Ho et al. 2020, sec. B). The last
    convolution starts at zero: a new network returns 0.

    The module carries ``predicts``, ``time``, ``sde``, ``sample_shape`` and ``sigma_data``, which
    is what `sbm_fast.as_score_model` asks of a network: ``sbm_fast.sample(unet, sde)`` needs no
    wrapper.

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
        sde: the SDE that the network is trained under; None: the one it is run under.
        sample_shape: shape of one sample without the batch, for ``sample(shape=None)``.
        sigma_data: standard deviation of the data (only "edm" uses it).

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

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
        sde: SDE | None = None,
        sample_shape: Sequence[int] | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": _positive("in_channels", in_channels),
            "out_channels": _positive(
                "out_channels", in_channels if out_channels is None else out_channels
            ),
            "channels": _positive("channels", channels),
            "channel_mult": _positives("channel_mult", channel_mult),
            "blocks_per_level": _positive("blocks_per_level", blocks_per_level),
            "middle_blocks": _positive("middle_blocks", middle_blocks),
            "attention_levels": _levels(attention_levels, len(channel_mult)),
            "heads": _positive("heads", heads),
            "embedding": _choice("embedding", embedding, ("positional", "fourier")),
            "embedding_scale": _real(
                "embedding_scale",
                _SCALES[embedding] if embedding_scale is None else embedding_scale,
            ),
            "embedding_width": _positive(
                "embedding_width", 4 * channels if embedding_width is None else embedding_width
            ),
            "group_size": _positive("group_size", group_size),
            "resample_conv": _flag("resample_conv", resample_conv),
            "film": _flag("film", film),
            "dropout": _probability("dropout", dropout),
        }
        self.predicts = _choice("predicts", predicts, PREDICTIONS)
        self.time = time if callable(time) else _choice("time", time, TIMES)
        self.sde = sde
        self.sample_shape = None if sample_shape is None else _shape(sample_shape, in_channels)
        self.sigma_data = _real("sigma_data", sigma_data)
        self.metadata: dict[str, Any] = {}
        self._build()
        # oneDNN and cuDNN run these convolutions up to three times as fast on NHWC; the weights'
        # layout decides, so x may come in either.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _build(self) -> None:
        c = self.config
        width, emb = c["channels"], c["embedding_width"]
        widths = [width * mult for mult in c["channel_mult"]]

        def stage(inputs: int, level: int, *, attend: bool = True) -> Stage:
            block = ResidualBlock(
                inputs,
                widths[level],
                emb,
                group_size=c["group_size"],
                film=c["film"],
                dropout=c["dropout"],
            )
            if not attend or level not in c["attention_levels"]:
                return Stage(block)
            attention = SelfAttention(widths[level], c["heads"], group_size=c["group_size"])
            return Stage(block, attention)

        even = max(4, width + width % 2)
        features = PositionalEmbedding if c["embedding"] == "positional" else FourierEmbedding
        self.embed = TimeEmbedding(features(even, c["embedding_scale"]), even, emb)
        self.first = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
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
        self.norm = group_norm(now, c["group_size"])
        self.last = zero(nn.Conv2d(now, c["out_channels"], 3, padding=1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """F(x, label); x [B, in_channels, H, W] with H, W divisible by 2^(levels-1), label [B].

        Raises:
            ValueError: x or label has another shape.
        """
        self._check(x, label)
        emb = self.embed(label)
        h = self.first(x)
        skips = []
        for module in self.encoder:
            if isinstance(module, Stage):
                h = module(h, emb)
                skips.append(h)
            else:
                h = module(h)
        for module in self.middle:
            h = module(h, emb)
        for module in self.decoder:
            if isinstance(module, Stage):
                h = module(torch.cat((h, skips.pop()), dim=1), emb)
            else:
                h = module(h)
        return self.last(nn.functional.silu(self.norm(h)))

    def _check(self, x: Tensor, label: Tensor) -> None:
        channels = self.config["in_channels"]
        factor = 2 ** (len(self.config["channel_mult"]) - 1)
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must be [B, {channels}, H, W] with H and W divisible by {factor}, "
                f"got {list(x.shape)}"
            )
        if label.shape != x.shape[:1]:
            raise ValueError(f"label must be [{x.shape[0]}] as the batch, got {list(label.shape)}")

    def num_parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write weights, configuration and ``metadata`` (JSON values) to a safetensors file.

        ``dtype`` (float32, float16, bfloat16) is the storage type, None: as they are. The file
        appears whole or not at all.

        Raises:
            TypeError: ``time`` is a callable or the SDE is of an unknown class.
        """
        checkpoint.save(self, path, dtype=dtype, metadata=metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = torch.float32
    ) -> UNet:
        """Read what `save` wrote; nothing from the file is executed.

        ``dtype`` is the type of the weights, None: as stored. ``metadata`` of the result holds
        what was given to `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, is cut off, was written by something else, or its
                configuration does not fit its weights; the message names the file and the problem.
        """
        return checkpoint.load(cls, path, dtype=dtype)


_SCALES = {"positional": 10_000.0, "fourier": 1.0}


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


def _positives(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(f"{name} must be a non-empty list or tuple of ints, got {values!r}")
    return tuple(_positive(name, value) for value in values)


def _levels(levels: Any, count: int) -> tuple[int, ...]:
    if not isinstance(levels, (list, tuple)):
        raise TypeError(f"attention_levels must be a list or tuple of ints, got {levels!r}")
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < count:
            raise ValueError(f"attention_levels must lie in 0..{count - 1}, got {level!r}")
    return tuple(sorted(set(levels)))


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _probability(name: str, value: Any) -> float:
    return 0.0 if value == 0 else _below_one(name, _real(name, value))


def _below_one(name: str, value: float) -> float:
    if value >= 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return value


def _shape(shape: Any, channels: int) -> tuple[int, ...]:
    sizes = _positives("sample_shape", tuple(shape))
    if len(sizes) != 3 or sizes[0] != channels:
        raise ValueError(f"sample_shape must be ({channels}, H, W), got {sizes}")
    return sizes
