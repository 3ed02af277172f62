"""Op `group_norm_silu_product_`: the product of the Jacobian of `group_norm_silu_` with a tensor,
from the left (backward) or from the right (forward-mode); see `sbm_fast.ops.group_norm_silu`.

Both need two sums over each group, of t and of t·x̂, with t = silu'(n)·given before the
normalisation's projection, which is its own transpose, or t = gain·given. Backward, t's sums over
the pixels of one channel are wanted too, and weighted by γ they make those of the group. Programs
hold groups, or read them twice, as those of `group_norm_silu_`.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._groups import (
    UNSPECIALISED,
    affine,
    checked_groups,
    checked_stats,
    cut,
    groups_of,
    lanes_of,
    over_lanes,
    over_pixels,
    read,
    read_lanes,
    rows_of,
    sigmoid,
    spread,
    tile_at,
    view,
    write,
)
from ._row import divide, float64_of

VALUES = 32  # of a tile that a thread holds, of x̂ and of t each


@triton.jit
def lanes_stats(stats, b, slice, groups, DEPTH: tl.constexpr, GROUPS: tl.constexpr):
    """Mean and 1/√(variance + eps) of the lanes."""
    where, exists = groups_of(b, slice, groups, GROUPS)
    mean = tl.load(stats + 2 * where, mask=exists, other=0.0)
    r = tl.load(stats + 2 * where + 1, mask=exists, other=0.0)
    return spread(mean, DEPTH, GROUPS), spread(r, DEPTH, GROUPS)


@triton.jit
def slope(n, SILU: tl.constexpr):
    """silu'(n), or 1."""
    if SILU:
        s = sigmoid(n)
        v = s * tl.fma(n, 1.0 - s, 1.0)
    else:
        v = n * 0.0 + 1.0
    return v


@triton.jit
def at_n(normal, gamma, beta):
    return tl.fma(normal, gamma[None, :], tl.broadcast_to(beta[None, :], normal.shape))


