"""Op `hutchinson_`: the drift of the probability flow and its divergence; see
`sbm_fast.ops.hutchinson` for the formula and the arguments.

One launch: a program does one tile of one sample, of the drift or of one probe's product. Where a
sample takes several tiles, a second launch adds the sums of its tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._philox import in_order, normals, rademacher, sample_words
from ._row import combine, opens, pointers, read, tile_of
from ._sum import sample_sum, sum_in_place


@triton.jit
def parts(c, S: tl.constexpr):
    """A float64 coefficient in two parts of the state's type."""
    hi = c.to(S)
    rest = c - hi.to(tl.float64)
    return hi, tl.where(rest == rest, rest, 0.0).to(S)


@triton.jit
def tile_drift(drift, x, network, coef, column_step, at, S: tl.constexpr):
    """p·x + q·F of a tile."""
    p_hi, p_lo = parts(tl.load(coef), S)
    q_hi, q_lo = parts(tl.load(coef + column_step), S)
    f, state = read(network, at, opens(q_hi), S), read(x, at, opens(p_hi), S)
    v = combine((q_hi, p_hi), (q_lo, p_lo), (f, state))
    tl.store(pointers(drift, at), v, mask=at[3])


@triton.jit
def probe(keys, at, draw, stream, A: tl.constexpr, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """v of a tile."""
    key = tl.load(keys + at[0])
    if GAUSSIAN:
        v = normals(key, at[1], draw, stream, BLOCK)
    else:
        w0, w1, w2, w3 = sample_words(key, at[1], draw, stream, BLOCK)
        v = in_order(rademacher(w0), rademacher(w1), rademacher(w2), rademacher(w3))
    return v.to(A)


@triton.jit
def of_trace(coef, column_step, trace, numel, A: tl.constexpr):
    """p·d + r·trace, in float64 until the end."""
    p, r = tl.load(coef), tl.load(coef + 2 * column_step)
    return tl.fma(r, trace.to(tl.float64), p * tl.cast(numel, tl.float64)).to(A)


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def slope(
    drift, divergence, sums, x, network, product, keys, coef, draw, stream, numel, sizes, tiles,
    batch, sample_step, column_step, product_step,
    GAUSSIAN: tl.constexpr, ON_CHIP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the drift, then of each probe. ON_CHIP: the tile is the sample."""
    program = tl.program_id(0)
    part = program // (batch * tiles)
    at = tile_of(program - part * (batch * tiles), numel, sizes, tiles, WIDE, BLOCK)
    of_sample = coef + at[0] * sample_step
    if part == 0:
        tile_drift(drift, x, network, of_sample, column_step, at, x[0].dtype.element_ty)
    elif product[0] is not None:
        A: tl.constexpr = divergence.dtype.element_ty
        k = part - 1
        of_probe = (product[0] + tl.cast(product_step, tl.int64) * k, product[1])
        value = read(of_probe, at, True, A)
        its_draw = tl.add(draw.to(tl.uint32), k.to(tl.uint32), sanitize_overflow=False)
        trace = sample_sum(value * probe(keys, at, its_draw, stream, A, GAUSSIAN, BLOCK), BLOCK)
        if ON_CHIP:
            result = of_trace(of_sample, column_step, trace, numel, A)
            tl.store(divergence + k.to(tl.int64) * batch + at[0], result)
        else:
            tl.store(sums + (program - batch * tiles), trace)


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def divergence_of_sums(divergence, sums, coef, numel, tiles, batch, sample_step, column_step):
    """One sample's divergence under one probe, from the sums of its tiles."""
    program = tl.program_id(0).to(tl.int64)
    trace = sum_in_place(sums + program * tiles, tiles)
    of_sample = coef + (program % batch) * sample_step
    result = of_trace(of_sample, column_step, trace, numel, divergence.dtype.element_ty)
    tl.store(divergence + program, result)


def hutchinson_(
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
    first = checked_product(drift, divergence, x, network, product, keys, coef)
    if x.numel() == 0:
        if divergence is not None:
            divergence.zero_()
        return
    sizes, found = _launch.views(x.shape, drift=drift, x=x, network=network, product=first)
    count = 0 if product is None else len(product)
    batch = x.shape[0]
    numel = x.numel() // batch
    on_chip = numel <= _launch.ON_CHIP
    options = _launch.configuration(numel, _launch.ON_CHIP if on_chip else _launch.TILE)
    tiles = triton.cdiv(numel, options["BLOCK"])
    sums = None
    if divergence is not None and count and not on_chip:
        sums = divergence.new_empty(count * batch * tiles)
    of_coef = coef.stride()
    _launch.launch(
        slope, (1 + count) * batch * tiles, x,
        found["drift"], divergence if count else None, sums, found["x"], found["network"],
        found["product"], keys, coef, _launch.halves(draw)[0], _launch.halves(stream)[0], numel,
        sizes, tiles, batch, *of_coef, product.stride(0) if product is not None else 0,
        GAUSSIAN=gaussian, ON_CHIP=on_chip, WIDE=_launch.is_wide(numel), **options,
    )  # fmt: skip
    if sums is not None:
        _launch.launch(
            divergence_of_sums, count * batch, x,
            divergence, sums, coef, numel, tiles, batch, *of_coef, num_warps=4,
        )  # fmt: skip


def checked_product(
    drift: Tensor,
    divergence: Tensor | None,
    x: Tensor,
    network: Tensor,
    product: Tensor | None,
    keys: Tensor,
    coef: Tensor,
) -> Tensor | None:
    """The first probe's product, if there is one; RuntimeError for arguments that do not fit."""
    _launch.check_state(x)
    _launch.like_state(drift, x, "drift")
    _launch.require(drift.dtype == x.dtype, "drift: expected the dtype of x")
    _launch.like_state(network, x, "network")
    for name, source in (("x", x), ("network", network)):
        _launch.check_alias(source, drift, name, "drift")
    _launch.vector(keys, x, torch.int64, "keys")
    _launch.table(coef, x, 3, "coef")
    given = (product is None) == (divergence is None)
    _launch.require(given, "product: is given with divergence, and only then")
    if product is None or divergence is None:
        return None
    first = _launch.first_of(product, x, "product")
    apart = not _launch.share_memory(product, drift)
    _launch.require(apart, "product: shares memory with drift, which is written first")
    shape = (len(product), x.shape[0])
    ok = divergence.shape == shape and divergence.is_contiguous()
    ok = ok and divergence.dtype in (torch.float32, torch.float64)
    _launch.require(
        ok and _launch.same_device(divergence, x),
        f"divergence: expected a contiguous float32 or float64 tensor {list(shape)} on {x.device}",
    )
    return first
