"""Device functions that the kernels share: where a tile's elements lie, and the packed row.

The row's formulas and their order are those of csrc/row.h. A view is (tensor, strides), with None
for strides in C order, else those of (sample, merged dimensions …); (None, None) is no tensor. See
`_launch.views`.
"""

import triton
import triton.language as tl

from ._philox import normals
from ._sum import halve, neighbours

# Sources as a packed row stores them; sums take them in the order F, D, z, H_0 …, x.
X, F, D, Z, H0 = (tl.constexpr(k) for k in range(5))
# Lanes behind the two forms: see `sbm_fast.plan.TAIL_LANES`.
P, Q, LIMIT, NEXT_SCALE, NEXT_LABEL, GUIDANCE, STEP_SCALE, SCORE_X, SCORE_F, TAIL = (
    tl.constexpr(k) for k in range(10)
)
SLOT, STREAM, DRAW, NORM, FIELDS = (tl.constexpr(k) for k in range(5))
BATCH_MEAN, SQRT_D = tl.constexpr(1), tl.constexpr(3)


@triton.jit
def tile_of(program, numel, sizes, tiles, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of a program: (sample, first element, lanes, which of them exist, numel, sizes)."""
    tile = program % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    start = tile * BLOCK
    lane = tl.arange(0, BLOCK)
    return (program // tiles).to(tl.int64), start, lane, lane < numel - start, numel, sizes


@triton.jit
def pointers(view, at):
    """Where the tile's elements lie."""
    base, strides = view[0], view[1]
    b, start, lane = at[0], at[1], at[2]
    if strides is None:
        # Four elements a thread whatever their type, as noise is made: nothing changes threads.
        where = tl.max_contiguous(base + (b * at[4] + start) + lane, 4)
    else:
        sizes = at[5]
        DIMS: tl.constexpr = len(strides) - 1
        index = start + lane
        offset = index.to(tl.int64) * 0 + b * strides[0]
        for d in tl.static_range(DIMS):
            if d < DIMS - 1:
                position = index % sizes[DIMS - 2 - d]
                index = index // sizes[DIMS - 2 - d]
            else:
                position = index
            offset = offset + position.to(tl.int64) * strides[DIMS - d]
        where = base + offset
    return where


@triton.jit
def read(view, at, gate, S: tl.constexpr):
    """The tile in the state's type; zeros, unread, where the gate is shut."""
    return tl.load(pointers(view, at), mask=at[3] & gate, other=0.0).to(S)


@triton.jit
def opens(coefficient):
    """The gate of what this number multiplies. By way of an integer: a scalar of floats compared
    cannot mask a load in Triton's interpreter."""
    return (coefficient != 0).to(tl.int32) != 0


@triton.jit
def sources(lanes, FIRST: tl.constexpr, REGISTERS: tl.constexpr):
    """Coefficients of the form that begins at lane FIRST, as (F, D, z, H_0 …, x)."""
    c = (tl.load(lanes + FIRST + F), tl.load(lanes + FIRST + D), tl.load(lanes + FIRST + Z))
    for k in tl.static_range(REGISTERS):
        c = c + (tl.load(lanes + FIRST + H0 + k),)
    return c + (tl.load(lanes + FIRST + X),)


@triton.jit
def combine(hi, lo, values):
    """Σ (hi_k + lo_k)·v_k, the low parts first; a value whose coefficient is 0 does not count."""
    total = tl.zeros_like(values[0])
    for k in tl.static_range(len(values)):
        total = tl.fma(lo[k], tl.where(hi[k] != 0, values[k], 0.0), total)
    for k in tl.static_range(len(values)):
        total = tl.fma(hi[k], tl.where(hi[k] != 0, values[k], 0.0), total)
    return total


@triton.jit
def form(lanes, A: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, f, x):
    """The form of F and x whose coefficients stand at lanes A and B."""
    hi = (tl.load(lanes + B), tl.load(lanes + A))
    lo = (tl.load(lanes + LANES + B), tl.load(lanes + LANES + A))
    return combine(hi, lo, (f, x))


@triton.jit
def guided_network(network, uncond, guidance, factor, at, gate, S: tl.constexpr):
    """F_u + w·(F_c − F_u) with w = 1 + factor·(guidance − 1), or F_c; NaN for a missing network."""
    if network[0] is None:
        f = tl.where(at[3] & gate, float("nan"), 0.0).to(S)
    else:
        f = read(network, at, gate, S)
        if uncond[0] is not None:
            u = read(uncond, at, gate, S)
            w = tl.fma(tl.load(factor), tl.load(guidance + at[0]) - 1.0, 1.0)
            f = tl.where(gate, tl.fma(w, f - u, u), f)  # a weight may be infinite
    return f


@triton.jit
def row_noise(noise, keys, numbers, at, gate, S: tl.constexpr, BLOCK: tl.constexpr):
    """The given noise, or normals of the sample's own draw and stream; zeros outside the tile."""
    if noise[0] is None:
        z = tl.zeros([BLOCK], S)
        key = tl.load(keys + at[0])
        stream, draw = tl.load(numbers + STREAM), tl.load(numbers + DRAW)
        if gate:
            z = normals(key, at[1], draw, stream, BLOCK).to(S)
            z = tl.where(at[3], z, 0.0)
    else:
        z = read(noise, at, gate, S)
    return z


@triton.jit
def float64_of(low, high):
    """A float64 from the halves of its bits."""
    bits = low.to(tl.uint32).to(tl.uint64) | (high.to(tl.uint32).to(tl.uint64) << 32)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def root(v):
    """IEEE square root."""
    return tl.sqrt_rn(v) if v.dtype == tl.float32 else tl.sqrt(v)


@triton.jit
def divide(a, b):
    """IEEE quotient."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def squares(s, z):
    """(s², z²) [BLOCK, 2]: both norms are summed in one tree."""
    return tl.join(s * s, z * z)


@triton.jit
def norms(sums):
    """The roots of a pair of sums."""
    first, second = tl.split(sums)
    return root(first), root(second)


@triton.jit
def sample_norms(s, z, BLOCK: tl.constexpr):
    """‖s‖ and ‖z‖ of a whole sample, by the fixed tree."""
    return norms(neighbours(halve(squares(s, z), BLOCK), BLOCK // min(BLOCK, 1024)))


@triton.jit
def step_size(scale, norm, noise_norm, score_norm, numel, S: tl.constexpr):
    """ε = scale·(‖z‖/‖s‖)², 0 where the score vanishes; ‖z‖ is √numel at a row `sqrt_d`."""
    above = tl.where(norm == SQRT_D, root(tl.cast(numel, S)), noise_norm)
    ratio = divide(above, score_norm)
    return tl.where(score_norm == 0.0, 0.0, scale * ratio * ratio)
