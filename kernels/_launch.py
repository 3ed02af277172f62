"""What every launch needs on the host: the configuration, layouts, and checks of the arguments.

Errors are RuntimeErrors with the words of the compiled ops (csrc/bindings_*).
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

View = tuple[Any, Any]  # (tensor, strides), each of them or None

TILE = 1024  # elements of a program, and of a block of the reduction
ON_CHIP = 4096  # elements of a sample that one program can hold
SMALLEST = 128
MAX_DIMS = 8
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What is read one value at a time: neither its alignment nor a value of 1 makes another kernel.
UNSPECIALISED = (
    "keys", "row", "coef", "field", "guidance", "epsilon", "net_time", "first_bad", "draw",
    "stream", "tiles", "batch", "rows", "row_stride", "sample_step", "column_step",
)  # fmt: skip
ARITHMETIC = {"enable_fp_fusion": False}  # a·b + c rounds twice unless a kernel says tl.fma
FIELDS, TAIL, H0, MAX_REGISTERS = 4, 9, 4, 8


def configuration(numel: int, largest: int = TILE) -> dict[str, Any]:
    """BLOCK and warps by the sample's size: eight elements a thread, four for tiny samples."""
    block = min(max(SMALLEST, 1 << (numel - 1).bit_length()), largest)
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def launch(kernel: Any, programs: int, on: Tensor, *arguments: object, **options: object) -> None:
    """Runs a kernel on the tensor's device, on torch's current stream."""
    with torch.cuda.device_of(on):
        kernel[(programs,)](*arguments, **ARITHMETIC, **options)


def views(
    shape: Sequence[int], **tensors: Tensor | None
) -> tuple[tuple[int, ...], dict[str, View]]:
    """Sizes of the merged dimensions but the first, and each tensor as (tensor, strides).

    A tensor that lies in C order gets None for its strides; what is not given is (None, None),
    because Triton 3.6 cannot tell a tuple from None. The others, with theirs over (sample,
    merged dimensions …), are cut together, into as few dimensions as all of them allow. Without
    such dimensions the sizes are (1,): no kernel looks at them.
    """
    apart = {
        name: t.stride() for name, t in tensors.items() if t is not None and not t.is_contiguous()
    }
    if not apart:
        return (1,), {name: (t, None) for name, t in tensors.items()}
    dims: list[int] = []
    sizes: list[int] = []
    for d in range(1, len(shape)):
        if shape[d] == 1:
            continue
        if dims and all(strides[dims[-1]] == shape[d] * strides[d] for strides in apart.values()):
            dims[-1] = d
            sizes[-1] *= shape[d]
        else:
            dims.append(d)
            sizes.append(shape[d])
    require(
        len(dims) <= MAX_DIMS,
        f"{', '.join(apart)}: too many dimensions: {len(dims)} after merging, at most {MAX_DIMS} "
        "are supported",
    )

    def strides_of(name: str) -> tuple[int, ...] | None:
        strides = apart.get(name)
        return strides and (strides[0], *(strides[d] for d in dims))

    return tuple(sizes[1:]) or (1,), {name: (t, strides_of(name)) for name, t in tensors.items()}


def is_wide(numel: int) -> bool:
    """Whether an index inside a sample needs 64 bits."""
    return numel >= 2**31 - ON_CHIP


def halves(value: int) -> tuple[int, int]:
    """Low and high 32 bits, as signed integers: so every launch has the same types."""
    low, high = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def halves_of_float(value: float) -> tuple[int, int]:
    """The bits of a float64: Triton would make a float32 of it."""
    return halves(int.from_bytes(struct.pack("<d", value), "little"))


def table(t: Tensor, like: Tensor, columns: int, name: str) -> Tensor:
    """A float64 tensor [samples, columns] on the device of `like`."""
    shape = (like.shape[0], columns)
    ok = t.dtype == torch.float64 and t.shape == shape and same_device(t, like)
    require(ok, f"{name}: expected a float64 tensor {list(shape)} on {like.device}")
    return t


