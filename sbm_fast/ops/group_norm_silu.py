"""Ops `group_norm_silu_` and `group_norm_silu_product_`: GroupNorm with what stands beside it in a
network, and the product of its Jacobian with one tensor.

    h   = gain·(x + add + residual)
    x̂   = (h − mean)·r,   r = 1/√(var + eps),   mean and var of each group of channels of a sample
    n   = x̂·γ + β,        γ = weight·(1 + scale),   β = bias·(1 + scale) + shift
    out = silu(n) = n·σ(n), or n

Sources: Wu and He, "Group Normalization", 2018; Perez et al., "FiLM", 2018 (scale and shift);
Elfwing et al., "Sigmoid-weighted linear units", 2018.

With P g = r·(g − mean g − x̂·mean(x̂·g)), which is its own transpose, and a' = silu'(n) or 1:

    backward (given = ∂L/∂out):   dn = a'·given,   out = gain·P(γ·dn) = ∂L/∂x,
                                  sums = (Σ_pixels dn·x̂, Σ_pixels dn)
    forward (given = the change of x + add + residual):
                                  out = a'·(γ·P(gain·given) + x̂·weight_dot + bias_dot)

weight_dot and bias_dot are the changes of γ and β.

Statistics are made in S, never as E[h²] − E[h]²: S is float64 for a float64 x (or h), else float32,
as all of the arithmetic is. A NaN makes its group NaN. Samples do not depend on each other, nor
on the number of threads.

Arguments (B samples, C channels, any spatial shape; every tensor but stats and sums of any float
dtype):
    out, total, x, residual, given, h [B, C, …]: samples without gaps in memory, all with channels
        first or all with channels last. out and total are written; total is h, or None. out may be
        x or residual, total no other tensor's memory; out of the product may be given or h. They
        share memory with no other argument, nor do their samples with each other.
    stats [B, groups, 2] S, contiguous: (mean, r), written by the first and read by the second op.
    sums [B, C, 2] S, contiguous: written backward; None where it is not wanted.
    weight, bias [C]; scale, shift, add, weight_dot, bias_dot [B, C]: channels beside one another
        in memory; None is 1 for weight and 0 for the others. The last two only forward.
    groups: divides C.
"""

import torch
from torch import Tensor

from sbm_fast.ops._library import register


def wide(v: Tensor, like: Tensor) -> Tensor:
    """[…, C] beside [B, C, …]."""
    return v.reshape(*v.shape, *(1,) * (like.ndim - 2))


def over_pixels(v: Tensor) -> Tensor:
    """Sums [B, C]."""
    return v.sum(tuple(range(2, v.ndim))) if v.ndim > 2 else v


def sum_of(x: Tensor, add: Tensor | None, residual: Tensor | None, gain: float) -> Tensor:
    """h = gain·(x + add + residual), in the dtype of x."""
    h = x if add is None else x + wide(add, x).to(x.dtype)
    h = h if residual is None else h + residual.to(x.dtype)
    return h if gain == 1.0 else h * gain


def statistics(h: Tensor, groups: int, eps: float) -> Tensor:
    """[B, groups, 2]: mean and r."""
    if h.numel() == 0:
        return h.new_zeros(h.shape[0], groups, 2)
    grouped = h.reshape(h.shape[0], groups, -1)
    var, mean = torch.var_mean(grouped, dim=2, correction=0)
    return torch.stack((mean, torch.rsqrt(var + eps)), dim=2)


def affine(
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    """γ and β, in the dtype of h and wide beside it."""

    def given(v: Tensor | None, otherwise: float) -> Tensor:
        return h.new_full((), otherwise) if v is None else wide(v.to(h.dtype), h)

    factor = 1 + given(scale, 0.0)
    return given(weight, 1.0) * factor, given(bias, 0.0) * factor + given(shift, 0.0)


def by_group(h: Tensor, per_group: Tensor) -> Tensor:
    """[B, groups] beside h."""
    return wide(per_group.repeat_interleave(h.shape[1] // per_group.shape[1], dim=1), h)


def normalised(h: Tensor, stats: Tensor) -> Tensor:
    """x̂"""
    return (h - by_group(h, stats[..., 0])) * by_group(h, stats[..., 1])


def activated(
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """out"""
    gamma, beta = affine(weight, bias, scale, shift, h)
    n = normalised(h, stats) * gamma + beta
    return torch.nn.functional.silu(n) if silu else n


def silu_slope(n: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(n)
    return sigmoid * (1 + n * (1 - sigmoid))


def projected(g: Tensor, normal: Tensor, stats: Tensor) -> Tensor:
    """P g"""
    batch, groups = stats.shape[:2]

    def mean(v: Tensor) -> Tensor:
        return by_group(g, v.reshape(batch, groups, -1).mean(2))

    if g.numel() == 0:
        return g
    return by_group(g, stats[..., 1]) * (g - mean(g) - normal * mean(normal * g))


def reference(
    out: Tensor,
    total: Tensor | None,
    stats: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    gain: float,
    silu: bool,
) -> None:
    """The same in plain torch, on any device."""
    h = sum_of(x.to(stats.dtype), add, residual, gain)
    stats.copy_(statistics(h, groups, eps))
    if total is not None:
        total.copy_(h)
    out.copy_(activated(h, stats, weight, bias, scale, shift, silu))


def product(
    given: Tensor,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    gain: float,
    silu: bool,
    forward: bool,
) -> tuple[Tensor, ...]:
    """(out, sums) backward, (out,) forward; given and h in the dtype of stats."""
    gamma, beta = affine(weight, bias, scale, shift, h)
    normal = normalised(h, stats)
    slope = silu_slope(normal * gamma + beta) if silu else 1.0
    if forward:
        change = gamma * projected(gain * given, normal, stats)
        if weight_dot is not None:
            change = change + normal * wide(weight_dot.to(h.dtype), h)
        if bias_dot is not None:
            change = change + wide(bias_dot.to(h.dtype), h)
        return (slope * change,)
    dn = slope * given
    sums = torch.stack((over_pixels(dn * normal), over_pixels(dn)), dim=2)
    return gain * projected(gamma * dn, normal, stats), sums


def product_reference(
    out: Tensor,
    sums: Tensor | None,
    given: Tensor,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    groups: int,
    gain: float,
    silu: bool,
    forward: bool,
) -> None:
    """The same in plain torch, on any device."""
    rows = (weight, bias, scale, shift, weight_dot, bias_dot)
    h, given = h.to(stats.dtype), given.to(stats.dtype)
    results = product(given, h, stats, *rows, gain, silu, forward)
    if sums is not None:
        sums.copy_(results[1])
    out.copy_(results[0])


group_norm_silu_ = register(
    "group_norm_silu_(Tensor(a!) out, Tensor(b!)? total, Tensor(c!) stats, Tensor x, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? add, Tensor? residual, "
    "int groups, float eps, float gain, bool silu) -> ()",
    reference,
    cuda_twin=False,
)
group_norm_silu_product_ = register(
    "group_norm_silu_product_(Tensor(a!) out, Tensor(b!)? sums, Tensor given, Tensor h, "
    "Tensor stats, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "Tensor? weight_dot, Tensor? bias_dot, int groups, float gain, bool silu, bool forward) -> ()",
    product_reference,
    cuda_twin=False,
)
