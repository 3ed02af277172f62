"""`SongUNet`: NCSN++ and DDPM++ as Karras et al. 2022 train them, with labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from sbm_fast.nn import options, resample
from sbm_fast.nn.blocks import ResidualBlock, SelfAttention, capped_norm
from sbm_fast.nn.conditional import ConditionalNetwork
from sbm_fast.nn.embedding import PositionalEmbedding, TurnsEmbedding
from sbm_fast.nn.levels import Design


class SongUNet(ConditionalNetwork):
    """DDPM++ and NCSN++ of EDM (Karras et al. 2022, app. F.1 and F.2).

    With the features e of the label, W_c, W_a, W_1, W_2 linear, and class labels c, augmentation
    labels a (see `ConditionalNetwork`):

        emb = SiLU(W_2 SiLU(W_1 (e + W_c √(label_dim) c + W_a a)))

    Args:
        image_size: height and width that the levels of attention are counted from.
        in_channels, out_channels: channels of x and F; None: as in_channels.
        label_dim, augment_dim: widths of the labels; 0: the network takes none.
        channels: width of the first level.
        channel_mult: width factor of each level.
        channel_mult_emb: width factor of the embedding.
        num_blocks: residual blocks of a level; the decoder has one more.
        attention_resolutions: image sizes at which blocks are followed by self-attention.
        embedding: "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: width factor of e: 1 (DDPM++) or 2 (NCSN++).
        encoder: "standard" (DDPM++), "skip" or "residual" (NCSN++).
        decoder: "standard" or "skip".
        fir_kernel: resampling filter: (1, 1) (DDPM++) or (1, 3, 3, 1) (NCSN++).
        dropout: probability, inside of blocks.
        label_dropout: probability, in training, that a sample's class labels are zeros.
        carried: predicts, time, sde, sample_shape, sigma_data, null_cond; see `Network`.

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

    SIZES: ClassVar[tuple[str, ...]] = (*ConditionalNetwork.SIZES, "channel_mult_noise")
    RULES: ClassVar[dict[str, options.Check]] = {
        **ConditionalNetwork.RULES,
        "embedding": options.one_of("positional", "fourier"),
        "channel_mult_noise": options.positive,
        "encoder": options.one_of("standard", "skip", "residual"),
        "decoder": options.one_of("standard", "skip"),
        "fir_kernel": options.fir,
    }

    def __init__(
        self,
        *,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        label_dim: int = 0,
        augment_dim: int = 0,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        embedding: str = "positional",
        channel_mult_noise: int = 1,
        encoder: str = "standard",
        decoder: str = "standard",
        fir_kernel: Sequence[float] = resample.BOX,
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        predicts: str = "edm",
        time: str | Callable[..., Any] = "edm",
        **carried: Any,
    ) -> None:
        config = self._checked(locals())
        super().__init__(config, predicts=predicts, time=time, **carried)
        noise, emb = channels * channel_mult_noise, channels * channel_mult_emb
        self.map_noise = (
            PositionalEmbedding(noise, order="sin_cos")
            if embedding == "positional"
            else TurnsEmbedding(noise, 16.0, angular=True)
        )
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        norm, gain = partial(capped_norm, eps=1e-6), math.sqrt(0.5)
        self._build(
            Design(
                norm=norm,
                block=partial(
                    ResidualBlock,
                    emb_channels=emb,
                    norm=norm,
                    kernel=tuple(fir_kernel),
                    skip="project",
                    gain=gain,
                    dropout=dropout,
                ),
                attention=partial(SelfAttention, heads=1, norm=norm, gain=gain),
                first=channels,
                attention_gain=math.sqrt(0.2),
                kernel=tuple(fir_kernel),
                gain=gain,
                input="none" if encoder == "standard" else encoder,
                output="none" if decoder == "standard" else decoder,
                smooth=True,
            )
        )

    @classmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        blocks, elements, sizes = super().demands(config)
        width = cls._label_width(config)
        features = width * config["channels"] * config["channel_mult_emb"]
        return blocks, elements, sizes | {f"{width} features of the label": features}

    @classmethod
    def _label_width(cls, config: Mapping[str, Any]) -> int:
        return int(config["channels"] * config["channel_mult_noise"])

    def time_part(self, label: Tensor) -> Tensor:
        return self.map_noise(label).to(self.map_layer0.weight.dtype)

    # Any other conditioning is a TypeError.
    def embedding(  # type: ignore[override]
        self,
        part: Tensor,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """emb [B, W] of ``part`` = e [B, P] and the labels."""
        if self.map_label is not None:
            # √(label_dim): one-hot vectors get the variance of the other inputs.
            labels = self._classes(class_labels, part)
            part = part + self.map_label(labels * math.sqrt(self.config["label_dim"]))
        elif class_labels is not None:
            raise ValueError("class_labels: the network was built with label_dim=0")
        hidden = nn.functional.silu(self.map_layer0(self._augmented(part, augment_labels)))
        return nn.functional.silu(self.map_layer1(hidden))

    @property
    def _maps(self) -> dict[str, str]:
        names = ("map_label", "map_augment", "map_layer0", "map_layer1")
        return {name: name for name in names if getattr(self, name) is not None}

    def _last_names(self, finest: str) -> dict[str, str]:
        if self.config["decoder"] == "skip":
            return {}
        return {"last.norm": f"{finest}_aux_norm", "last.conv": f"{finest}_aux_conv"}
