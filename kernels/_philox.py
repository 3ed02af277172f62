"""Philox4x32-10 and its transforms; the same operations, in the same order, as csrc/philox.h and
csrc/gaussian.h, so that every backend gives the same bits.

Fused multiply-adds are spelled out: launches switch the compiler's own fusion off.
"""

import triton
import triton.language as tl

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)  # multipliers
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)  # Weyl increments of the key
KEY_DOMAIN = tl.constexpr(0x53424D)  # "SBM": separates key derivation from the noise itself


@triton.jit
def split(v):
    """Low and high word of a 64-bit integer."""
    v = v.to(tl.uint64)
    return v.to(tl.uint32), (v >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four output words for uint32 counters and keys (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, W0, sanitize_overflow=False)
        k1 = tl.add(k1, W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def sample_words(key, start, draw, stream, BLOCK: tl.constexpr):
    """Words of elements start … start + BLOCK − 1 of a sample, as four blocks of BLOCK / 4.

    start is a multiple of BLOCK, a power of two ≥ 4, so that the counter's low word never carries.
    """
    low, high = split(key)
    first_low, first_high = split(start // 4)
    j = first_low + tl.arange(0, BLOCK // 4).to(tl.uint32)
    return philox(j, first_high, draw.to(tl.uint32), stream.to(tl.uint32), low, high)


@triton.jit
def in_order(v0, v1, v2, v3):
    """Element 4j + k from v_k[j]."""
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def uniform(w):
    """u(w) = fma(float32(w), 2⁻³², 2⁻³³), in (0, 1]."""
    return tl.fma(w.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def rademacher(w):
    """±1 by the word's top bit."""
    return ((w & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def minus_two_log(u):
    """−2 ln u: u = 2ᵉ·(1+f) with 1+f in [√½, √2), and a minimax fit in f (see csrc/gaussian.h)."""
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # bits of √½
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    f4 = f2 * f2
    c01 = tl.fma(f, 0.500016450881958, -0.6666666269302368)
    c23 = tl.fma(f, 0.33246713876724243, -0.40002453327178955)
    c45 = tl.fma(f, 0.263203889131546, -0.28403523564338684)
    c67 = tl.fma(f, 0.15268859267234802, -0.25523099303245544)
    y = tl.fma(tl.fma(tl.fma(c67, f2, c45), f4, tl.fma(c23, f2, c01)), f, 1.0)
    # ln 2 = 0.693359375 − 2.12194440e-4: the first part times e is exact.
    y = tl.fma(y, f2, e * 4.24388880e-4)
    return tl.fma(e, -1.38671875, tl.fma(f, -2.0, y))


@triton.jit
def cos_sin_turn(u):
    """cos 2πu and sin 2πu: 4u = k + r with |r| ≤ ½, then minimax fits in r²."""
    # Adding 1.5·2²³ rounds to the nearest integer, ties to even, and leaves k in the low bits.
    shifted = tl.fma(u, 4.0, 12582912.0)
    k = shifted.to(tl.uint32, bitcast=True)
    r = tl.fma(u, 4.0, 12582912.0 - shifted)
    r2 = r * r
    sine = tl.fma(r2, -0.00460165785625577, 0.07968003302812576)
    sine = tl.fma(sine, r2, -0.6459634900093079)
    sine = tl.fma(sine, r2, 1.5707963705062866) * r
    cosine = tl.fma(r2, 0.0009040216100402176, -0.02086028829216957)
    cosine = tl.fma(cosine, r2, 0.25366923213005066)
    cosine = tl.fma(cosine, r2, -1.2337005138397217)
    cosine = tl.fma(cosine, r2, 1.0)
    # Quadrant k: (c, s), (−s, c), (−c, −s), (s, −c).
    odd = (k & 1) != 0
    c = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ (((k + 1) & 2) << 30)
    s = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ ((k & 2) << 30)
    return c.to(tl.float32, bitcast=True), s.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(w_radius, w_angle):
    """z0 = r cos 2πu(w_angle), z1 = r sin 2πu(w_angle), r = √(−2 ln u(w_radius))."""
    r = tl.sqrt_rn(minus_two_log(uniform(w_radius)))
    c, s = cos_sin_turn(uniform(w_angle))
    return r * c, r * s


@triton.jit
def normals(key, start, draw, stream, BLOCK: tl.constexpr):
    """float32 normals of elements start … start + BLOCK − 1, four of every Philox call."""
    w0, w1, w2, w3 = sample_words(key, start, draw, stream, BLOCK)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)
