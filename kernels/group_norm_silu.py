"""Op `group_norm_silu_`: h = gain·(x + add + residual), GroupNorm, scale and shift, SiLU; see
`sbm_fast.ops.group_norm_silu` for the formula and the arguments.

A program holds whole groups where they fit on chip: one reading, one writing, the variance from
deviations of the mean. Elsewhere programs of a first launch go through chunks of pixels with
Welford's update, and those of a second merge the chunks' statistics, then read x again, in the
opposite order: what was read last lies in L2. See `_groups.cut` for the rule.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._groups import (
    UNSPECIALISED,
    Sizes,
    affine,
    groups_of,
    inverse_root,
    lanes_of,
    over_group,
    over_pixels,
    read,
    read_lanes,
    sigmoid,
    spread,
    tile_at,
    values_of_group,
    write,
)
from ._row import divide, float64_of

VALUES = 64  # of a tile that a thread holds: h


@triton.jit
def summed(x, residual, add, add_step, gain, at, lanes, A: tl.constexpr, WHOLE: tl.constexpr):
    """h of a tile; anything where nothing is."""
    h = read(x, at, A, WHOLE)
    if add is not None:
        h += read_lanes(add, at[0], add_step, lanes, A)[None, :]
    if residual[0] is not None:
        h += read(residual, at, A, WHOLE)
    return h * gain


@triton.jit
def activated(n, SILU: tl.constexpr):
    return n * sigmoid(n) if SILU else n


@triton.jit
def finish(out, deviation, factor, beta, at, SILU: tl.constexpr, WHOLE: tl.constexpr):
    """Writes act(deviation·factor + β)."""
    n = tl.fma(deviation, factor[None, :], tl.broadcast_to(beta[None, :], deviation.shape))
    write(out, at, activated(n, SILU), WHOLE)


@triton.jit(do_not_specialize=UNSPECIALISED)
def hold(
    out, total, stats, x, weight, bias, scale, shift, add, residual, scale_step, shift_step,
    add_step, eps_low, eps_high, gain_low, gain_high, pixels, groups, slices,
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """All pixels of some groups of one sample."""
    A: tl.constexpr = stats.dtype.element_ty
    b, slice = (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices
    lanes = lanes_of(slice, groups, D, DEPTH, GROUPS)
    at = tile_at(b, 0, pixels, lanes, PIXELS, WIDE)
    gain = float64_of(gain_low, gain_high).to(A)
    h = summed(x, residual, add, add_step, gain, at, lanes, A, WHOLE)
    if total[0] is not None:
        write(total, at, h, WHOLE)
    count = values_of_group(pixels, D, A)
    kept = h if WHOLE else tl.where(at[3], h, 0.0)
    mean = divide(over_group(kept, DEPTH, GROUPS, PIXELS, LAST), count)
    deviation = h - spread(mean, DEPTH, GROUPS)[None, :]
    kept = deviation if WHOLE else tl.where(at[3], deviation, 0.0)
    squares = over_group(kept * kept, DEPTH, GROUPS, PIXELS, LAST)
    r = inverse_root(divide(squares, count), float64_of(eps_low, eps_high).to(A))
    where, exists = groups_of(b, slice, groups, GROUPS)
    tl.store(stats + 2 * where, mean, mask=exists)
    tl.store(stats + 2 * where + 1, r, mask=exists)
    gamma, beta = affine(weight, bias, scale, shift, scale_step, shift_step, b, lanes, A)
    factor = gamma * spread(r, DEPTH, GROUPS)
    finish(out, deviation, factor, beta, at, SILU, WHOLE)


@triton.jit
def values_of_chunk(chunk, tiles, pixels, D: tl.constexpr, PIXELS: tl.constexpr):
    """How many values of a group a chunk has."""
    begin = chunk * (tiles * PIXELS)
    return tl.minimum(pixels - begin, tiles * PIXELS) * D


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_statistics(
    partial, x, add, residual, add_step, gain_low, gain_high, pixels, groups, slices,
    chunks, tiles,
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Mean of h and Σ (h − mean)² of a chunk of pixels of some groups of one sample."""
    A: tl.constexpr = partial.dtype.element_ty
    slice = tl.program_id(0) % slices
    chunk = tl.program_id(0) // slices % chunks
    b = (tl.program_id(0) // slices // chunks).to(tl.int64)
    lanes = lanes_of(slice, groups, D, DEPTH, GROUPS)
    gain = float64_of(gain_low, gain_high).to(A)
    mean = tl.zeros([PIXELS, GROUPS * DEPTH], A)
    squares = tl.zeros([PIXELS, GROUPS * DEPTH], A)
    counts = tl.zeros([PIXELS], A)
    for tile in range(tiles):
        at = tile_at(b, (chunk * tiles + tile) * PIXELS, pixels, lanes, PIXELS, WIDE)
        h = summed(x, residual, add, add_step, gain, at, lanes, A, WHOLE)
        # Every lane has its own statistics: nothing crosses threads before the end.
        deviation = h - mean if WHOLE else tl.where(at[3], h - mean, 0.0)
        step = deviation * divide(gain * 0.0 + 1.0, tl.cast(tile + 1, A))
        mean += step
        squares = tl.fma(deviation, deviation - step, squares)
        counts += (at[1] < pixels).to(A)
    total = values_of_chunk(chunk, tiles, pixels, D, PIXELS).to(A)
    weight = counts[:, None] * lanes[1].to(A)[None, :]
    centre = divide(over_group(weight * mean, DEPTH, GROUPS, PIXELS, LAST), total)
    apart = mean - spread(centre, DEPTH, GROUPS)[None, :]
    squares += weight * apart * apart
    where, exists = groups_of(b * chunks + chunk, slice, groups, GROUPS)
    tl.store(partial + 2 * where, centre, mask=exists)
    squares = over_group(squares, DEPTH, GROUPS, PIXELS, LAST)
    tl.store(partial + 2 * where + 1, squares, mask=exists)


@triton.jit
def merged(
    partial, b, slice, eps, pixels, groups, chunks, tiles, D: tl.constexpr, GROUPS: tl.constexpr,
    PIXELS: tl.constexpr, CHUNKS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Mean and 1/√(variance + eps) of a slice's groups, from all their chunks."""
    chunk = tl.arange(0, CHUNKS)
    where, exists = groups_of((b * chunks + chunk)[:, None], slice, groups, GROUPS)
    exists &= (chunk < chunks)[:, None]
    means = tl.load(partial + 2 * where, mask=exists, other=0.0)
    squares = tl.load(partial + 2 * where + 1, mask=exists, other=0.0)
    values = values_of_chunk(chunk, tiles, pixels, D, PIXELS).to(A)
    values = tl.where(chunk < chunks, values, 0.0)[:, None]
    count = values_of_group(pixels, D, A)
    mean = divide(over_pixels(values * means, CHUNKS), count)
    apart = means - mean[None, :]
    variance = divide(over_pixels(tl.fma(values * apart, apart, squares), CHUNKS), count)
    return mean, inverse_root(variance, eps)


@triton.jit(do_not_specialize=UNSPECIALISED)
def normalise_chunk(
    out, total, stats, partial, x, weight, bias, scale, shift, add, residual, scale_step,
    shift_step, add_step, eps_low, eps_high, gain_low, gain_high, pixels, groups, slices,
    chunks, tiles,
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    CHUNKS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """The rest of the op on a chunk; programs come in the opposite order."""
    A: tl.constexpr = stats.dtype.element_ty
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slice, chunk = program % slices, program // slices % chunks
    b = (program // slices // chunks).to(tl.int64)
    eps = float64_of(eps_low, eps_high).to(A)
    mean, r = merged(
        partial, b, slice, eps, pixels, groups, chunks, tiles, D, GROUPS, PIXELS, CHUNKS, A
    )
    if chunk == 0:
        where, exists = groups_of(b, slice, groups, GROUPS)
        tl.store(stats + 2 * where, mean, mask=exists)
        tl.store(stats + 2 * where + 1, r, mask=exists)
    lanes = lanes_of(slice, groups, D, DEPTH, GROUPS)
    gain = float64_of(gain_low, gain_high).to(A)
    gamma, beta = affine(weight, bias, scale, shift, scale_step, shift_step, b, lanes, A)
    factor, centre = gamma * spread(r, DEPTH, GROUPS), spread(mean, DEPTH, GROUPS)[None, :]
    for tile in range(tiles):
        start = (chunk * tiles + (tiles - 1 - tile)) * PIXELS
        at = tile_at(b, start, pixels, lanes, PIXELS, WIDE)
        h = summed(x, residual, add, add_step, gain, at, lanes, A, WHOLE)
        if total[0] is not None:
            write(total, at, h, WHOLE)
        finish(out, h - centre, factor, beta, at, SILU, WHOLE)


def group_norm_silu_(
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
    sizes = Sizes(x, groups, "x")
    of_x, of_residual = sizes.view(x, "x"), sizes.view(residual, "residual")
    of_tensors = (
        sizes.view(out, "out", written=True), sizes.view(total, "total", written=True),
    )  # fmt: skip
    sizes.row(weight, "weight", shared=True)
    sizes.row(bias, "bias", shared=True)
    steps = sizes.row(scale, "scale"), sizes.row(shift, "shift"), sizes.row(add, "add")
    sizes.pairs(stats, groups, "stats")
    for name, t in (("x", x), ("residual", residual)):
        _launch.check_alias(t, out, name, "out")
    if total is not None:
        for name, t in (("x", x), ("residual", residual), ("out", out)):
            apart = t is None or not _launch.share_memory(total, t)
            _launch.require(apart, f"total: shares memory with {name}")
    if x.numel() == 0:
        stats.zero_()
        return
    how = sizes.cut(VALUES)
    parameters = (weight, bias, scale, shift, add, of_residual, *steps)
    of_eps, of_gain = _launch.halves_of_float(eps), _launch.halves_of_float(gain)
    of_sizes = (sizes.pixels, groups, how.slices)
    if how.held:
        _launch.launch(
            hold, sizes.batch * how.slices, x,
            *of_tensors, stats, of_x, *parameters, *of_eps, *of_gain, *of_sizes,
            SILU=silu, **how.constants,
        )  # fmt: skip
        return
    programs = sizes.batch * how.slices * how.chunks
    partial = stats.new_empty(sizes.batch * how.chunks * groups * 2)
    _launch.launch(
        chunk_statistics, programs, x,
        partial, of_x, add, of_residual, steps[2], *of_gain, *of_sizes, how.chunks, how.tiles,
        **how.constants,
    )  # fmt: skip
    _launch.launch(
        normalise_chunk, programs, x,
        *of_tensors, stats, partial, of_x, *parameters, *of_eps, *of_gain, *of_sizes, how.chunks,
        how.tiles, CHUNKS=triton.next_power_of_2(how.chunks), SILU=silu, **how.constants,
    )  # fmt: skip
