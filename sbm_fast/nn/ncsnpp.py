"""The networks of score_sde: `NCSNpp` (NCSN++ and DDPM++) and `DDPM` (Song et al. 2021, app. H)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sbm_fast.nn import options, resample, score_sde_weights
from sbm_fast.nn.blocks import ResidualBlock, SelfAttention, capped_norm
from sbm_fast.nn.embedding import PositionalEmbedding, TimeEmbedding, TurnsEmbedding
from sbm_fast.nn.levels import Design, LevelNetwork
from sbm_fast.nn.norm import GroupNormSiLU
from sbm_fast.nn.peer_weights import PeerTensor

EPS = 1e-6
_ATTENTION_GAIN = math.sqrt(0.1)


class ScoreSDENetwork(LevelNetwork):
    """What `NCSNpp` and `DDPM` share: labels, the range of the data, and the published weights.

    x is data in [0, 1] and brought to [−1, 1] (``centered=False``), or in [−1, 1] already. With
    ``scale_by_sigma`` the output is divided by σ: the label itself for Fourier features, otherwise
    that of level ``label`` of a geometric ladder of ``num_scales`` levels from ``sigma_max`` down
    to ``sigma_min``.

    score_sde numbers such a ladder from the largest σ down, `NCSNLadder` from the smallest up.
    ``ascending_labels`` says that labels count as the latter does (``time="index"``), and are
    turned round here.
    """

    RULES: ClassVar[dict[str, options.Check]] = {
        **LevelNetwork.RULES,
        "conditional": options.flag,
        "resample_conv": options.flag,
        "scale_by_sigma": options.flag,
        "centered": options.flag,
        "sigma_min": options.real,
        "sigma_max": options.real,
        "num_scales": options.positive,
        "ascending_labels": options.flag,
        "nonlinearity": options.one_of("swish"),
    }

    def _embed(self, fourier_scale: float | None) -> nn.Module:
        """Features of the label, and the MLP behind them where the network is conditional."""
        channels = self.config["channels"]
        features: nn.Module
        if fourier_scale is None:
            features = PositionalEmbedding(channels, order="sin_cos")
        else:
            channels *= 2
            features = TurnsEmbedding(channels, fourier_scale)
        if not self.config["conditional"]:
            return features
        return TimeEmbedding(features, channels, 4 * self.config["channels"])

    def _level(self, label: Tensor) -> Tensor:
        """``label`` as score_sde counts."""
        return self.config["num_scales"] - 1 - label if self.config["ascending_labels"] else label

    def time_part(self, label: Tensor) -> Tensor:
        return self.embed(self._level(label))

    def output_scale(self, label: Tensor) -> Tensor | None:
        c = self.config
        if not c["scale_by_sigma"]:
            return None
        low, high = math.log(c["sigma_min"]), math.log(c["sigma_max"])
        step = (low - high) / max(c["num_scales"] - 1, 1)
        return torch.exp(high + step * self._level(label).to(_wide(label)))

    def body(self, x: Tensor, vs: Sequence[Tensor | None], scale: Tensor | None) -> Tensor:
        return super().body(x if self.config["centered"] else 2 * x - 1, vs, scale)

    def peer_tensors(self) -> list[PeerTensor]:
        """As ``all_modules`` of score_sde."""
        return score_sde_weights.tensors(self, emb=4 * self.config["channels"])


class NCSNpp(ScoreSDENetwork):
    """NCSN++ and DDPM++ (Song et al. 2021, app. H), as ``models/ncsnpp.py`` of score_sde.

    Args:
        image_size: height and width that the levels of attention are counted from.
        in_channels, out_channels: channels of x and F; None: as in_channels.
        channels: width of the first level (nf).
        channel_mult: width factor of each level (ch_mult).
        num_blocks: residual blocks of a level (num_res_blocks); the decoder has one more.
        attention_resolutions: image sizes at which blocks are followed by self-attention.
        embedding: "fourier" (of ln label) or "positional".
        fourier_scale: standard deviation of the Fourier frequencies, in turns.
        conditional: whether blocks get the time at all.
        resblock: "biggan" (resampling inside of blocks) or "ddpm" (layers between levels).
        fir, fir_kernel: resampling by that filter instead of repetition and mean.
        resample_conv: with "ddpm", a convolution at each resampling.
        skip_rescale: sums are divided by √2.
        progressive: "none", "output_skip" or "residual"; see `sbm_fast.nn.levels`.
        progressive_input: "none", "input_skip" or "residual".
        progressive_combine: "sum" or "cat", for "input_skip".
        scale_by_sigma, centered, sigma_min, sigma_max, num_scales, ascending_labels: see
            `ScoreSDENetwork`.
        nonlinearity: "swish", the only one.
        dropout: probability, inside of blocks.
        carried: predicts, time, sde, sample_shape, sigma_data, null_cond; see `Network`.

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

    RULES: ClassVar[dict[str, options.Check]] = {
        **ScoreSDENetwork.RULES,
        "embedding": options.one_of("fourier", "positional"),
        "fourier_scale": options.real,
        "resblock": options.one_of("biggan", "ddpm"),
        "fir": options.flag,
        "fir_kernel": options.fir,
        "skip_rescale": options.flag,
        "progressive_input": options.one_of("none", "input_skip", "residual"),
        "progressive": options.one_of("none", "output_skip", "residual"),
        "progressive_combine": options.one_of("sum", "cat"),
    }

    def __init__(
        self,
        *,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        embedding: str = "positional",
        fourier_scale: float = 16.0,
        conditional: bool = True,
        resblock: str = "biggan",
        fir: bool = False,
        fir_kernel: Sequence[float] = (1, 3, 3, 1),
        resample_conv: bool = True,
        skip_rescale: bool = True,
        progressive: str = "none",
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        scale_by_sigma: bool = False,
        centered: bool = True,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 1000,
        ascending_labels: bool = False,
        nonlinearity: str = "swish",
        dropout: float = 0.1,
        predicts: str = "eps",
        time: str | Callable[..., Any] = "999t",
        **carried: Any,
    ) -> None:
        config = self._checked(locals())
        if embedding == "fourier" and ascending_labels:
            raise ValueError("ascending_labels must be False with embedding 'fourier' (σ)")
        super().__init__(config, predicts=predicts, time=time, **carried)
        fourier = embedding == "fourier"
        self.embed = self._embed(fourier_scale if fourier else None)
        kernel = tuple(fir_kernel) if fir else resample.BOX
        gain = math.sqrt(0.5) if skip_rescale else 1.0
        norm = partial(capped_norm, eps=EPS)
        biggan = resblock == "biggan"
        self._build(
            Design(
                norm=norm,
                block=partial(
                    ResidualBlock,
                    emb_channels=4 * channels if conditional else None,
                    norm=norm,
                    kernel=kernel,
                    skip="project" if biggan else "auto",
                    gain=gain,
                    dropout=dropout,
                ),
                attention=partial(SelfAttention, heads=1, norm=norm, gain=gain),
                first=channels,
                attention_gain=_ATTENTION_GAIN,
                kernel=kernel,
                gain=gain,
                conv_resampling=None if biggan else resample_conv,
                input=progressive_input.removeprefix("input_"),
                combine=progressive_combine,
                output=progressive.removeprefix("output_"),
            )
        )

    def time_part(self, label: Tensor) -> Tensor:
        if self.config["embedding"] == "fourier":
            return self.embed(torch.log(label.to(_wide(label))))
        return super().time_part(label)

    def output_scale(self, label: Tensor) -> Tensor | None:
        if self.config["embedding"] == "fourier" and self.config["scale_by_sigma"]:
            return label
        return super().output_scale(label)


