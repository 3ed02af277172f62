"""Op `affine_step_`: one row of a plan applied to every sample; see `sbm_fast.ops.affine_step` for
the formula and the arguments.

A program does one tile of one sample. What a shut gate names is not loaded: its mask is false.
A row with a norm takes the launches of `langevin_epsilon` first, or none where the whole sample
fits a program and `coupled` is False.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._row import (
    BATCH_MEAN,
    FIELDS,
    GUIDANCE,
    H0,
    LIMIT,
    NEXT_LABEL,
    NEXT_SCALE,
    NORM,
    SCORE_F,
    SCORE_X,
    SLOT,
    STEP_SCALE,
    TAIL,
    P,
    Q,
    combine,
    form,
    guided_network,
    pointers,
    read,
    row_noise,
    sample_norms,
    sources,
    step_size,
    tile_of,
)  # fmt: skip
from .langevin_epsilon import step_sizes


@triton.jit
def note_bad(first_bad, f, at, r):
    """Writes the row where F is not finite and nothing was noted: all tiles write the same."""
    bad = tl.max((~(tl.abs(f) < float("inf"))).to(tl.int32), axis=0)
    if bad != 0:
        noted = first_bad + at[0]
        tl.store(noted, r, mask=tl.load(noted) < 0)


@triton.jit
def own_epsilon(lanes, norm, f, x, z, numel, LANES: tl.constexpr, REST: tl.constexpr,
                S: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ε of a sample that this program holds; NaN where it would need the other samples."""
    s = form(lanes, REST + SCORE_X, REST + SCORE_F, LANES, f, x)
    score_norm, noise_norm = sample_norms(s, z, BLOCK)
    scale = tl.load(lanes + REST + STEP_SCALE)
    size = step_size(scale, norm, noise_norm, score_norm, numel, S)
    return tl.where(norm == BATCH_MEAN, float("nan"), size)


@triton.jit
def whole(lanes, LANES: tl.constexpr):
    """Both parts of the coefficient at `lanes`, in float64."""
    return tl.load(lanes).to(tl.float64) + tl.load(lanes + LANES).to(tl.float64)


@triton.jit
def add_langevin(hi, lo, lanes, eps, LANES: tl.constexpr, REST: tl.constexpr, S: tl.constexpr):
    """x + ε·s + √(2ε)·z on top of the row: folded in float64, split again."""
    e = eps.to(tl.float64)
    new_hi = ()
    new_lo = ()
    for k in tl.static_range(len(hi)):
        c = hi[k].to(tl.float64) + lo[k].to(tl.float64)
        if k == 0:
            c += e * whole(lanes + REST + SCORE_F, LANES)
        elif k == 2:
            c += tl.sqrt(2.0 * e)
        elif k == len(hi) - 1:
            c += e * whole(lanes + REST + SCORE_X, LANES)
        high = c.to(S)
        new_hi = new_hi + (high,)
        new_lo = new_lo + ((c - high.to(tl.float64)).to(S),)
    return new_hi, new_lo


@triton.jit
def denoised(lanes, f, x, LANES: tl.constexpr, REST: tl.constexpr):
    """D = clamp(p·x + q·F, ±L); a NaN stays one."""
    d = form(lanes, REST + P, REST + Q, LANES, f, x)
    limit = tl.load(lanes + REST + LIMIT)
    return tl.where(d > limit, limit, tl.where(d < -limit, -limit, d))


