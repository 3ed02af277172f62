"""Op `error_norm_`: the error of a Runge–Kutta step in units of its tolerance; see
`sbm_fast.ops.error_norm` for the formula and the arguments.

A program does one sample where that fits on chip, else one tile of it; a second launch then adds
the sums of the tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._row import divide, float64_of, opens, read, root, tile_of
from ._sum import sample_sum, sum_in_place


@triton.jit
def larger(a, b):
    """max(|a|, |b|), NaN where either is."""
    u, v = tl.abs(a), tl.abs(b)
    return tl.where((u > v) | (u != u), u, v)


@triton.jit
def rms(total, numel, S: tl.constexpr):
    return root(divide(total, tl.cast(numel, S)))


@triton.jit(
    do_not_specialize=(*_launch.UNSPECIALISED, "atol_low", "atol_high", "rtol_low", "rtol_high")
)
def error(
    out, sums, x, registers, weights, atol_low, atol_high, rtol_low, rtol_high, numel, sizes,
    tiles, sample_step, column_step, register_step,
    STAGES: tl.constexpr, ON_CHIP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ (e/tolerance)² of a tile; its root mean where the tile is the sample."""
    S: tl.constexpr = x[0].dtype.element_ty
    program = tl.program_id(0)
    at = tile_of(program, numel, sizes, tiles, WIDE, BLOCK)
    u0, u1 = read(registers, at, True, S), read(x, at, True, S)
    e = tl.zeros([BLOCK], tl.float64)  # slopes nearly cancel
    for k in tl.static_range(1, STAGES):
        weight = tl.load(weights + at[0] * sample_step + k * column_step)
        stage = (registers[0] + tl.cast(register_step, tl.int64) * k, registers[1])
        e = tl.fma(weight, read(stage, at, opens(weight), S).to(tl.float64), e)
    rtol, atol = float64_of(rtol_low, rtol_high).to(S), float64_of(atol_low, atol_high).to(S)
    ratio = divide(e.to(S), tl.fma(rtol, larger(u0, u1), atol))
    total = sample_sum(tl.where(at[3], ratio * ratio, 0.0), BLOCK)
    if ON_CHIP:
        tl.store(out + at[0], rms(total, numel, S))
    else:
        tl.store(sums + program, total)


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def error_of_sums(out, sums, numel, tiles):
    """One sample's value from the sums of its tiles."""
    b = tl.program_id(0).to(tl.int64)
    total = sum_in_place(sums + b * tiles, tiles)
    tl.store(out + b, rms(total, numel, out.dtype.element_ty))


def error_norm_(
    out: Tensor, x: Tensor, registers: Tensor, weights: Tensor, atol: float, rtol: float
) -> None:
    _launch.check_state(x)
    _launch.vector(out, x, x.dtype, "out")
    first = _launch.first_of(registers, x, "registers")
    _launch.require(registers.dtype == x.dtype, "registers: expected the dtype of x")
    stages = len(registers)
    _launch.require(stages >= 1, "registers: expected the state before the step first, got none")
    _launch.table(weights, x, stages, "weights")
    if x.numel() == 0:
        out.zero_()
        return
    sizes, found = _launch.views(x.shape, x=x, registers=first)
    batch = x.shape[0]
    numel = x.numel() // batch
    on_chip = numel <= _launch.ON_CHIP
    options = _launch.configuration(numel, _launch.ON_CHIP if on_chip else _launch.TILE)
    tiles = triton.cdiv(numel, options["BLOCK"])
    sums = None if on_chip else x.new_empty(batch * tiles)
    _launch.launch(
        error, batch * tiles, x,
        out, sums, found["x"], found["registers"], weights, *_launch.halves_of_float(atol),
        *_launch.halves_of_float(rtol), numel, sizes, tiles, *weights.stride(),
        registers.stride(0), STAGES=stages, ON_CHIP=on_chip, WIDE=_launch.is_wide(numel),
        **options,
    )  # fmt: skip
    if sums is not None:
        _launch.launch(error_of_sums, batch, x, out, sums, numel, tiles, num_warps=4)
