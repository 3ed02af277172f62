"""Philox4x32-10 and its transforms in plain torch: the reference of every noise op.

Words live in int64 tensors (0 ≤ w < 2³²), because torch has no unsigned arithmetic.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
ROUNDS = 10
KEY_DOMAIN = 0x53424D  # "SBM": separates key derivation from the noise itself
_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four output words of Philox4x32-10 for broadcastable counters and keys."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The int64 product wraps, but its 64 bits are those of the unsigned one.
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (
            (p1 >> 32) & _MASK ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32) & _MASK ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + W0) & _MASK, (k1 + W1) & _MASK
    return c0, c1, c2, c3


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high word of an int64 tensor."""
    return x & _MASK, (x >> 32) & _MASK


def sample_keys(seed: int, first_sample: int, out: Tensor) -> None:
    """key[b] = low and high word of Philox(counter=(b_lo, b_hi, "SBM", 0), key=seed)."""
    index = torch.arange(out.shape[0], device=out.device) + first_sample
    b_lo, b_hi = split(index)
    zero = torch.zeros_like(index)
    s_lo, s_hi = split(torch.full_like(index, seed))
    w0, w1, _, _ = philox((b_lo, b_hi, zero + KEY_DOMAIN, zero), (s_lo, s_hi))
    out.copy_(w0 | (w1 << 32))


def sample_words(keys: Tensor, numel: int, draw: int | Tensor, stream: int | Tensor) -> Words:
    """Words of elements 4j … 4j+3 of every sample, four int64 tensors [B, ⌈numel/4⌉].

    draw, stream: an int, or int64 [B] when samples stand at different rows.
    """
    j = torch.arange((numel + 3) // 4, device=keys.device)[None]
    j_lo, j_hi = split(j)
    k_lo, k_hi = split(keys[:, None])
    zero = torch.zeros_like(k_lo)

    def column(v: int | Tensor) -> Tensor:
        return (v.to(torch.int64)[:, None] if isinstance(v, Tensor) else zero + v) & _MASK

    return philox((j_lo, j_hi, column(draw), column(stream)), (k_lo, k_hi))


def to_uniform(w: Tensor) -> Tensor:
    """u(w) = fma(float32(w), 2⁻³², 2⁻³³) in float32, a value in (0, 1].

    In float64 the product and the sum are exact, so one rounding is left, as in the fma.
    """
    return (w.to(torch.float32).to(torch.float64) * 2.0**-32 + 2.0**-33).to(torch.float32)


def to_normal(words: Words) -> Tensor:
    """Box–Muller, evaluated in float64 on the float32 uniforms; float64 [B, 4⌈numel/4⌉].

    z0 = r cos 2πu(w1), z1 = r sin 2πu(w1), r = √(−2 ln u(w0)); z2, z3 likewise from w2, w3.
    """
    z = []
    for radius_word, angle_word in (words[:2], words[2:]):
        r = torch.sqrt(-2.0 * torch.log(to_uniform(radius_word).double()))
        angle = 2.0 * math.pi * to_uniform(angle_word).double()
        z += [r * torch.cos(angle), r * torch.sin(angle)]
    return torch.stack(z, dim=-1).flatten(1)


def _each_word(transform: Callable[[Tensor], Tensor]) -> Callable[[Words], Tensor]:
    return lambda words: torch.stack([transform(w) for w in words], dim=-1).flatten(1)


uniforms = _each_word(to_uniform)
signs = _each_word(lambda w: 1.0 - 2.0 * (w >> 31))
words_int32 = _each_word(lambda w: torch.where(w >= 2**31, w - 2**32, w).to(torch.int32))