@triton.jit
def next_input(net_input, net_time, new, lanes, at, REST: tl.constexpr):
    """c_in·x' and the time label of the next evaluation, where there is one."""
    scale = tl.load(lanes + REST + NEXT_SCALE)
    if scale != 0:
        if net_input[0] is not None:
            T: tl.constexpr = net_input[0].dtype.element_ty
            v = scale * new
            if T.primitive_bitwidth == 16:
                v = v.to(tl.float32)
            tl.store(pointers(net_input, at), v.to(T), mask=at[3])
        if net_time is not None:
            tl.store(net_time + at[0], tl.load(lanes + REST + NEXT_LABEL), mask=at[1] == 0)


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def step(
    x, network, uncond, guidance, registers, keys, row, coef, field, epsilon, noise, net_input,
    net_time, first_bad, numel, sizes, tiles, rows, row_stride, slot_stride,
    REGISTERS: tl.constexpr, ON_CHIP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one sample. ON_CHIP: the tile is the sample, and makes its own ε."""
    S: tl.constexpr = x[0].dtype.element_ty
    REST: tl.constexpr = 2 * (H0 + REGISTERS)
    LANES: tl.constexpr = REST + TAIL
    at = tile_of(tl.program_id(0), numel, sizes, tiles, WIDE, BLOCK)
    b = at[0]
    r = tl.load(row + b * row_stride)
    if (r < 0) | (r >= rows):
        if ON_CHIP:
            tl.store(epsilon + b, tl.cast(0.0, S))
        return
    lanes = coef + r.to(tl.int64) * (2 * LANES)
    numbers = field + r.to(tl.int64) * FIELDS
    slot, norm = tl.load(numbers + SLOT), tl.load(numbers + NORM)
    hi, lo = sources(lanes, 0, REGISTERS), sources(lanes + LANES, 0, REGISTERS)
    reads = hi
    if REGISTERS > 0:
        to_slot = sources(lanes, H0 + REGISTERS, REGISTERS)
        reads = ()
        for k in tl.static_range(len(hi)):
            reads = reads + (((hi[k] != 0) | ((slot >= 0) & (to_slot[k] != 0))).to(tl.int32),)

    # Everything is read before anything is written, and before z, whose making hides the wait.
    both = (norm != 0) | (reads[1] != 0)  # the score, or D
    state = read(x, at, both | (reads[len(hi) - 1] != 0), S)
    uses_f = both | (reads[0] != 0)
    f = guided_network(network, uncond, guidance, lanes + REST + GUIDANCE, at, uses_f, S)
    held = ()
    for k in tl.static_range(REGISTERS):
        slot_k = (registers[0] + tl.cast(slot_stride, tl.int64) * k, registers[1])
        held = held + (read(slot_k, at, reads[3 + k] != 0, S),)
    z = row_noise(noise, keys, numbers, at, (norm != 0) | (reads[2] != 0), S, BLOCK)
    if first_bad is not None:
        note_bad(first_bad, f, at, r)

    if epsilon is None:  # a promise that no row here has a norm; NaN shows where it does not hold
        hi = (tl.where(norm != 0, float("nan"), hi[0]).to(S),) + hi[1:]
    else:
        if ON_CHIP:
            eps = tl.cast(0.0, S)
            if norm != 0:
                eps = own_epsilon(lanes, norm, f, state, z, numel, LANES, REST, S, BLOCK)
            tl.store(epsilon + b, eps)
        else:
            eps = tl.load(epsilon + b)
        hi, lo = add_langevin(hi, lo, lanes, tl.where(norm != 0, eps, 0.0), LANES, REST, S)
    d = tl.zeros([BLOCK], S)
    if reads[1] != 0:
        d = denoised(lanes, f, state, LANES, REST)
    values = (f, d, z) + held + (state,)
    new = combine(hi, lo, values)
    if REGISTERS > 0:
        if slot >= 0:
            low = sources(lanes + LANES, H0 + REGISTERS, REGISTERS)
            into = (registers[0] + tl.cast(slot_stride, tl.int64) * slot, registers[1])
            tl.store(pointers(into, at), combine(to_slot, low, values), mask=at[3])
    tl.store(pointers(x, at), new, mask=at[3])
    next_input(net_input, net_time, new, lanes, at, REST)


def affine_step_(
    x: Tensor,
    network: Tensor | None,
    uncond: Tensor | None,
    guidance: Tensor | None,
    registers: Tensor | None,
    keys: Tensor,
    row: Tensor,
    coef: Tensor,
    field: Tensor,
    epsilon: Tensor | None,
    noise: Tensor | None,
    net_input: Tensor | None,
    net_time: Tensor | None,
    first_bad: Tensor | None,
    workspace: Tensor | None = None,
    coupled: bool = True,
) -> None:
    _launch.check_state(x)
    held = _launch.check_row(x, network, uncond, guidance, keys, row, coef, field)
    _launch.vector(epsilon, x, x.dtype, "epsilon")
    _launch.vector(net_time, x, x.dtype, "net_time")
    _launch.vector(first_bad, x, torch.int32, "first_bad")
    first = first_register(registers, x, held)
    for name, f in (("network", network), ("uncond", uncond)):
        _launch.check_alias(f, net_input, name, "net_input")
        _launch.check_alias(f, net_time, name, "net_time")
    sizes, found = _launch.views(
        x.shape,
        x=x,
        network=_launch.like_state(network, x, "network"),
        uncond=_launch.like_state(uncond, x, "uncond"),
        registers=first,
        noise=_launch.like_state(noise, x, "noise"),
        net_input=_launch.like_state(net_input, x, "net_input"),
    )
    if x.numel() == 0:
        return
    batch = x.shape[0]
    numel = x.numel() // batch
    on_chip = epsilon is not None and not coupled and numel <= _launch.ON_CHIP
    if epsilon is not None and not on_chip:
        step_sizes(
            epsilon, x, found, sizes, guidance, keys, row, coef, field, held, workspace, coupled
        )
    options = _launch.configuration(numel, _launch.ON_CHIP if on_chip else _launch.TILE)
    _launch.launch(
        step, batch * triton.cdiv(numel, options["BLOCK"]), x,
        found["x"], found["network"], found["uncond"], guidance, found["registers"], keys, row,
        coef, field, epsilon, found["noise"], found["net_input"], net_time, first_bad,
        numel, sizes, triton.cdiv(numel, options["BLOCK"]), coef.shape[0], row.stride(0),
        registers.stride(0) if held and registers is not None else 0,
        REGISTERS=held, ON_CHIP=on_chip, WIDE=_launch.is_wide(numel), **options,
    )  # fmt: skip


def first_register(registers: Tensor | None, x: Tensor, held: int) -> Tensor | None:
    """H_0, the others lie behind it; None for a plan without registers."""
    if held == 0:
        return None
    ok = registers is not None and registers.dim() == x.dim() + 1 and registers.shape[0] >= held
    ok = ok and registers is not None and registers.shape[1:] == x.shape
    _launch.require(ok, f"registers: expected [{held}, *x.shape]")
    assert registers is not None
    _launch.require(registers.dtype == x.dtype, "registers: expected the dtype of x")
    _launch.require(
        _launch.same_device(registers, x), f"registers: expected a tensor on {x.device}"
    )
    return registers[0]