@triton.jit
def normal_and_t(
    h, given, of_stats, of_affine, gain, at,
    SILU: tl.constexpr, FORWARD: tl.constexpr, WHOLE: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """x̂ and t of a tile; t is 0 where nothing is."""
    normal = (read(h, at, A, WHOLE) - of_stats[0][None, :]) * of_stats[1][None, :]
    t = read(given, at, A, WHOLE)
    if FORWARD:
        t *= gain
    elif SILU:
        t *= slope(at_n(normal, of_affine[0], of_affine[1]), SILU)
    return normal, t


@triton.jit
def group_sums(
    normal_sum, plain_sum, gamma, DEPTH: tl.constexpr, GROUPS: tl.constexpr, FORWARD: tl.constexpr
):  # fmt: skip
    """Sums over each group of g·x̂ and g, from those over pixels of t·x̂ and t."""
    if not FORWARD:
        normal_sum, plain_sum = normal_sum * gamma, plain_sum * gamma
    return over_lanes(normal_sum, DEPTH, GROUPS), over_lanes(plain_sum, DEPTH, GROUPS)


@triton.jit
def means_of(of_group, pixels, D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr):
    """Means over each group, on its lanes."""
    count = (pixels * D).to(of_group[0].dtype)
    normal_mean, plain_mean = divide(of_group[0], count), divide(of_group[1], count)
    return spread(normal_mean, DEPTH, GROUPS), spread(plain_mean, DEPTH, GROUPS)


@triton.jit
def project(
    out, normal, t, means, of_stats, of_affine, gain, dots, at,
    SILU: tl.constexpr, FORWARD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes gain·P(γ·t), or silu'(n)·(γ·P(t) + x̂·γ̇ + β̇)."""
    gamma, r = of_affine[0][None, :], of_stats[1][None, :]
    if FORWARD:
        v = gamma * (r * (t - means[1][None, :] - normal * means[0][None, :]))
        v += normal * dots[0][None, :] + dots[1][None, :]
        v *= slope(at_n(normal, of_affine[0], of_affine[1]), SILU)
    else:
        v = (gain * r) * (gamma * t - means[1][None, :] - normal * means[0][None, :])
    write(out, at, v, WHOLE)


@triton.jit
def dots_of(
    weight_dot, bias_dot, weight_dot_step, bias_dot_step, b, lanes, A: tl.constexpr
):  # fmt: skip
    of_weight = tl.zeros(lanes[0].shape, A)
    of_bias = of_weight
    if weight_dot is not None:
        of_weight = read_lanes(weight_dot, b, weight_dot_step, lanes, A)
    if bias_dot is not None:
        of_bias = read_lanes(bias_dot, b, bias_dot_step, lanes, A)
    return of_weight, of_bias


@triton.jit
def store_pair(to, where, exists, pair):
    tl.store(to + 2 * where, pair[0], mask=exists)
    tl.store(to + 2 * where + 1, pair[1], mask=exists)


@triton.jit
def over_chunks(partial, where, exists, CHUNKS: tl.constexpr):
    """Sums of a pair of values over the chunks, the first dimension of `where`."""
    first = over_pixels(tl.load(partial + 2 * where, mask=exists, other=0.0), CHUNKS)
    second = over_pixels(tl.load(partial + 2 * where + 1, mask=exists, other=0.0), CHUNKS)
    return first, second


@triton.jit(do_not_specialize=UNSPECIALISED)
def hold_product(
    out, sums, given, h, stats, weight, bias, scale, shift, weight_dot, bias_dot, scale_step,
    shift_step, weight_dot_step, bias_dot_step, gain_low, gain_high, pixels, image, groups, slices,
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """All pixels of some groups of one sample."""
    A: tl.constexpr = stats.dtype.element_ty
    b, slice = (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices
    lanes = lanes_of(slice, groups, D, DEPTH, GROUPS)
    at = tile_at(b, 0, pixels, image, lanes, PIXELS, WIDE)
    gain = float64_of(gain_low, gain_high).to(A)
    of_stats = lanes_stats(stats, b, slice, groups, DEPTH, GROUPS)
    of_affine = affine(weight, bias, scale, shift, scale_step, shift_step, b, lanes, A)
    normal, t = normal_and_t(h, given, of_stats, of_affine, gain, at, SILU, FORWARD, WHOLE, A)
    normal_sum, plain_sum = over_pixels(t * normal, PIXELS), over_pixels(t, PIXELS)
    if sums is not None:
        store_pair(sums, b * (groups * D) + lanes[0], lanes[1], (normal_sum, plain_sum))
    of_group = group_sums(normal_sum, plain_sum, of_affine[0], DEPTH, GROUPS, FORWARD)
    means = means_of(of_group, pixels, D, DEPTH, GROUPS)
    dots = dots_of(weight_dot, bias_dot, weight_dot_step, bias_dot_step, b, lanes, A)
    project(out, normal, t, means, of_stats, of_affine, gain, dots, at, SILU, FORWARD, WHOLE)


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_sums(
    partial, by_channel, given, h, stats, weight, bias, scale, shift, scale_step, shift_step,
    gain_low, gain_high, pixels, image, groups, slices, chunks, tiles,
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of pixels, of t·x̂ and t for channels and of g·x̂ and g for groups."""
    A: tl.constexpr = stats.dtype.element_ty
    slice = tl.program_id(0) % slices
    chunk = tl.program_id(0) // slices % chunks
    b = (tl.program_id(0) // slices // chunks).to(tl.int64)
    lanes = lanes_of(slice, groups, D, DEPTH, GROUPS)
    gain = float64_of(gain_low, gain_high).to(A)
    of_stats = lanes_stats(stats, b, slice, groups, DEPTH, GROUPS)
    of_affine = affine(weight, bias, scale, shift, scale_step, shift_step, b, lanes, A)
    normal_sum = tl.zeros([PIXELS, GROUPS * DEPTH], A)
    plain_sum = tl.zeros([PIXELS, GROUPS * DEPTH], A)
    for tile in range(tiles):
        at = tile_at(b, (chunk * tiles + tile) * PIXELS, pixels, image, lanes, PIXELS, WIDE)
        normal, t = normal_and_t(h, given, of_stats, of_affine, gain, at, SILU, FORWARD, WHOLE, A)
        normal_sum = tl.fma(t, normal, normal_sum)
        plain_sum += t
    row = b * chunks + chunk
    normal_sum, plain_sum = over_pixels(normal_sum, PIXELS), over_pixels(plain_sum, PIXELS)
    if by_channel is not None:
        store_pair(by_channel, row * (groups * D) + lanes[0], lanes[1], (normal_sum, plain_sum))
    of_group = group_sums(normal_sum, plain_sum, of_affine[0], DEPTH, GROUPS, FORWARD)
    where, exists = groups_of(row, slice, groups, GROUPS)
    store_pair(partial, where, exists, of_group)


@triton.jit(do_not_specialize=UNSPECIALISED)
def project_chunk(
    out, sums, partial, by_channel, given, h, stats, weight, bias, scale, shift, weight_dot, bias_dot,
    scale_step, shift_step, weight_dot_step, bias_dot_step, gain_low, gain_high, pixels, image,
    groups, slices, chunks, tiles,
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    CHUNKS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr,
    FORWARD: tl.constexpr,
):  # fmt: skip
    """The rest of the op on a chunk; programs come in the opposite order."""
    A: tl.constexpr = stats.dtype.element_ty
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slice, chunk = program % slices, program // slices % chunks
    b = (program // slices // chunks).to(tl.int64)
    lanes = lanes_of(slice, groups, D, DEPTH, GROUPS)
    row = (b * chunks + tl.arange(0, CHUNKS))[:, None]
    in_use = (tl.arange(0, CHUNKS) < chunks)[:, None]
    where, exists = groups_of(row, slice, groups, GROUPS)
    of_group = over_chunks(partial, where, in_use & exists, CHUNKS)
    means = means_of(of_group, pixels, D, DEPTH, GROUPS)
    if sums is not None:
        if chunk == 0:
            where = row * (groups * D) + lanes[0][None, :]
            pair = over_chunks(by_channel, where, in_use & lanes[1][None, :], CHUNKS)
            store_pair(sums, b * (groups * D) + lanes[0], lanes[1], pair)
    gain = float64_of(gain_low, gain_high).to(A)
    of_stats = lanes_stats(stats, b, slice, groups, DEPTH, GROUPS)
    of_affine = affine(weight, bias, scale, shift, scale_step, shift_step, b, lanes, A)
    dots = dots_of(weight_dot, bias_dot, weight_dot_step, bias_dot_step, b, lanes, A)
    for tile in range(tiles):
        start = (chunk * tiles + (tiles - 1 - tile)) * PIXELS
        at = tile_at(b, start, pixels, image, lanes, PIXELS, WIDE)
        normal, t = normal_and_t(h, given, of_stats, of_affine, gain, at, SILU, FORWARD, WHOLE, A)
        project(out, normal, t, means, of_stats, of_affine, gain, dots, at, SILU, FORWARD, WHOLE)


def group_norm_silu_product_(
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
    checked_groups(h, groups, "h")
    checked_stats(stats, h, groups)
    for name, t in (("h", h), ("out", out), ("given", given)):
        _launch.like_state(t, h, name)
    for name, t in (("weight", weight), ("bias", bias)):
        rows_of(t, h, name, per_sample=False)
    steps = [rows_of(t, h, n) for n, t in (("scale", scale), ("shift", shift))]
    of_dots = (("weight_dot", weight_dot), ("bias_dot", bias_dot))
    dot_steps = [rows_of(t, h, n) for n, t in of_dots]
    checked_sums(sums, h, stats, forward)
    if h.numel() == 0:
        if sums is not None:
            sums.zero_()
        return
    batch, channels = h.shape[:2]
    image = h.numel() // batch
    pixels = image // channels
    of_h = view(h, "h")
    tensors = (view(given, "given"), of_h, stats, weight, bias, scale, shift)
    of_out = view(out, "out")
    how = cut(batch, channels, pixels, groups, h.dtype, of_h[1][1] == 1, VALUES)
    of_gain = _launch.halves_of_float(gain)
    of_sizes = (pixels, image, groups, how.slices)
    of_chunks = (how.chunks, how.tiles)
    options = {"SILU": silu, "FORWARD": forward, **how.constants}
    if how.held:
        _launch.launch(
            hold_product, batch * how.slices, h,
            of_out, sums, *tensors, weight_dot, bias_dot, *steps, *dot_steps, *of_gain, *of_sizes,
            **options,
        )  # fmt: skip
        return
    programs = batch * how.slices * how.chunks
    partial = stats.new_empty(batch * how.chunks * groups * 2)
    by_channel = None if sums is None else stats.new_empty(batch * how.chunks * channels * 2)
    partials = (partial, by_channel)
    _launch.launch(
        chunk_sums, programs, h, *partials, *tensors, *steps, *of_gain, *of_sizes, *of_chunks,
        **options,
    )  # fmt: skip
    _launch.launch(
        project_chunk, programs, h,
        of_out, sums, *partials, *tensors, weight_dot, bias_dot, *steps, *dot_steps, *of_gain,
        *of_sizes, *of_chunks, CHUNKS=triton.next_power_of_2(how.chunks), **options,
    )  # fmt: skip


def checked_sums(sums: Tensor | None, h: Tensor, stats: Tensor, forward: bool) -> None:
    if sums is None:
        return
    _launch.require(not forward, "sums: are made backward only")
    shape = (*h.shape[:2], 2)
    ok = sums.shape == shape and sums.dtype == stats.dtype and sums.is_contiguous()
    _launch.require(
        ok and _launch.same_device(sums, h),
        f"sums: expected a contiguous {stats.dtype} tensor {list(shape)} on {h.device}",
    )
