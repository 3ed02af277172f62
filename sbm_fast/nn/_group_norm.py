"""Derivatives of `group_norm_silu`: backward, forward-mode and vmap rules over the fused ops.

First derivatives are one call of `group_norm_silu_product_`. Derivatives of these (a backward with
create_graph, forward over reverse) go through its formula in plain torch, which torch
differentiates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from sbm_fast.nn._transforms import JVP, VMAP, fold, levels
from sbm_fast.ops import group_norm_silu as ops

MaybeTensor = Tensor | None
Rows = tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]
"""weight, bias, scale, shift"""


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_gaps(x: Tensor) -> Tensor:
    """x with channels first or last in memory, a copy where it lies in another way."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x  # without the cost of the view below
    return x if x.ndim > 2 and x.movedim(1, -1).is_contiguous() else x.contiguous()


def lying_as(v: Tensor, x: Tensor) -> Tensor:
    """v with the memory layout of x; as it is where its shape is another, which the ops refuse."""
    if v is x or v.stride() == x.stride() or v.shape != x.shape:
        return v
    return v.new_empty_strided(x.shape, x.stride()).copy_(v)


def _row(v: MaybeTensor) -> MaybeTensor:
    return v if v is None or v.stride(-1) == 1 else v.contiguous()


def _registered(x: Tensor) -> bool:
    """Whether the ops have kernels on this device; elsewhere their references run."""
    return x.device.type in ("cpu", "cuda", "meta")