def first_of(t: Tensor, x: Tensor, name: str) -> Tensor | None:
    """The first of the tensors of x's shape that stand behind one another in t, if any does."""
    ok = t.dim() == x.dim() + 1 and t.shape[1:] == x.shape
    require(ok, f"{name}: expected [count, *x.shape]")
    require(t.dtype in FLOATS, f"{name}: expected float32, float64, bfloat16 or float16")
    require(same_device(t, x), f"{name}: expected a tensor on {x.device}")
    return t[0] if len(t) else None


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def samples(t: Tensor, name: str) -> int:
    require(t.dim() >= 1, f"{name}: expected [samples, …], got a scalar")
    return t.shape[0]


def vector(t: Tensor | None, like: Tensor, dtype: torch.dtype, name: str) -> Tensor | None:
    """A contiguous vector of one value a sample, on the device of `like`."""
    if t is None:
        return None
    batch = like.shape[0]
    ok = t.dtype == dtype and t.dim() == 1 and t.shape[0] == batch and same_device(t, like)
    require(ok, f"{name}: expected a vector of {batch} samples in the op's dtype on {like.device}")
    require(batch <= 1 or t.stride(0) == 1, f"{name}: expected a contiguous vector")
    return t


def like_state(t: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    """A tensor of the shape of x."""
    if t is not None:
        require(t.shape == x.shape, f"{name}: expected the shape of x")
        require(t.dtype in FLOATS, f"{name}: expected float32, float64, bfloat16 or float16")
        require(same_device(t, x), f"{name}: expected a tensor on {x.device}")
    return t


def same_device(a: Tensor, b: Tensor) -> bool:
    """Much cheaper than comparing two `device`s."""
    return a.get_device() == b.get_device() and a.is_cuda == b.is_cuda


def check_state(x: Tensor) -> None:
    samples(x, "x")
    ok = x.dtype in (torch.float32, torch.float64)
    require(ok, "x: expected a float32 or float64 state")


def check_row(
    x: Tensor, network: Tensor | None, uncond: Tensor | None, guidance: Tensor | None,
    keys: Tensor, row: Tensor, coef: Tensor, field: Tensor,
) -> int:  # fmt: skip
    """Checks what both ops of a row read; returns how many registers the plan has."""
    for name, f in (("network", network), ("uncond", uncond)):
        check_alias(f, x, name, "the state x")
    vector(guidance, x, x.dtype, "guidance")
    given = guidance is not None and network is not None
    require(uncond is None or given, "uncond: needs network and guidance")
    vector(keys, x, torch.int64, "keys")
    batch = x.shape[0]
    ok = row.dtype == torch.int32 and row.shape == (batch,) and same_device(row, x)
    require(ok, f"row: expected a vector of {batch} samples in the op's dtype on {x.device}")
    ok = coef.dim() == 3 and coef.shape[1] == 2 and coef.is_contiguous() and coef.dtype == x.dtype
    ok = ok and same_device(coef, x)
    require(ok, "coef: expected a contiguous tensor [rows, 2, lanes] of x's dtype on its device")
    ok = field.shape == (coef.shape[0], FIELDS) and field.is_contiguous()
    ok = ok and field.dtype == torch.int32 and same_device(field, x)
    require(ok, "field: expected a contiguous int32 tensor [rows, 4] on x's device")
    lanes = coef.shape[2]
    registers = (lanes - TAIL) // 2 - H0
    ok = 0 <= registers <= MAX_REGISTERS and lanes == 2 * (H0 + registers) + TAIL
    require(ok, f"coef: no plan has {lanes} lanes")
    return registers


def check_alias(f: Tensor | None, to: Tensor | None, name: str, what: str) -> None:
    """The network may hand back what it was given, but not another view of it.

    The step writes `to` while it reads F, each in its own order of memory.
    """
    if f is None or to is None or not share_memory(f, to):
        return
    same = f.data_ptr() == to.data_ptr() and f.dtype == to.dtype and f.stride() == to.stride()
    require(same, f"{name}: is another view of {what}; return a tensor of its own")


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory that one reaches over meets that of the other."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False

    def end(t: Tensor) -> int:
        last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() + (last + 1) * t.element_size()

    return a.data_ptr() < end(b) and b.data_ptr() < end(a)
