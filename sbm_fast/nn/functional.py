"""Functions of the networks' layers."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("silu", None)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
    activation: str | None = "silu",
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm, FiLM and SiLU in one pass, behind a sum that may be made in the same pass.

        h = gain · (x + add + residual)
        n = (h − mean_group) / √(var_group + eps) · weight + bias
        y = silu(n · (1 + scale) + shift)

    Args:
        x: [B, C, …], any number of spatial dimensions.
        num_groups: divides C.
        weight, bias: [C].
        scale, shift, add: [B, C], the same at all positions (a projected time embedding).
        residual: like x.
        activation: "silu" or None.
        return_sum: also return h.
    """
    h = x
    wide = (...,) + (None,) * (x.ndim - 2)
    if add is not None:
        h = h + add[wide]
    if residual is not None:
        h = h + residual
    if gain != 1.0:
        h = h * gain
    y = torch.nn.functional.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[wide])
    if shift is not None:
        y = y + shift[wide]
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    return (y, h) if return_sum else y
