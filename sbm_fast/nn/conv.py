"""`Conv2d`: torch's convolution, whose weights can be packed for a while.

oneDNN keeps the weights of a CPU convolution in an order of its own and brings them there at every
call of `torch.nn.functional.conv2d`. At small batches that is a good part of the call. Inside
`packed(net)` every convolution does it once. Packed weights give the same products in the same
precision; the order of summation is oneDNN's either way. Convolutions of 3×3 go by Winograd's
algorithm where that is faster (`sbm_fast/nn/winograd.py`), with weights that are packed for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.nn.grad import conv2d_input

from sbm_fast.nn import winograd
from sbm_fast.nn._transforms import JVP, VMAP, fold, levels
from sbm_fast.ops.winograd import weights as winograd_weights

SMALLEST = 64 * 64
"""Weights of fewer numbers are not packed: a packed call costs some 30 µs more than a plain one."""
_IMAGE = 16, 16
"""What weights are packed for; the pack serves images of all sizes and batches as well."""
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Pack:
    """Weight and bias, ready for one way to convolve, and the state of what they came from.

    It keeps those tensors: as long as it stands, no other has their identity or address.
    """

    source: tuple[object, ...]
    origin: tuple[Tensor, Tensor | None]
    weight: Tensor
    bias: Tensor | None


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that may join its output to another tensor:

        y = gain · (conv(x) + plus)

    Parameters, initialisation, gradients and the result are those of torch. Where weights are
    packed for oneDNN (see `packed`), `gain` is multiplied into them: another rounding, no other
    formula.
    """

    _users: int = 0
    _packs: dict[tuple[int, bool], _Pack] | None = None
    """By the side of Winograd's tiles (0: for oneDNN), and whether they are those of the backward.
    Made where they are used."""

    def forward(self, input: Tensor, *, gain: float = 1.0, plus: Tensor | None = None) -> Tensor:
        """y [B, out_channels, H', W'] of the input x [B, in_channels, H, W]; plus like y."""
        x = input
        if not torch.compiler.is_compiling() and self._users and self._can_pack(x):
            how = self._differentiated(x, plus)
            if how == "not":
                return self._convolved(x, plus, gain, self.bias is not None)
            if how == "once":
                y: Tensor = _Packed.apply(x, plus, self, gain, self.bias is not None)
                return y
        y = super().forward(x)
        if plus is not None:
            y = y + plus
        return y if gain == 1.0 else y * gain

    def _convolved(self, x: Tensor, plus: Tensor | None, gain: float, biased: bool) -> Tensor:
        """y by packed weights; without the bias where it is not wanted."""
        side = self._winograd_side(x)
        if side:
            pack = self._packed(side, gain)
            bias = pack.bias if biased else None
            return winograd.convolved(x, pack.weight, bias, plus, gain)
        pack = self._packed(0, gain)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, pack.weight, pack.bias if biased else None, self.padding, self.stride,
            self.dilation, self.groups, "none", [], "",
        )  # fmt: skip
        return y if plus is None else y.add_(plus, alpha=gain)

    def _can_pack(self, x: Tensor) -> bool:
        weight, bias = self.weight, self.bias
        return (
            x.dtype == weight.dtype == torch.float32
            and x.device.type == weight.device.type == "cpu"
            and type(x) is Tensor
            and type(weight) is nn.Parameter
            and not weight.is_inference()
            and (bias is None or (type(bias) is nn.Parameter and not bias.is_inference()))
            and weight.numel() >= SMALLEST
            and x.ndim == 4
            and x.numel() > 0
            and self.groups == 1
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not torch.is_autocast_enabled("cpu")
        )

    def _differentiated(self, x: Tensor, plus: Tensor | None) -> str:
        """ "not", "once" (by what it is given, in one of the modes) or "otherwise"."""
        if _wanted(self.weight, self.bias):
            return "otherwise"
        backward = _wanted(x, plus)
        if kinds := levels():
            once = not backward and kinds.count(JVP) <= 1 and set(kinds) <= {JVP, VMAP}
            return "once" if once else "otherwise"
        if forward_ad._current_level >= 0:
            return "otherwise" if backward else "once"
        if backward:  # a backward by oneDNN gains nothing
            return "once" if self._winograd_side(x) else "otherwise"
        return "not"

    def _backwards(self, dy: Tensor, shape: torch.Size, gain: float) -> Tensor:
        """The product of dy with the Jacobian by x, of a convolution by Winograd's algorithm: gain
        times a convolution with the weights turned round."""
        legacy = torch._C._functorch.is_legacy_batchedtensor(dy)
        if torch.is_grad_enabled() or legacy or not self._users:
            return gain * conv2d_input(shape, self.weight, dy, padding=self.padding)
        dy = dy.contiguous(memory_format=torch.channels_last)
        pack = self._packed(winograd.side(dy, self.in_channels), gain, turned=True)
        return winograd.convolved(dy, pack.weight, None, None, gain)

    def _winograd_side(self, x: Tensor) -> int:
        if self.kernel_size != (3, 3) or self.padding != (1, 1):
            return 0
        if self.stride != (1, 1) or self.dilation != (1, 1):
            return 0
        return winograd.side(x, self.out_channels)

    def _packed(self, side: int, gain: float, turned: bool = False) -> _Pack:
        weight, bias = self.weight, self.bias
        gain = 1.0 if side else gain  # Winograd's output takes it
        source: tuple[object, ...] = gain, id(weight), weight.data_ptr(), weight._version
        if bias is not None:
            source += id(bias), bias.data_ptr(), bias._version
        packs = self._packs
        if packs is None:
            packs = self._packs = {}
        key = (side, turned)
        pack = packs.get(key)
        if pack is None or pack.source != source:
            with torch.no_grad():
                w = weight.detach()
                w = w.flip(2, 3).transpose(0, 1) if turned else w
                made = winograd_weights(w, side) if side else self._for_onednn(w * gain)
                own_bias = None if bias is None else bias.detach() * gain
            pack = packs[key] = _Pack(source, (weight, bias), made, own_bias)
        return pack

    def _for_onednn(self, weight: Tensor) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        made: Tensor = reorder(
            weight.contiguous().to_mkldnn(), self.padding, self.stride, self.dilation, self.groups,
            [1, weight.shape[1], *_IMAGE],
        )  # fmt: skip
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the packs behind."""
        kept = ("_users", "_packs")
        return {name: value for name, value in self.__dict__.items() if name not in kept}


class _Packed(Function):
    """A packed convolution with its derivatives by x and plus: forward, itself without bias."""

    @staticmethod
    def forward(x: Tensor, plus: Tensor | None, conv: Conv2d, gain: float, biased: bool) -> Tensor:
        return conv._convolved(x, plus, gain, biased)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, _, ctx.conv, ctx.gain, _ = inputs
        ctx.shape, ctx.version = x.shape, ctx.conv.weight._version
        ctx.last = x.is_contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if ctx.conv.weight._version != ctx.version:
            raise RuntimeError("a convolution's weights were changed between forward and backward")
        by_x, by_plus = ctx.needs_input_grad[:2]
        dx = ctx.conv._backwards(dy, ctx.shape, ctx.gain) if by_x else None
        return dx, ctx.gain * dy if by_plus else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor | None, plus_dot: Tensor | None, *_: None) -> Tensor | None:
        if x_dot is None:
            return None if plus_dot is None else ctx.gain * plus_dot
        if ctx.last:
            x_dot = x_dot.contiguous(memory_format=torch.channels_last)
        run = _Packed.apply if levels() else _Packed.forward
        y: Tensor = run(x_dot, plus_dot, ctx.conv, ctx.gain, False)
        return y

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, plus: Tensor | None, *others: Any) -> Any:
        """The mapped dimension becomes part of the batch."""
        size = info.batch_size
        batch = next(n for d, n in enumerate(x.shape) if d != dims[0])
        y: Tensor = _Packed.apply(fold(x, dims[0], size), fold(plus, dims[1], size), *others)
        return y.unflatten(0, (size, batch)), 0


def _wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient by one of them is recorded."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@contextmanager
def packed(net: object) -> Iterator[None]:
    """Packs the weights of the network's `Conv2d`s at their first call in the block.

    For float32 on a CPU: without derivatives, or with one by what the convolutions are given, in
    forward mode or backwards, where their weights want no gradients. Other calls under autograd,
    and those under autocast or torch.compile, go torch's way. It costs a copy of the weights for as
    long as the block runs, of 16/9 or 4 times their size where they are for Winograd's algorithm;
    another one for a backward, and where image sizes or batches change so much that another way
    becomes the faster one. Values of weights must not be changed through `.data` in the block (any
    other change is noticed). Blocks may be nested, and entered by several threads.
    """
    convs: list[Conv2d] = []
    if isinstance(net, nn.Module) and torch.backends.mkldnn.is_available():
        convs = [module for module in net.modules() if isinstance(module, Conv2d)]
    with _lock:
        for conv in convs:
            conv._users += 1
    try:
        yield
    finally:
        with _lock:
            for conv in convs:
                conv._users -= 1
                if conv._users == 0:
                    conv._packs = None
