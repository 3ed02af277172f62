"""Triton's interpreter, made exact where a GPU is, and faster. Import it before the kernels.

There `tl.fma` rounds twice, float32 is cut off to become bfloat16, and bfloat16 loses its
subnormals; here they are as on a GPU. And the language is patched once for each module of device
functions, not at every call, which takes most of the time.
"""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as tl
from triton.runtime import interpreter

Array = NDArray[Any]


def fma32(a: Array, b: Array, c: Array) -> Array:
    """float32 fused multiply-add: the exact product plus c in float64, rounded to odd, then once
    more (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total, error = two_sum(product, addend)
    bits = total.view(np.int64)
    even = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    outwards = (error > 0) == (total > 0)
    bits = np.where(even, np.where(outwards, bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """float64 fused multiply-add from error-free parts; wrong only near ties of their own sum."""
    product = a * b
    big = 2.0**27 + 1
    a_high, b_high = a * big - (a * big - a), b * big - (b * big - b)
    a_low, b_low = a - a_high, b - b_high
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total, error = two_sum(product, c)
    fused = total + (error + rest)
    return np.where(np.isfinite(fused), fused, product + c)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _create_fma(self: object, x: Any, y: Any, z: Any) -> Any:
    fma = fma32 if z.data.dtype == np.float32 else fma64
    with np.errstate(all="ignore"):
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)


def to_bfloat16(v: Array) -> Array:
    """The bits of float32 values rounded to nearest, ties to even."""
    bits = v.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(v), bits >> 16 | 0x40, rounded).astype(np.uint16)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_impl(self: object, source: Any, target: Any) -> Any:
    types = source.dtype.scalar, target.scalar
    if types == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(to_bfloat16(source.data), target.scalar)
    if types == (tl.bfloat16, tl.float32):
        wide = source.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(wide.view(np.float32), target.scalar)
    return _cast(self, source, target)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = self.fn.__module__
    if module not in _patched:  # ours see `tl`, which the launch itself has patched
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


_of_device_functions = ("_philox", "_row", "_sum", "affine_step", "langevin_epsilon")
_of_device_functions += ("hutchinson", "error_norm", "_groups")
_of_device_functions += ("group_norm_silu", "group_norm_silu_product")
_patched = {f"sbm_fast.kernels.{name}" for name in _of_device_functions}
interpreter.InterpreterBuilder.create_fma = _create_fma
interpreter.InterpreterBuilder.cast_impl = _cast_impl
interpreter.InterpretedFunction.__call__ = _call
