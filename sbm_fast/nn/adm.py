"""`ADM`: the U-Net of Dhariwal & Nichol 2021."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from sbm_fast.nn import options
from sbm_fast.nn.blocks import MakeNorm, ResidualBlock, SelfAttention, capped_norm, zero
from sbm_fast.nn.conditional import ConditionalNetwork
from sbm_fast.nn.embedding import PositionalEmbedding
from sbm_fast.nn.levels import Design, Head


class ADM(ConditionalNetwork):
    """ADM (Dhariwal & Nichol 2021, sec. 3) as EDM trains it (Karras et al. 2022, app. F.3).

    FiLM blocks that resample inside, attention with heads of ``channels_per_head`` after each block
    of its levels. With the features e of the label, W_a, W_1, W_2, W_c linear, and the labels of
    `ConditionalNetwork`:

        emb = SiLU(W_2 SiLU(W_1 (e + W_a a)) + W_c c)

    Args:
        image_size: height and width that the levels of attention are counted from.
        in_channels, out_channels: channels of x and F; None: as in_channels.
        label_dim, augment_dim: widths of the labels; 0: the network takes none.
        channels: width of the first level.
        channel_mult: width factor of each level.
        channel_mult_emb: width factor of the embedding.
        num_blocks: residual blocks of a level; the decoder has one more.
        attention_resolutions: image sizes at which blocks are followed by self-attention.
        channels_per_head: channels of one attention head.
        dropout: probability, inside of blocks.
        label_dropout: probability, in training, that a sample's class labels are zeros.
        carried: predicts, time, sde, sample_shape, sigma_data, null_cond, variance; see `Network`.

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

    RULES: ClassVar[dict[str, options.Check]] = {
        **ConditionalNetwork.RULES,
        "channels_per_head": options.positive,
    }

    def __init__(
        self,
        *,
        image_size: int = 64,
        in_channels: int = 3,
        out_channels: int | None = None,
        label_dim: int = 0,
        augment_dim: int = 0,
        channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        predicts: str = "edm",
        time: str | Callable[..., Any] = "edm",
        **carried: Any,
    ) -> None:
        config = self._checked(locals())
        super().__init__(config, predicts=predicts, time=time, **carried)
        emb = channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(channels, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        norm = partial(capped_norm, eps=1e-5)
        attention = partial(_attention, per_head=channels_per_head, norm=norm)
        block = partial(ResidualBlock, emb_channels=emb, norm=norm, film=True, dropout=dropout)
        first = channels * config["channel_mult"][0]
        self._build(Design(norm=norm, block=block, attention=attention, first=first, every=True))

    def _initialise(self) -> None:
        """Torch's own (uniform, variance 1/(3 fan in)); branches and output start at zero."""
        for head in self.modules():
            if isinstance(head, Head):
                zero(head.conv)
        if self.map_augment is not None:
            nn.init.zeros_(self.map_augment.weight)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    @classmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        blocks, elements, sizes = super().demands(config)
        first = config["channels"] * max(config["channel_mult"][:1], default=0)
        width = config["channels"] * config["channel_mult_emb"]
        sizes[f"in_channels {config['in_channels']}"] = 9 * config["in_channels"] * first
        sizes[f"label_dim {config['label_dim']}"] = config["label_dim"] * width
        return blocks, elements, sizes

    def time_part(self, label: Tensor) -> Tensor:
        """e, or all before W_c c where the network takes no augmentation labels."""
        features = self.map_noise(label).to(self.map_layer0.weight.dtype)
        return features if self.map_augment is not None else self._mlp(features)

    # Any other conditioning is a TypeError.
    def embedding(  # type: ignore[override]
        self,
        part: Tensor,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """emb [B, W] of `time_part` and the labels."""
        part = self._augmented(part, augment_labels)
        if self.map_augment is not None:
            part = self._mlp(part)
        if self.map_label is not None:
            part = part + self.map_label(self._classes(class_labels, part))
        elif class_labels is not None:
            raise ValueError("class_labels: the network was built with label_dim=0")
        return nn.functional.silu(part)

    def _mlp(self, features: Tensor) -> Tensor:
        return self.map_layer1(nn.functional.silu(self.map_layer0(features)))

    @property
    def _maps(self) -> dict[str, str]:
        names = ("map_augment", "map_layer0", "map_layer1", "map_label")
        return {name: name for name in names if getattr(self, name) is not None}

    def _last_names(self, finest: str) -> dict[str, str]:
        return {"last.norm": "out_norm", "last.conv": "out_conv"}


def _attention(width: int, per_head: int, norm: MakeNorm) -> SelfAttention:
    heads = width // per_head
    if heads < 1 or width % heads:
        need = f"divisible by {heads} heads" if heads else "at least one head"
        raise ValueError(
            f"channels times channel_mult must be {need} of channels_per_head {per_head} where "
            f"there is attention, got {width}"
        )
    return SelfAttention(width, heads, norm=norm)
