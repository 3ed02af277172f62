"""The packed row as the eager references read it; the C++ twin is csrc/row.h."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sbm_fast.ops import _philox
from sbm_fast.plan import FIELD_LANES, H0, TAIL_LANES, D, F, X, Z


@dataclass
class Rows:
    """Row r[b] of the table for every sample b; `live` marks samples that stand at a row."""

    live: Tensor  # bool [B]
    value: Tensor  # float64 [B, lanes], high and low part together
    field: Tensor  # int64 [B, 4]
    registers: int

    @classmethod
    def of(cls, row: Tensor, coef: Tensor, field: Tensor) -> "Rows":
        rows, _, lanes = coef.shape
        live = (row >= 0) & (row < rows)
        index = row.clamp(0, rows - 1).long()
        value = coef[index].double()
        # ∞ keeps its low part 0, so the sum is safe.
        registers = (lanes - len(TAIL_LANES)) // 2 - H0
        return cls(live, value[:, 0] + value[:, 1], field[index].long(), registers)

    def lane(self, name: str) -> Tensor:
        return self.value[:, 2 * (H0 + self.registers) + TAIL_LANES.index(name)]

    def number(self, name: str) -> Tensor:
        return self.field[:, FIELD_LANES.index(name)]

    def sources(self, output: int) -> Tensor:
        width = H0 + self.registers
        return self.value[:, output * width : (output + 1) * width]


def per_sample(v: Tensor, like: Tensor) -> Tensor:
    """[B] → [B, 1, …] with the rank of `like`."""
    return v.reshape(-1, *[1] * (like.dim() - 1))


def weighted_sum(weights: Tensor, values: list[Tensor | None], like: Tensor) -> Tensor:
    """Σ_k w[b, k]·v_k in the state's dtype, w float64 in two parts, low ones first.

    The order is F, D, z, H_0 …, x. A weight of 0 does not read its value: 0·NaN is NaN.
    """
    order = [F, D, Z, *range(H0, weights.shape[1]), X]
    total = torch.zeros_like(like)
    high = weights.to(like.dtype)
    low = (weights - high.double()).to(like.dtype)
    for part in (low, high):
        for k in order:
            value = values[k]
            if value is None:
                continue
            w = per_sample(part[:, k], like)
            gate = per_sample(high[:, k] != 0, like)
            total = total + torch.where(gate, w * value, torch.zeros_like(value))
    return total


def guided_network(
    rows: Rows, network: Tensor, uncond: Tensor | None, guidance: Tensor | None, x: Tensor
) -> Tensor:
    """F = F_u + w·(F_c − F_u) with w = 1 + factor·(guidance − 1), in the state's dtype."""
    if network.shape != x.shape or not network.is_floating_point():
        raise RuntimeError("network: expected a floating tensor of the shape of x")
    f = network.to(x.dtype)
    if uncond is None or guidance is None:
        return f
    w = 1.0 + rows.lane("guidance").to(x.dtype) * (guidance - 1.0)
    u = uncond.to(x.dtype)
    return u + per_sample(w, x) * (f - u)


def row_noise(rows: Rows, keys: Tensor, noise: Tensor | None, x: Tensor) -> Tensor:
    """The given noise, or normals of each sample's own draw and stream."""
    if noise is not None:
        return noise.to(x.dtype)
    numel = x[0].numel()
    words = _philox.sample_words(keys, numel, rows.number("draw"), rows.number("stream"))
    z = _philox.to_normal(words)[:, :numel].to(torch.float32)
    return z.reshape(x.shape).to(x.dtype)
