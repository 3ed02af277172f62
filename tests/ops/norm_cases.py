"""Inputs of group_norm_silu and of its product, their formulas in torch, and the comparisons."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from flow_cases import off
from op_backends import call
from torch import Tensor

NAN = float("nan")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ROWS = ("weight", "bias", "scale", "shift", "add")
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Norm:
    """Everything that a call of `group_norm_silu_` reads."""

    x: Tensor
    groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    gain: float = 1.0
    silu: bool = True

    def to(self, dtype: torch.dtype) -> "Norm":
        tensors = ("x", *ROWS, "residual")
        given = {name: getattr(self, name) for name in tensors}
        return replace(self, **{k: None if v is None else v.to(dtype) for k, v in given.items()})

    def picked(self, index: Tensor) -> "Norm":
        """The case of some of the samples."""
        own = {name: getattr(self, name) for name in ("x", "scale", "shift", "add", "residual")}
        return replace(self, **{k: None if v is None else v[index] for k, v in own.items()})


def channels_last(v: Tensor) -> Tensor:
    return v.movedim(1, -1).contiguous().movedim(-1, 1)


def norm(
    shape: tuple[int, ...],
    groups: int,
    *,
    rows: str = "weight bias",
    residual: bool = False,
    last: bool = False,
    dtype: torch.dtype = F32,
    row_dtype: torch.dtype | None = None,
    mean: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Norm:
    """Random inputs; `rows` names those of `ROWS` that are given."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=F64)

    channels = shape[1]
    sizes = {"weight": (channels,), "bias": (channels,)}
    lie = channels_last if last else Tensor.contiguous
    case = Norm(lie((normal(*shape) + mean).to(dtype)), groups, **options)
    for name in rows.split():
        row = normal(*sizes.get(name, (shape[0], channels)))
        setattr(case, name, row.to(row_dtype or dtype))
    if residual:
        case.residual = lie(normal(*shape).to(dtype))
    return case


def output(
    case: Norm, backend: str, out_dtype: torch.dtype | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """out, stats and, with `keep`, total, which begin as NaN."""
    wide = F64 if case.x.dtype == F64 else F32
    out = torch.full_like(case.x, NAN, dtype=out_dtype)
    total = torch.full_like(case.x, NAN) if keep else None
    stats = torch.full((len(case.x), case.groups, 2), NAN, dtype=wide)
    call(
        backend, "group_norm_silu_", out, total, stats, case.x, case.weight, case.bias, case.scale,
        case.shift, case.add, case.residual, case.groups, case.eps, case.gain, case.silu,
    )  # fmt: skip
    return {"out": out, "stats": stats} | ({} if total is None else {"total": total})


def formula(case: Norm) -> dict[str, Tensor]:
    """In operations of torch, in the dtype of the case."""
    x = case.x
    wide = (...,) + (None,) * (x.ndim - 2)
    h = x if case.add is None else x + case.add[wide]
    h = h if case.residual is None else h + case.residual
    h = h if case.gain == 1.0 else h * case.gain
    # Twice the batch, as torch refuses a single value for each group of a single sample.
    y = torch.nn.functional.group_norm(
        torch.cat((h, h)), case.groups, case.weight, case.bias, case.eps
    )[: len(h)]
    if case.scale is not None:
        y = y * (1 + case.scale[wide])
    if case.shift is not None:
        y = y + case.shift[wide]
    y = torch.nn.functional.silu(y) if case.silu else y
    grouped = h.reshape(len(h), case.groups, -1)
    var, mean = torch.var_mean(grouped, 2, correction=0)
    return {"out": y, "total": h, "stats": torch.stack((mean, (var + case.eps).rsqrt()), 2)}


def violation(case: Norm, got: dict[str, Tensor]) -> str:
    """ "" when everything is the float64 formula to twice torch's own error."""
    exact, plain = formula(case.to(F64)), formula(case)
    found = [off(name, got[name], exact[name], plain[name].to(got[name].dtype)) for name in got]
    return "; ".join(filter(None, found))


@dataclass
class Product:
    """A call of `group_norm_silu_product_` at `case`; `stats` are those of float64."""

    case: Norm
    given: Tensor
    forward: bool = False
    weight_dot: Tensor | None = None
    bias_dot: Tensor | None = None


def product(
    shape: tuple[int, ...], groups: int, *, forward: bool = False, seed: int = 1, **options: Any
) -> Product:
    case = norm(shape, groups, **options)
    case.residual = case.add = None
    g = torch.Generator().manual_seed(seed)
    given, weight_dot, bias_dot = (
        torch.randn(size, generator=g, dtype=F64).to(case.x.dtype)
        for size in (shape, shape[:2], shape[:2])
    )
    given = channels_last(given) if options.get("last") else given
    dots = (weight_dot, bias_dot) if forward else (None, None)
    return Product(case, given, forward, *dots)


def multiplied(p: Product, backend: str) -> dict[str, Tensor]:
    """out, and sums backward; they begin as NaN."""
    c = p.case
    wide = F64 if c.x.dtype == F64 else F32
    stats = torch.zeros(len(c.x), c.groups, 2, dtype=wide)
    if c.x.numel():
        stats.copy_(formula(replace(c, gain=1.0).to(F64))["stats"])
    out = torch.full_like(c.x, NAN)
    sums = None if p.forward else torch.full((*c.x.shape[:2], 2), NAN, dtype=stats.dtype)
    call(
        backend, "group_norm_silu_product_", out, sums, p.given, c.x, stats, c.weight, c.bias,
        c.scale, c.shift, p.weight_dot, p.bias_dot, c.groups, c.gain, c.silu, p.forward,
    )  # fmt: skip
    return {"out": out} | ({} if sums is None else {"sums": sums})


def product_formula(p: Product, dtype: torch.dtype) -> dict[str, Tensor]:
    """By torch's own derivatives of the formula: gain stands before the norm, out of its sum."""
    c = replace(p.case, gain=1.0).to(dtype)
    given, x = p.given.to(dtype), c.x.detach().requires_grad_()
    ones, zeros = torch.ones(x.shape[:2], dtype=dtype), torch.zeros(x.shape[:2], dtype=dtype)
    scale = zeros if c.scale is None else c.scale
    gamma = ((ones if c.weight is None else ones * c.weight) * (1 + scale)).requires_grad_()
    beta = (zeros if c.bias is None else c.bias * (1 + scale)) + (
        zeros if c.shift is None else c.shift
    )
    beta = beta.detach().requires_grad_()
    gamma = gamma.detach().requires_grad_()

    def of(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return formula(replace(c, x=x, weight=None, bias=None, scale=gamma - 1, shift=beta))["out"]

    if not p.forward:
        at = (x, gamma, beta)
        dx, by_gamma, by_beta = torch.autograd.grad(of(*at), at, given)
        return {"out": p.case.gain * dx, "sums": torch.stack((by_gamma, by_beta), 2)}
    assert p.weight_dot is not None and p.bias_dot is not None
    changes = (p.case.gain * given, p.weight_dot.to(dtype), p.bias_dot.to(dtype))
    at = (x.detach().contiguous(), gamma.detach(), beta.detach())
    return {"out": torch.func.jvp(of, at, changes)[1]}


def product_violation(p: Product, got: dict[str, Tensor]) -> str:
    exact, plain = product_formula(p, F64), product_formula(p, p.case.x.dtype)
    found = [off(name, got[name], exact[name], plain[name].to(got[name].dtype)) for name in exact]
    return "; ".join(filter(None, found))
