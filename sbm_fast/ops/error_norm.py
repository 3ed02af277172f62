"""Op `error_norm_`: the error of a Runge–Kutta step in units of its tolerance, one value a sample.

    e      = Σ_{k≥1} weights[b, k]·registers[k, b]
    out[b] = √( mean_i (e_i / (atol + rtol·max(|u0_i|, |u1_i|)))² ),    u0 = registers[0], u1 = x

Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", 1993, sec. II.4.
A NaN in e, u0 or u1 makes the sample's value NaN, and so does 0/0 where the tolerance is 0. The
sum runs in the fixed tree of `langevin_epsilon_`. A weight 0 does not read its register: 0·NaN is
NaN. e is summed in float64: slopes that are nearly equal cancel in it.

Arguments (B samples; S the state's dtype, float32 or float64):
    out [B] S, contiguous: written; 0 for samples without elements.
    x [B, …] S: the state u1 at the end of the step. Any memory format, as for registers.
    registers [K, B, …] S, K ≥ 1: the state u0 at its beginning, then the slopes.
    weights float64 [B, K]: step size times (b − b*) of every stage; column 0 is ignored.
    atol, rtol: the tolerance.
"""

import torch
from torch import Tensor

from sbm_fast.ops._library import register
from sbm_fast.ops._row import per_sample
from sbm_fast.ops.langevin_epsilon import sample_sum


def reference(
    out: Tensor, x: Tensor, registers: Tensor, weights: Tensor, atol: float, rtol: float
) -> None:
    """The same in plain torch, on any device."""
    if x.numel() == 0:
        out.zero_()
        return
    error = torch.zeros_like(x, dtype=torch.float64)
    for k in range(1, len(registers)):
        weight = per_sample(weights[:, k], x)
        error += torch.where(weight != 0, weight * registers[k].double(), 0.0)
    tolerance = atol + rtol * torch.maximum(registers[0].abs(), x.abs())
    squares = (error.to(x.dtype) / tolerance) ** 2
    out.copy_((sample_sum(squares) / x[0].numel()).sqrt())


error_norm_ = register(
    "error_norm_(Tensor(a!) out, Tensor x, Tensor registers, Tensor weights, float atol, "
    "float rtol) -> ()",
    reference,
    cuda_twin=False,
)
