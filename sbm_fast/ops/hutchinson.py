"""Op `hutchinson_`: the drift of the probability flow and its divergence, sample by sample.

    drift[b]         = p_b·x_b + q_b·F_b
    divergence[k, b] = p_b·d + r_b·Σ_i v_k[b, i]·product[k, b, i]

With product_k = v_kᵀJ or J·v_k, J = ∂F/∂(network input), the sum is Hutchinson's estimate of tr J:
its mean is tr J, because E[v vᵀ] = 1. Source: Hutchinson, "A stochastic estimator of the trace of
the influence matrix for Laplacian smoothing splines", 1990; Song et al. 2021, App. D.2.

Probe v_k is that of `draw + k` (modulo 2³²) of the sample's key: signs, or normals under
`gaussian`, as `noise.rademacher` and `noise.normal` give them. It is made in the op, never stored.
Sums run in the fixed tree of `langevin_epsilon_`, in the dtype of `divergence`. A coefficient 0 of
x or F does not read it: 0·NaN is NaN.

Arguments (B samples of d elements, K probes; S the state's dtype, float32 or float64):
    drift [B, …] S: written; x and network may be the same memory, product may not.
    divergence [K, B] float32 or float64, contiguous: written; None exactly where product is None.
    x [B, …] S: the state. Any memory format, as for all tensors of its shape.
    network [B, …]: F, any float dtype.
    product [K, B, …]: any float dtype; None: the drift alone.
    keys int64 [B]; coef float64 [B, 3]: (p, q, r) of every sample.
    draw, stream: of the first probe (`noise.PROBE` is the stream that solves use).
"""

import torch
from torch import Tensor

from sbm_fast.ops import _philox
from sbm_fast.ops._library import register
from sbm_fast.ops._row import weighted_sum
from sbm_fast.ops.langevin_epsilon import sample_sum
from sbm_fast.plan import H0, F, X


def reference(
    drift: Tensor,
    divergence: Tensor | None,
    x: Tensor,
    network: Tensor,
    product: Tensor | None,
    keys: Tensor,
    coef: Tensor,
    draw: int,
    stream: int,
    gaussian: bool,
) -> None:
    """The same in plain torch, on any device."""
    if (product is None) != (divergence is None):
        raise RuntimeError("product: is given with divergence, and only then")
    if x.numel() == 0:
        if divergence is not None:
            divergence.zero_()
        return
    weights = coef.new_zeros(len(coef), H0)
    weights[:, X], weights[:, F] = coef[:, 0], coef[:, 1]
    drift.copy_(weighted_sum(weights, [x, network.to(x.dtype), None, None], x))
    if product is None or divergence is None:
        return
    dimension = x[0].numel()
    trivial, scale = coef[:, 0] * dimension, coef[:, 2]
    for k, of_probe in enumerate(product.to(divergence.dtype)):
        words = _philox.sample_words(keys, dimension, draw + k, stream)
        probe = _philox.to_normal(words) if gaussian else _philox.signs(words)
        v = probe[:, :dimension].to(torch.float32).to(divergence.dtype)
        trace = sample_sum(v * of_probe.reshape(v.shape))
        divergence[k].copy_(trivial + scale * trace.double())


hutchinson_ = register(
    "hutchinson_(Tensor(a!) drift, Tensor(b!)? divergence, Tensor x, Tensor network, "
    "Tensor? product, Tensor keys, Tensor coef, int draw, int stream, bool gaussian) -> ()",
    reference,
    cuda_twin=False,
)
