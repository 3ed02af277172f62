"""GroupNorm as the networks use it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbm_fast.nn.functional import ACTIVATIONS, group_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm`` with SiLU, FiLM and the sum before it, by `functional.group_norm_silu`.

    Parameters and their names are those of ``nn.GroupNorm``, so its checkpoints load.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as of ``nn.GroupNorm``.
        activation: "silu" or None.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_channels``, or an unknown activation.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "silu",
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        add: Tensor | None = None,
        residual: Tensor | None = None,
        gain: float = 1.0,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, h) with ``return_sum``; arguments as of `functional.group_norm_silu`."""
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift,
            add=add, residual=residual, gain=gain, activation=self.activation,
            return_sum=return_sum,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
