"""GroupNorm, FiLM and SiLU as networks in plain torch have them: what ours is measured beside."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sbm_fast.nn import GroupNormSiLU
from sbm_fast.nn.network import Network


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """What `sbm_fast.nn.functional.group_norm_silu` fuses, function by function."""
    wide = (...,) + (None,) * (x.ndim - 2)
    if add is not None:
        x = x + add[wide]
    y = nn.functional.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[wide]) + shift[wide]
    return nn.functional.silu(y) if activation == "silu" else y


class PlainNorm(GroupNormSiLU):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        weight, bias, activation = self.weight, self.bias, self.activation
        return group_norm_silu(
            x, self.num_groups, weight, bias, self.eps, activation=activation, **options
        )


def plain(network: Network) -> Network:
    """A copy whose normalisations are plain torch's; the rest of our networks is so anyhow."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, GroupNormSiLU):
            module.__class__ = PlainNorm
    return network


def relative(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖; NaN is never small."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())


def half(network: Network) -> Network:
    return copy.deepcopy(network).to(torch.bfloat16)
