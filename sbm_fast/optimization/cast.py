"""Weights in another layout or dtype, and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sbm_fast.optimization.exchange import exchange, set_class

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Kept:
    """What a parameter was before its layout or dtype was changed."""

    parameter: nn.Parameter
    dtype: torch.dtype | None
    """None where only the layout was changed."""
    stride: tuple[int, ...]
    data: Tensor | None
    """The values, where a cast has lost bits of them."""

    @torch.no_grad()
    def put_back(self) -> None:
        """The old values, dtype and layout; new values stay where they have changed since."""
        now = self.parameter
        old = None if self.data is None else self.data.to(now.device)
        if old is None or not torch.equal(now, old.to(now.dtype)):
            old = torch.empty_strided(
                now.shape, self.stride, dtype=self.dtype or now.dtype, device=now.device
            ).copy_(now)
        now.data = old


def lay_out(net: nn.Module) -> list[Kept]:
    """Convolution weights in channels_last layout; what they were."""
    kept = []
    for parameter in net.parameters():
        layout = _FORMATS.get(parameter.ndim)
        if layout is None or parameter.is_contiguous(memory_format=layout):
            continue
        kept.append(Kept(parameter, None, parameter.stride(), None))
        parameter.data = parameter.data.contiguous(memory_format=layout)
    return kept


def cast(net: nn.Module, dtype: torch.dtype) -> list[Kept]:
    """Weights of torch's convolutions and linear layers in another dtype, and the network under
    autocast to it; what they were.

    Raises:
        ValueError: the network is under another dtype already, or has a forward of its instance's.
    """
    present = [_dtype_of(kind) for kind in type(net).__mro__]
    if any(p not in (None, dtype) for p in present):
        raise ValueError(
            f"dtype: the network runs in {next(filter(None, present))}: restore it first"
        )
    if "forward" in vars(net):
        raise ValueError("dtype: the network has a forward set on the instance")
    if dtype not in present:
        _put_under(net, dtype)
    kept: dict[nn.Parameter, Kept] = {}
    for module in net.modules():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        for parameter in module._parameters.values():
            if parameter is None or parameter in kept or parameter.dtype == dtype:
                continue
            if parameter.is_floating_point():
                before = parameter.data
                kept[parameter] = Kept(parameter, before.dtype, before.stride(), before)
                parameter.data = before.to(dtype)
    return list(kept.values())


def exchange_below(module: nn.Module, **how: Any) -> None:
    """`exchange`, with the network's autocast, where it has one already, staying on top.

    Raises:
        TypeError: Python cannot make or assign such a class.
    """
    own: Any = type(module)
    dtype = _dtype_of(own)
    if dtype is None:
        return exchange(module, **how)
    set_class(module, own._sbm_fast_original)
    try:
        exchange(module, **how)
    finally:
        _put_under(module, dtype)


def _dtype_of(kind: type) -> torch.dtype | None:
    """The dtype of a class that `_put_under` made."""
    return getattr(vars(kind).get("forward"), "sbm_fast_dtype", None)


def _put_under(module: nn.Module, dtype: torch.dtype) -> None:
    """The module runs under autocast."""
    own: Any = type(module)
    exchange(module, forward=_under(own, dtype))


@functools.cache
def _under(own: Any, dtype: torch.dtype) -> Any:
    """The class's forward under autocast; tensors of that dtype in its output get the input's."""

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        wide = next((t.dtype for t in given if t.is_floating_point()), torch.float32)
        # Times and labels may come on the CPU, to a network on another device.
        device = next((t.device.type for t in given if not t.is_cpu), "cpu")
        with torch.autocast(device, dtype):
            out = own.forward(self, *args, **kwargs)

        def back(t: Any) -> Any:
            return t.to(wide) if isinstance(t, Tensor) and t.dtype == dtype else t

        return tree_map(back, out)

    forward.sbm_fast_dtype = dtype  # type: ignore[attr-defined]
    return forward
