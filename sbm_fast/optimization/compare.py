"""A network's outputs on an example, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Example = Sequence[Any] | Mapping[str, Any]


@torch.no_grad()
def outputs(net: nn.Module, example: Example) -> list[Tensor]:
    """All tensors of the network's output, in eval mode; the modes are what they were afterwards.

    Raises:
        TypeError: example is neither a tuple or list of arguments nor a mapping of keywords.
        RuntimeError: no tensors are found in the output.
    """
    if not isinstance(example, tuple | list | Mapping):
        kind = type(example).__name__
        raise TypeError(
            f"example must be a tuple of arguments or a mapping of keywords, got {kind}"
        )
    # A network may write into its inputs.
    example = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example)
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        out = net(**example) if isinstance(example, Mapping) else net(*example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = [leaf.detach().clone() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if not found:
        raise RuntimeError(
            f"example: nothing to compare: the output, a {type(out).__name__}, holds no tensors in "
            "tuples, lists and mappings"
        )
    return found


def relative_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """max |after − before| / max |before|; infinite where shapes or NaNs differ."""
    worst = 0.0
    if [a.shape for a in after] != [b.shape for b in before]:
        return float("inf")
    for a, b in zip(after, before, strict=True):
        if a.numel() == 0:
            continue
        largest, apart = (
            float(b.double().abs().amax()),
            float((a.double() - b.double()).abs().amax()),
        )
        if apart != apart:
            return float("inf")
        worst = max(worst, apart / largest if largest > 0 else apart)
    return worst


def tolerance(before: list[Tensor], dtype: torch.dtype | None) -> float:
    """The difference that counts as rounding, over a deep network."""
    half = any(b.dtype in (torch.bfloat16, torch.float16) for b in before)
    return 5e-2 if half or dtype is not None else 1e-4
