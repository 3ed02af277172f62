"""torch.func's transforms, as the derivatives of this package's layers see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

JVP = torch._C._functorch.TransformType.Jvp
VMAP = torch._C._functorch.TransformType.Vmap


def levels() -> list[Any]:
    """The kinds of the transforms that are active, outermost first."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]


def fold(v: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A mapped dimension of `size` as part of the batch: [size, B, …] as [size·B, …]; an argument
    that is not mapped is repeated."""
    if v is None:
        return None
    v = v.expand(size, *v.shape) if dim is None else v.movedim(dim, 0)
    return v.flatten(0, 1)