def run(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    add: MaybeTensor,
    residual: MaybeTensor,
    groups: int,
    eps: float,
    gain: float,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """(y, statistics), and h behind them where it is to be kept. No derivatives."""
    if not x.is_contiguous():
        x = without_gaps(x)
    out = torch.empty_like(x)
    total = torch.empty_like(x) if keep else None
    stats = x.new_empty((len(x), groups, 2), dtype=statistics_dtype(x))
    if residual is not None:
        residual = lying_as(residual, x)
    if scale is not None or shift is not None or add is not None:
        scale, shift, add = _row(scale), _row(shift), _row(add)
    op = ops.group_norm_silu_ if x.is_cpu or _registered(x) else ops.reference
    op(
        out, total, stats, x, _row(weight), _row(bias), scale, shift, add, residual, groups, eps,
        gain, silu,
    )  # fmt: skip
    return (out, stats) if total is None else (out, stats, total)


def formula(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    add: MaybeTensor,
    residual: MaybeTensor,
    groups: int,
    eps: float,
    gain: float,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """`run` in operations that torch differentiates any number of times."""
    h = ops.sum_of(x.to(statistics_dtype(x)), add, residual, gain)
    stats = ops.statistics(h, groups, eps)
    out = ops.activated(h, stats, weight, bias, scale, shift, silu)
    return (out.to(x.dtype), stats, h.to(x.dtype))


def _run_product(
    given: Tensor,
    h: Tensor,
    stats: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    weight_dot: MaybeTensor,
    bias_dot: MaybeTensor,
    gain: float,
    silu: bool,
    forward: bool,
) -> tuple[Tensor, ...]:
    """(out,) forward, (out, sums) backward. No derivatives."""
    h = without_gaps(h)
    out = torch.empty_like(h)
    sums = None if forward else stats.new_empty((h.shape[0], h.shape[1], 2))
    op = ops.group_norm_silu_product_ if _registered(h) else ops.product_reference
    op(
        out, sums, lying_as(given, h), h, stats, _row(weight), _row(bias), _row(scale),
        _row(shift), _row(weight_dot), _row(bias_dot), stats.shape[1], gain, silu, forward,
    )  # fmt: skip
    return (out,) if sums is None else (out, sums)


def nested_forward_mode() -> bool:
    """Whether functorch differentiates in forward mode more than once: the inner rule of a Function
    is hidden from the outer level, and zeros would come out."""
    return levels().count(JVP) > 1


def _needs_formula(*tensors: MaybeTensor, forward: bool = False) -> bool:
    """Whether a derivative that is calculated now, in `forward` mode or backwards, is to be
    differentiated again, or batched by torch's older vmap (is_grads_batched), which knows no rules
    for ops."""
    if torch.compiler.is_compiling():
        return False  # AOTAutograd has first derivatives only
    kinds = [kind for kind in levels() if kind != VMAP]
    if kinds != ([JVP] if forward and kinds else []):  # its own transform, and no other
        return True
    given = [v for v in tensors if v is not None]
    if torch.is_grad_enabled() and any(v.requires_grad for v in given):
        return True
    return any(torch._C._functorch.is_legacy_batchedtensor(v) for v in given)


def _over_vmap(
    function: type[Function], shared: tuple[int, ...], info: Any, dims: Any, arguments: Any
) -> tuple[tuple[Tensor, ...], int]:
    """The function over a mapped dimension, which becomes part of the batch; where a `shared`
    argument [C] is mapped as well, one call after the other."""
    size = info.batch_size
    mapped = [i for i in shared if dims[i] is not None]
    if mapped and size:
        calls = [
            function.apply(*(
                v if d is None else v.select(d, k) for v, d in zip(arguments, dims, strict=True)
            ))
            for k in range(size)
        ]  # fmt: skip
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), 0
    folded = [
        fold(v, d, size) if isinstance(v, Tensor) and i not in shared else v
        for i, (v, d) in enumerate(zip(arguments, dims, strict=True))
    ]
    for i in mapped:  # over nothing: any values do
        folded[i] = arguments[i].sum(dims[i])
    batch = next(n for d, n in enumerate(arguments[0].shape) if d != dims[0])
    return tuple(v.unflatten(0, (size, batch)) for v in function.apply(*folded)), 0


class _Product(Function):
    """`_run_product` with a vmap rule."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _run_product(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        return _over_vmap(_Product, (3, 4), info, dims, arguments)


def _product(
    given: Tensor,
    h: Tensor,
    stats: Tensor,
    rows: Rows,
    dots: tuple[MaybeTensor, MaybeTensor],
    gain: float,
    silu: bool,
    forward: bool,
) -> tuple[Tensor, ...]:
    call = _Product.apply if levels() else _run_product
    return call(given, h, stats, *rows, *dots, gain, silu, forward)


def _product_formula(
    given: Tensor,
    h: Tensor,
    eps: float,
    groups: int,
    rows: Rows,
    dots: tuple[MaybeTensor, MaybeTensor],
    gain: float,
    silu: bool,
    forward: bool,
) -> tuple[Tensor, ...]:
    """The same in operations that torch differentiates, the statistics among them."""
    dtype = h.dtype
    h = h.to(statistics_dtype(h))
    stats = ops.statistics(h, groups, eps)
    results = ops.product(given.to(h.dtype), h, stats, *rows, *dots, gain, silu, forward)
    return (results[0].to(dtype), *results[1:])


class Reverse(Function):
    """`run` with its backward. (torch.compile takes no Function with a rule for forward mode.)"""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return run(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        saved = (*inputs[:7], stats, *output[2:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.groups, ctx.eps, ctx.gain, ctx.silu, ctx.keep = inputs[7:]

    @staticmethod
    def backward(ctx: Any, dy: MaybeTensor, _: Any, dh: MaybeTensor = None) -> Any:
        x, weight, bias, scale, shift, add, residual, stats, *total = ctx.saved_tensors
        rows, nothing = (weight, bias, scale, shift), (None, None)
        needed = ctx.needs_input_grad
        grads: list[MaybeTensor] = [None] * 7
        dx, sums = (None if dh is None else ctx.gain * dh), None
        if dy is not None:
            # A dual tensor may wait in what was saved.
            dual = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
            if dual or _needs_formula(dy, dh, x, *rows, add, residual):
                h = ops.sum_of(x, add, residual, ctx.gain)
                through, sums = _product_formula(
                    dy, h, ctx.eps, ctx.groups, rows, nothing, ctx.gain, ctx.silu, False
                )
            else:
                h = total[0] if total else ops.sum_of(x, add, residual, ctx.gain)
                through, sums = _product(dy, h, stats, rows, nothing, ctx.gain, ctx.silu, False)
            dx = through if dx is None else through + dx
        if dx is not None:
            grads[0] = dx if needed[0] else None
            grads[5] = ops.over_pixels(dx).to(add.dtype) if needed[5] else None
            grads[6] = dx.to(residual.dtype) if needed[6] else None
        if sums is not None:
            grads[1:5] = _row_gradients(sums[..., 0], sums[..., 1], rows, needed[1:5])
        return (*grads, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        return _over_vmap(GroupNormSiLU, (1, 2), info, dims, arguments)


def _row_gradients(
    by_normal: Tensor, by_one: Tensor, rows: Rows, needed: tuple[bool, ...]
) -> list[MaybeTensor]:
    """Those of weight, bias, scale and shift, from Σ dn·x̂ and Σ dn of every channel."""
    weight, bias, scale, _ = rows
    dtype = by_one.dtype
    factor = 1.0 if scale is None else 1 + scale.to(dtype)
    gamma: Any = 1.0 if weight is None else weight.to(dtype)
    beta: Any = 0.0 if bias is None else bias.to(dtype)
    makers = (
        lambda: (by_normal * factor).sum(0),
        lambda: (by_one * factor).sum(0),
        lambda: by_normal * gamma + by_one * beta,
        lambda: by_one,
    )
    return [
        maker().to(row.dtype) if row is not None and need else None
        for maker, row, need in zip(makers, rows, needed, strict=True)
    ]


class GroupNormSiLU(Reverse):
    """`run` with its derivatives in both modes."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[MaybeTensor, ...]:
        x, weight, bias, scale, shift, add, residual, stats, *total = ctx.saved_tensors
        x_dot, weight_dot, bias_dot, scale_dot, shift_dot, add_dot, residual_dot = tangents[:7]
        rows = (weight, bias, scale, shift)
        given = torch.zeros_like(x) if x_dot is None else x_dot
        given = ops.sum_of(given, add_dot, residual_dot, 1.0)
        dots = _row_changes(rows, (weight_dot, bias_dot, scale_dot, shift_dot), x)
        if _needs_formula(*tangents[:7], x, *rows, add, residual, forward=True):
            h = ops.sum_of(x, add, residual, ctx.gain)
            (out,) = _product_formula(
                given, h, ctx.eps, ctx.groups, rows, dots, ctx.gain, ctx.silu, True
            )
        else:
            h = total[0] if total else ops.sum_of(x, add, residual, ctx.gain)
            (out,) = _product(given, h, stats, rows, dots, ctx.gain, ctx.silu, True)
        return (out, None, ctx.gain * given) if ctx.keep else (out, None)


def _row_changes(rows: Rows, dots: Rows, x: Tensor) -> tuple[MaybeTensor, MaybeTensor]:
    """γ̇ and β̇ [B, C] of γ = weight·(1 + scale), β = bias·(1 + scale) + shift; None: zero."""
    dtype = statistics_dtype(x)
    weight, bias, scale, _ = (None if v is None else v.to(dtype) for v in rows)
    weight_dot, bias_dot, scale_dot, shift_dot = (None if v is None else v.to(dtype) for v in dots)
    factor: Any = 1.0 if scale is None else 1 + scale

    def change(row: MaybeTensor, dot: MaybeTensor, behind: MaybeTensor) -> MaybeTensor:
        parts = [] if dot is None else [dot * factor]
        if row is not None and scale_dot is not None:
            parts.append(row * scale_dot)
        if behind is not None:
            parts.append(behind)
        return sum(parts[1:], parts[0]).expand(x.shape[:2]) if parts else None

    ones = x.new_ones((), dtype=dtype) if weight is None else weight
    return change(ones, weight_dot, None), change(bias, bias_dot, shift_dot)