class DDPM(ScoreSDENetwork):
    """The U-Net of Ho et al. 2020, as ``models/ddpm.py`` of score_sde.

    Arguments and errors as `NCSNpp`, of which it has fewer. Every GroupNorm has 32 groups.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        conditional: bool = True,
        resample_conv: bool = True,
        scale_by_sigma: bool = False,
        centered: bool = True,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 1000,
        ascending_labels: bool = False,
        nonlinearity: str = "swish",
        dropout: float = 0.1,
        predicts: str = "eps",
        time: str | Callable[..., Any] = "index",
        **carried: Any,
    ) -> None:
        config = self._checked(locals())
        if channels % 32:
            raise ValueError(f"channels must be divisible by 32 groups, got {channels}")
        super().__init__(config, predicts=predicts, time=time, **carried)
        self.embed = self._embed(None)
        norm = partial(GroupNormSiLU, 32, eps=EPS)
        emb = 4 * channels if conditional else None
        self._build(
            Design(
                norm=norm,
                block=partial(ResidualBlock, emb_channels=emb, norm=norm, dropout=dropout),
                attention=partial(SelfAttention, heads=1, norm=norm),
                first=channels,
                attention_gain=_ATTENTION_GAIN,
                conv_resampling=resample_conv,
            )
        )


def _wide(label: Tensor) -> torch.dtype:
    return label.dtype if label.dtype in (torch.float32, torch.float64) else torch.float32
