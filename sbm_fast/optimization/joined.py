"""What rewritten forwards call: sums and norms that wait for what follows them.

A rewritten forward is the original one with a few expressions handed to the functions here. Each
of them looks at what it is given when it runs, and does what the original expression did wherever
the fused op does not fit: a norm with hooks, a tensor subclass, a factor that differs between
positions, another activation put in since.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

from sbm_fast.nn.conv import Conv2d
from sbm_fast.nn.functional import group_norm_silu

SILU: set[object] = {nn.functional.silu, nn.SiLU.forward}
"""Functions, and forwards of modules, that are known to be SiLU."""
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_TORCHS: set[object] = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, Conv2d)}
_TORCHS |= {kind._conv_forward for kind in _CONVOLUTIONS}


class FusedNorm:
    """Mixin of GroupNorms that `optimize` took over: their forward is the fused op."""

    num_groups: int
    eps: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(The argument's name is that of the original.)"""
        if len(args) == 1 and not kwargs and _plain(args[0]):
            return _fused(Normed(self, args[0]), None)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class FusedSequential:
    """Mixin of nn.Sequentials that `optimize` took over: neighbours in it are joined."""

    def forward(self, input: Any) -> Any:
        for module in self:  # type: ignore[attr-defined]
            input = norm(module, input) if isinstance(module, FusedNorm) else act(module, input)
        return value(input)


class Sum:
    """x + add, not made yet; add has one number for each sample and channel."""

    def __init__(self, x: Tensor, add: Tensor, in_place: bool) -> None:
        self.x = x
        self.add = add
        self.in_place = in_place
        self.tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device


class Normed(Sum):
    """GroupNorm(x + add) · (1 + scale) + shift, not made yet."""

    def __init__(self, module: Any, x: Tensor, add: Tensor | None = None) -> None:
        self.module = module
        self.x = x
        self.vector = add
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.tensor = None


def value(x: Any) -> Any:
    """The tensor that x stands for. It is made once: whoever changes it in place changes x."""
    if isinstance(x, Normed):
        if x.tensor is None:
            x.tensor = _fused(x, None)
        return x.tensor
    if isinstance(x, Sum):
        if x.tensor is None:
            x.tensor = x.x.add_(x.add) if x.in_place else x.x + x.add
        return x.tensor
    return x


def sum(a: Any, b: Any) -> Any:
    """a + b."""
    a, b = value(a), value(b)
    if _plain(a) and _per_channel(b, a):
        return Sum(a, b, False)
    if _plain(b) and _per_channel(a, b):
        return Sum(b, a, False)
    return a + b


def add_(x: Any, add: Any, maker: object) -> Any:
    """x.add_(add), x having just come from the module ``maker``. If nobody else can hold x, nobody
    can see whether x was changed or a new tensor was made."""
    x = value(x)
    if _plain(x) and _per_channel(add, x, in_place=True) and _makes_new(maker):
        return Sum(x, add, True)
    return operator.iadd(x, add)


def norm(module: Any, x: Any) -> Any:
    """module(x)."""
    if isinstance(module, FusedNorm) and bare(module):
        if isinstance(x, Sum) and not isinstance(x, Normed) and x.tensor is None:
            return Normed(module, x.x, x.add)
        x = value(x)
        if _plain(x):
            return Normed(module, x)
    return module(value(x))


def times(x: Any, scale: Any) -> Any:
    """x · (1 + scale)."""
    if _open(x) and x.scale is None and x.shift is None and _per_channel(scale, x.x):
        x.scale = scale
        return x
    return value(x) * (1 + scale)


def plus(x: Any, shift: Any) -> Any:
    """x + shift."""
    if _open(x) and x.shift is None and _per_channel(shift, x.x):
        x.shift = shift
        return x
    return value(x) + shift


def addcmul(function: Callable[..., Any], shift: Any, x: Any, scale: Any) -> Any:
    """shift + x · (1 + scale)."""
    if _open(x) and _per_channel(scale, x.x) and _per_channel(shift, x.x):
        return plus(times(x, scale), shift)
    return function(shift, value(x), scale + 1)


def swish(x: Any, sigmoid: Callable[..., Any]) -> Any:
    """x · sigmoid(x)."""
    if _open(x):
        return _fused(x, "silu")
    x = value(x)
    return x * sigmoid(x)


def act(function: Any, x: Any, **keywords: Any) -> Any:
    """function(x)."""
    if _open(x):
        if isinstance(function, FusedSequential) and bare(function):
            return function.forward(x)
        if is_silu(function):
            return _fused(x, "silu")
    return function(value(x), **keywords)


def is_silu(function: Any) -> bool:
    """Whether calling it is x · sigmoid(x) and nothing else."""
    if isinstance(function, nn.Module):
        forward = getattr(type(function), "forward", None)  # A ScriptModule has none.
        return isinstance(forward, FunctionType) and forward in SILU and bare(function)
    return isinstance(function, FunctionType) and function in SILU


def bare(module: Any) -> bool:
    """Whether calling the module is its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or own_call(module)
        or module._compiled_call_impl is not None
        or globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    )


def own_call(module: Any) -> bool:
    """Whether its class does more in a call than torch's Module."""
    return type(module).__call__ is not nn.Module.__call__


def _fused(x: Normed, activation: str | None) -> Tensor:
    y = group_norm_silu(
        x.x,
        x.module.num_groups,
        x.module.weight,
        x.module.bias,
        x.module.eps,
        scale=_flat(x.scale, x.x),
        shift=_flat(x.shift, x.x),
        add=_flat(x.vector, x.x),
        activation=activation,
    )
    assert isinstance(y, Tensor)
    return y


def _plain(x: object) -> bool:
    """A tensor of torch's own class, as the op takes them. (torch.jit.trace gets torch's ops, which
    it can save.)"""
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        return False
    known = type(x) is Tensor or type(x) is nn.Parameter or torch.compiler.is_compiling()
    return known and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _open(x: object) -> bool:
    return isinstance(x, Normed) and x.tensor is None


def _per_channel(v: object, x: Tensor, *, in_place: bool = False) -> bool:
    """Whether v is one number for each sample and channel of x, and x's dtype has room for it."""
    if not isinstance(v, Tensor) or not _plain(v) or v.ndim != x.ndim or x.ndim < 3:
        return False
    mine, yours = v.shape, x.shape
    if mine[1] != yours[1] or (mine[0] != yours[0] and mine[0] != 1):
        return False
    for size in mine[2:]:
        if size != 1:
            return False
    return v.dtype == x.dtype or in_place or torch.promote_types(x.dtype, v.dtype) == x.dtype


def _flat(v: Tensor | None, x: Tensor) -> Tensor | None:
    """[B, C, 1, …] -> [B, C]."""
    if v is None:
        return None
    flat = v.flatten(1)
    return flat if flat.shape[0] == x.shape[0] else flat.expand(x.shape[0], -1)


def _makes_new(maker: object) -> bool:
    """Whether the module's output is a tensor that nobody else holds: a convolution's."""
    if not isinstance(maker, nn.Module) or not bare(maker) or not torchs_own(maker):
        return False
    weight = maker._parameters.get("weight")
    return weight is not None and weight.ndim > 2


def torchs_own(module: nn.Module) -> bool:
    """Whether its class has torch's forward (or that of `Conv2d`, its packed twin) and not one of
    its own, which may return what it is given."""
    kind: Any = type(module)
    made_by = getattr(kind, "_conv_forward", None)
    return kind.forward in _TORCHS and (made_by is None or made_by in _TORCHS)
