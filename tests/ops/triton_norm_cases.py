"""Inputs of `group_norm_silu_` and its product for the Triton kernels, guarded outputs, and the
formulas in any dtype."""

from dataclasses import dataclass

import torch
from op_backends import call
from torch import Tensor
from torch.nn import functional as F

NAN, GUARD, BAND = float("nan"), 12345.0, 64
EPS = 1e-5


@dataclass
class Norm:
    """What a call reads; None for what it is not given."""

    x: Tensor
    groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: Tensor | None = None
    residual: Tensor | None = None
    gain: float = 1.0
    silu: bool = True
    total: bool = False

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def laid_out(t: Tensor, last: bool) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t


def guarded(like: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
    """NaNs laid out as `like`, or dense, between bands that nothing may write into."""
    shape = shape or tuple(like.shape)
    numel = torch.Size(shape).numel()
    memory = torch.full((numel + 2 * BAND,), GUARD, dtype=dtype or like.dtype)
    memory[BAND : BAND + numel] = NAN
    strides = like.stride() if shape == tuple(like.shape) else torch.empty(shape).stride()
    return memory.as_strided(shape, strides, BAND)


def whole(t: Tensor) -> Tensor:
    """The tensor, once its bands are seen to be whole."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    assert (memory[:BAND] == GUARD).all() and (memory[-BAND:] == GUARD).all()
    return t


def everything(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    seed: int = 0,
    offset: float = 0.0,
) -> Norm:
    """All options given; scale and shift as halves of one product, as networks have them."""
    g = torch.Generator().manual_seed(seed)
    batch, channels = shape[:2]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    scale, shift = normal(batch, 2 * channels).chunk(2, dim=1)
    return Norm(
        laid_out((normal(*shape) + offset).to(dtype), last), groups, normal(channels),
        normal(channels).to(dtype), scale, shift, normal(batch, channels).to(dtype),
        laid_out(normal(*shape).to(dtype), last), 0.5**0.5, True, True,
    )  # fmt: skip


def plain(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype = torch.float32, last: bool = False
) -> Norm:
    """None given, no SiLU."""
    return Norm(everything(shape, groups, dtype, last).x, groups, silu=False)


def run(case: Norm) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, total, stats) of the Triton kernels."""
    out = guarded(case.x)
    total = guarded(case.x) if case.total else None
    stats = guarded(case.x, (case.x.shape[0], case.groups, 2), case.wide)
    call(
        "triton", "group_norm_silu_", out, total, stats, case.x, case.weight, case.bias, case.scale,
        case.shift, case.add, case.residual, case.groups, EPS, case.gain, case.silu,
    )  # fmt: skip
    return whole(out), None if total is None else whole(total), whole(stats)


def formula(case: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, h) by torch's functions in this dtype."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    wide = (...,) + (None,) * (case.x.ndim - 2)
    h = case.x.to(dtype)
    if case.add is not None:
        h = h + case.add.to(dtype)[wide]
    if case.residual is not None:
        h = h + case.residual.to(dtype)
    h = (h * case.gain).contiguous()  # torch loses digits in channels_last
    y = F.group_norm(h, case.groups, cast(case.weight), cast(case.bias), EPS)
    if case.scale is not None and case.shift is not None:
        y = y * (1 + case.scale.to(dtype)[wide]) + case.shift.to(dtype)[wide]
    return (F.silu(y) if case.silu else y), h


def off(value: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact value; infinite for NaN."""
    error = (value.double() - exact.double()).square().mean() / exact.double().square().mean()
    return float(error.sqrt().nan_to_num(torch.inf))
