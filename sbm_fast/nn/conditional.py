"""Class and augmentation labels of EDM's networks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sbm_fast.nn import options
from sbm_fast.nn.blocks import ResidualBlock, SelfAttention, Stage
from sbm_fast.nn.embedding import TurnsEmbedding
from sbm_fast.nn.levels import InputSkip, Level, LevelNetwork
from sbm_fast.nn.peer_weights import PeerTensor, tensors_of


class ConditionalNetwork(LevelNetwork):
    """What `SongUNet` and `ADM` share: their arguments, and labels that join the embedding.

    ``class_labels`` is int [B], the numbers of the classes, or float [B, label_dim], one-hot
    vectors or any others; None: zeros, no class. ``augment_labels`` is float [B, augment_dim],
    what was done to a training image (Karras et al. 2022, app. F.2); None: nothing. With classes,
    ``null_cond`` is no class where none is given.
    """

    map_noise: nn.Module
    map_augment: nn.Linear | None
    SIZES: ClassVar[tuple[str, ...]] = (
        *LevelNetwork.SIZES,
        *("label_dim", "augment_dim", "channel_mult_emb"),
    )
    RULES: ClassVar[dict[str, options.Check]] = {
        **LevelNetwork.RULES,
        "label_dim": options.count,
        "augment_dim": options.count,
        "channel_mult_emb": options.positive,
        "label_dropout": options.probability,
    }

    def __init__(self, config: dict[str, Any], **carried: Any) -> None:
        if config["label_dim"] and carried.get("null_cond") is None:
            carried["null_cond"] = {"class_labels": None}
        super().__init__(config, **carried)

    @classmethod
    def _label_width(cls, config: Mapping[str, Any]) -> int:
        """The least width that labels are projected to."""
        return int(config["channels"])

    def _classes(self, labels: Tensor | None, part: Tensor) -> Tensor:
        """``class_labels`` as float [B, label_dim] beside ``part``, with dropout in training."""
        batch, width = part.shape[0], self.config["label_dim"]
        if labels is None:
            return part.new_zeros(batch, width)
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            labels = _one_hot(labels, part, width)
        labels = _shaped("class_labels", labels, batch, width).to(part.dtype)
        if self.training and self.config["label_dropout"]:
            kept = torch.rand(batch, 1, device=labels.device) >= self.config["label_dropout"]
            labels = labels * kept
        return labels

    def _augmented(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """``features`` plus the projected ``augment_labels``."""
        if labels is None:
            return features
        if self.map_augment is None:
            raise ValueError("augment_labels: the network was built with augment_dim=0")
        width = self.config["augment_dim"]
        labels = _shaped("augment_labels", labels, features.shape[0], width)
        return features + self.map_augment(labels.to(features.dtype))

    @classmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        blocks, elements, sizes = super().demands(config)
        width = config["channels"] * config["channel_mult_emb"]
        sizes[f"an embedding of {width}"] = width**2
        for name in ("label_dim", "augment_dim"):
            sizes[f"{name} {config[name]}"] = config[name] * cls._label_width(config)
        projected = config["channels"] * sum(config["channel_mult"]) * config["num_blocks"]
        return blocks, elements + projected * width, sizes

    def peer_tensors(self) -> list[PeerTensor]:
        """As EDM's ``SongUNet`` and ``DhariwalUNet``, but for fixed filters, which have no name
        here."""
        found: list[PeerTensor] = []
        if isinstance(self.map_noise, TurnsEmbedding):
            shape = tuple(self.map_noise.frequencies.shape)
            name = "map_noise.frequencies"
            found.append(PeerTensor("map_noise.freqs", shape, name, trainable=False))
        names = dict(self._maps)
        size = self.config["image_size"]
        names["first"] = f"enc.{size}x{size}_conv"
        for level, part in enumerate(cast("list[Level]", self.encoder)):
            ours = f"encoder.{level}"
            for i, stage in enumerate(part.stages):
                found += _stage(stage, f"{ours}.stages.{i}", f"enc.{size}x{size}_block{i}")
            size //= 2
            theirs = f"enc.{size}x{size}"
            if part.resample is not None:
                found += _block(
                    cast("ResidualBlock", part.resample), f"{ours}.resample", f"{theirs}_down"
                )
            if isinstance(part.join, InputSkip):
                names[f"{ours}.join.conv"] = f"{theirs}_aux_skip"
            elif part.join is not None:
                names[f"{ours}.join.down.conv"] = f"{theirs}_aux_residual"
        size *= 2
        for i, stage in enumerate(cast("list[Stage]", self.middle)):
            found += _stage(stage, f"middle.{i}", f"dec.{size}x{size}_in{i}")
        for level, part in enumerate(cast("list[Level]", self.decoder)):
            ours, theirs = f"decoder.{level}", f"dec.{size}x{size}"
            for i, stage in enumerate(part.stages):
                found += _stage(stage, f"{ours}.stages.{i}", f"{theirs}_block{i}")
            if part.head is not None:
                names[f"{ours}.head.norm"] = f"{theirs}_aux_norm"
                names[f"{ours}.head.conv"] = f"{theirs}_aux_conv"
            if part.resample is not None:
                size *= 2
                found += _block(
                    cast("ResidualBlock", part.resample),
                    f"{ours}.resample",
                    f"dec.{size}x{size}_up",
                )
        names |= self._last_names(f"dec.{size}x{size}")
        return found + tensors_of(self, "", names, "")

    @property
    @abstractmethod
    def _maps(self) -> dict[str, str]:
        """Our names of the linear layers of the embedding, with EDM's."""

    @abstractmethod
    def _last_names(self, finest: str) -> dict[str, str]:
        """Our names of the last norm and convolution, with EDM's."""


_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "skip": "skip",
}


def _stage(stage: Stage, ours: str, theirs: str) -> list[PeerTensor]:
    found = _block(stage.block, f"{ours}.block", theirs)
    attention = stage.attention
    if not isinstance(attention, SelfAttention):
        return found
    ours = f"{ours}.attention"
    found += tensors_of(attention, ours, {"norm": "norm2", "out": "proj"}, theirs)
    for tensor in tensors_of(attention, ours, {"qkv": "qkv"}, theirs):
        found.append(replace(tensor, layout="heads", heads=attention.heads))
    return found


def _block(block: ResidualBlock, ours: str, theirs: str) -> list[PeerTensor]:
    return tensors_of(block, ours, _BLOCK, theirs)


def _one_hot(classes: Tensor, part: Tensor, width: int) -> Tensor:
    """Numbers of classes [B] as [B, width], in the dtype and on the device of ``part``."""
    zeros, columns = part.new_zeros(classes.shape[0], width), classes.long()[:, None]
    if torch.compiler.is_compiling():
        return zeros.scatter_(1, columns, 1)
    # torch's one_hot would ask the device for the largest label. This reads nothing, and says
    # what is out of range where the host can know it.
    try:
        return zeros.scatter_(1, columns, 1)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise ValueError(f"class_labels must lie in 0..{width - 1}: {error}") from error


def _shaped(name: str, labels: Tensor, batch: int, width: int) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.shape != (batch, width):
        raise ValueError(f"{name} must be [{batch}, {width}], got {list(labels.shape)}")
    return labels
