"""XTrace (Epperly, Tropp, Webber 2024, arXiv 2301.07825): a matrix's trace from few products.

With Y = A Ω for k test vectors ω_i and Q_(i) an orthonormal basis of Y without its column i, every
test vector gives an estimate that the others' range has taken its part out of:

    P_i = Q_(i) Q_(i)ᵀ,   ω̃_i = (I − P_i) ω_i
    tr_i = tr(Q_(i)ᵀ A Q_(i)) + (n − k + 1) · ω̃_iᵀ A ω̃_i / ‖ω̃_i‖²

The second term is the paper's normalised one, for test vectors whose law is invariant under
rotations. Each tr_i is unbiased, their mean is the estimate, and their spread its error estimate
√(Σ (tr_i − mean)²/(k (k − 1))). All k bases come from one Q R = Y: P_i = Q (I − s_i s_iᵀ) Qᵀ, where
s_i is column i of R⁻ᵀ, normalised. A needs 2 k products, those with Ω and those with Q.

Sums run in an order that depends on their length alone, where BLAS and LAPACK choose theirs by
batch, threads and alignment: a sample's estimate is the same, to the bit, in any batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUDGE = 32
"""How far Y is moved along Ω before it is orthonormalised, in roundings: see `_orthonormal`."""


def leave_one_out(omega: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """The k estimates tr_i [k, B] of the traces of B matrices n × n.

    Args:
        omega: standard normals [k, B, n], float32 or float64, 2 ≤ k ≤ n.
        multiply: [k, B, n] -> [k, B, n] of the same dtype, the products with A.
    """
    k, _, n = omega.shape
    y = multiply(omega)
    q, r = _orthonormal(y, omega)
    z = multiply(q)
    s = _downdates(r)
    qs, zs = _combine(s, q), _combine(s, z)
    inside = tree_sum(_dot(q, z), 0) - _dot(qs, zs)

    w = torch.stack([_dot(q, v) for v in omega], 1)
    u = w - s * tree_sum(s * w, 0)
    rest, image = omega - _combine(u, q), y - _combine(u, z)  # ω̃ and A ω̃
    return inside + (n - k + 1) * _dot(rest, image) / _dot(rest, rest)


def tree_sum(v: Tensor, dim: int) -> Tensor:
    """Σ over a dimension, upper half onto lower half; v is overwritten."""
    n = v.shape[dim]
    while n > 1:
        half = (n + 1) // 2
        v.narrow(dim, 0, n - half).add_(v.narrow(dim, half, n - half))
        n = half
    return v.select(dim, 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return tree_sum(a * b, -1)


def _combine(weights: Tensor, vectors: Tensor) -> Tensor:
    """Σ_a weights[a, i, b]·vectors[a, b] as [i, B, n]."""
    total = weights[0, :, :, None] * vectors[0]
    for w, v in zip(weights[1:], vectors[1:], strict=True):
        total += w[:, :, None] * v
    return total


def _orthonormal(y: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Q [k, B, n] and R [k, k, B] of Y with its columns scaled, by Gram–Schmidt done twice.

    Y is moved by a few roundings along Ω first. That keeps Q orthonormal where A has less than k
    dimensions (or is 0), and moves the estimates by no more than rounding does.
    """
    k = len(y)
    scale = y.abs().amax(-1, keepdim=True)
    y = y / torch.where(scale == 0, 1.0, scale) + NUDGE * torch.finfo(y.dtype).eps * omega
    q, r = torch.zeros_like(y), y.new_zeros(k, k, y.shape[1])
    for j in range(k):
        v = y[j]
        for _ in range(2 if j else 0):
            along = _dot(q[:j], v)
            v = v - _combine(along[:, None], q[:j])[0]
            r[:j, j] += along
        r[j, j] = _dot(v, v).sqrt()
        q[j] = v / r[j, j][:, None]
    return q, r


def _downdates(r: Tensor) -> Tensor:
    """s [k, k, B], s[:, i] = R⁻ᵀ e_i normalised: the direction in which only column i reaches."""
    k = len(r)
    s = torch.zeros_like(r)
    for a in range(k):
        s[a, a] = 1.0
        for b in range(a):
            s[a] -= r[b, a] * s[b]
        s[a] /= r[a, a]
    return s / tree_sum(s * s, 0).sqrt()
