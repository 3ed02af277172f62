"""Op `langevin_epsilon_`: the step size of data-dependent Langevin rows; see
`sbm_fast.ops.langevin_epsilon` for the formula and the fixed order of its sums.

One program a sample finds its norms: on chip where the sample fits (`_launch.ON_CHIP`), else from
the sums of its tiles, which a launch before made. What couples the samples, `batch_mean`, is done
by the program that comes last.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._row import (
    BATCH_MEAN,
    FIELDS,
    GUIDANCE,
    H0,
    NORM,
    SCORE_F,
    SCORE_X,
    STEP_SCALE,
    TAIL,
    divide,
    form,
    guided_network,
    norms,
    read,
    row_noise,
    sample_norms,
    squares,
    step_size,
    tile_of,
)  # fmt: skip
from ._sum import CHUNK, halve, tree_in_place

HEAD = tl.constexpr(4)  # the workspace: a ticket, norms of s and z [B, 2], sums of tiles [B, T, 2]


@triton.jit
def score_and_noise(
    x, network, uncond, guidance, keys, noise, lanes, numbers, at,
    REGISTERS: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s = p_s·x + q_s·F and z of a tile, zeros outside it."""
    REST: tl.constexpr = 2 * (H0 + REGISTERS)
    LANES: tl.constexpr = REST + TAIL
    f = guided_network(network, uncond, guidance, lanes + REST + GUIDANCE, at, True, S)
    s = form(lanes, REST + SCORE_X, REST + SCORE_F, LANES, f, read(x, at, True, S))
    return s, row_noise(noise, keys, numbers, at, True, S, BLOCK)


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def tile_squares(
    workspace, x, network, uncond, guidance, keys, row, coef, field, noise,
    numel, sizes, tiles, batch, rows, row_stride,
    REGISTERS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ s² and Σ z² of one tile of a sample that stands at a row with a norm."""
    S: tl.constexpr = x[0].dtype.element_ty
    LANES: tl.constexpr = 2 * (H0 + REGISTERS) + TAIL
    program = tl.program_id(0)
    at = tile_of(program, numel, sizes, tiles, WIDE, BLOCK)
    r = tl.load(row + at[0] * row_stride).to(tl.int64)
    numbers = field + r * FIELDS
    norm = tl.load(numbers + NORM, mask=(r >= 0) & (r < rows), other=0)
    if norm != 0:
        s, z = score_and_noise(
            x, network, uncond, guidance, keys, noise, coef + r * (2 * LANES), numbers, at,
            REGISTERS, S, BLOCK,
        )  # fmt: skip
        sums = workspace + HEAD + 2 * (batch.to(tl.int64) + program)
        tl.store(sums + tl.arange(0, 2), tl.reshape(halve(squares(s, z), BLOCK), (2,)))


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def sample_epsilon(
    epsilon, workspace, x, network, uncond, guidance, keys, row, coef, field, noise,
    numel, sizes, tiles, batch, rows, row_stride,
    REGISTERS: tl.constexpr, WIDE: tl.constexpr, ON_CHIP: tl.constexpr, COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ε of one sample; the last program adds those that need the batch's mean norms."""
    S: tl.constexpr = x[0].dtype.element_ty
    LANES: tl.constexpr = 2 * (H0 + REGISTERS) + TAIL
    b = tl.program_id(0).to(tl.int64)
    r = tl.load(row + b * row_stride).to(tl.int64)
    numbers = field + r * FIELDS
    norm = tl.load(numbers + NORM, mask=(r >= 0) & (r < rows), other=0)
    kept = workspace + HEAD  # norms of the samples at batch_mean rows
    if norm != 0:
        lanes = coef + r * (2 * LANES)
        if ON_CHIP:
            at = tile_of(tl.program_id(0), numel, sizes, tiles, WIDE, BLOCK)
            s, z = score_and_noise(
                x, network, uncond, guidance, keys, noise, lanes, numbers, at, REGISTERS, S, BLOCK
            )
            score_norm, noise_norm = sample_norms(s, z, BLOCK)
        else:
            sums = kept + 2 * (batch.to(tl.int64) + b * tiles)
            score_norm, noise_norm = norms(tree_in_place(sums, tiles, 2))
        if norm == BATCH_MEAN:
            tl.store(kept + 2 * b, score_norm)
            tl.store(kept + 2 * b + 1, noise_norm)
            tl.store(epsilon + b, tl.cast(float("nan"), S))
        else:
            scale = tl.load(lanes + 2 * (H0 + REGISTERS) + STEP_SCALE)
            tl.store(epsilon + b, step_size(scale, norm, noise_norm, score_norm, numel, S))
    else:
        tl.store(epsilon + b, tl.cast(0.0, S))
    if COUPLED:
        ticket = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel") == batch - 1:
            tl.store(ticket, 0)
            batch_epsilon(
                epsilon, kept, row, coef, field, numel, batch, rows, row_stride,
                LANES, 2 * (H0 + REGISTERS) + STEP_SCALE, S,
            )  # fmt: skip


@triton.jit
def at_batch_mean(c, row, field, batch, rows, row_stride):
    """A chunk of the batch: sample numbers, rows, and which samples stand at a `batch_mean` row."""
    b = c * CHUNK + tl.arange(0, CHUNK).to(tl.int64)
    r = tl.load(row + b * row_stride, mask=b < batch, other=-1).to(tl.int64)
    norm = tl.load(field + r * FIELDS + NORM, mask=(r >= 0) & (r < rows), other=0)
    return b, r, norm == BATCH_MEAN


@triton.jit
def batch_epsilon(
    epsilon, kept, row, coef, field, numel, batch, rows, row_stride,
    LANES: tl.constexpr, SCALE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """ε of the samples at `batch_mean` rows: their norms moved together, averaged by the tree."""
    two = tl.arange(0, 2)
    chunks = (batch + CHUNK - 1) // CHUNK
    count = 0
    for c in range(chunks):
        b, _, together = at_batch_mean(c, row, field, batch, rows, row_stride)
        pairs = tl.load(kept + 2 * b[:, None] + two[None, :], mask=together[:, None])
        place = count + tl.cumsum(together.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        tl.store(kept + 2 * place[:, None] + two[None, :], pairs, mask=together[:, None])
        count += tl.sum(together.to(tl.int32), axis=0)
    tl.debug_barrier()
    if count > 0:
        n = tl.cast(count, S)
        score_sum, noise_sum = tl.split(tree_in_place(kept, count, 2))
        score_norm, noise_norm = divide(score_sum, n), divide(noise_sum, n)
        for c in range(chunks):
            b, r, together = at_batch_mean(c, row, field, batch, rows, row_stride)
            scale = tl.load(coef + r * (2 * LANES) + SCALE, mask=together, other=0.0)
            size = step_size(scale, BATCH_MEAN, noise_norm, score_norm, numel, S)
            tl.store(epsilon + b, size, mask=together)


def langevin_epsilon_(
    epsilon: Tensor,
    x: Tensor,
    network: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | None,
    keys: Tensor,
    row: Tensor,
    coef: Tensor,
    field: Tensor,
    noise: Tensor | None,
) -> None:
    _launch.check_state(x)
    registers = _launch.check_row(x, network, uncond, guidance, keys, row, coef, field)
    _launch.vector(epsilon, x, x.dtype, "epsilon")
    if x.numel() == 0:
        return
    sizes, found = _launch.views(
        x.shape,
        x=x,
        network=_launch.like_state(network, x, "network"),
        uncond=_launch.like_state(uncond, x, "uncond"),
        noise=_launch.like_state(noise, x, "noise"),
    )
    step_sizes(epsilon, x, found, sizes, guidance, keys, row, coef, field, registers, None, True)


def step_sizes(
    epsilon: Tensor,
    x: Tensor,
    found: dict[str, _launch.View],
    sizes: tuple[int, ...],
    guidance: Tensor | None,
    keys: Tensor,
    row: Tensor,
    coef: Tensor,
    field: Tensor,
    registers: int,
    workspace: Tensor | None,
    coupled: bool,
) -> None:
    """The launches that write ε; the arguments are checked, x is not empty."""
    batch = x.shape[0]
    numel = x.numel() // batch
    on_chip = numel <= _launch.ON_CHIP
    tiles = 1 if on_chip else triton.cdiv(numel, _launch.TILE)
    values = 4 + 2 * batch * (1 + triton.cdiv(numel, _launch.TILE))
    if workspace is None:
        workspace = x.new_zeros(values)
    ok = workspace.numel() >= values and workspace.is_contiguous() and workspace.dtype == x.dtype
    _launch.require(
        ok and _launch.same_device(workspace, x),
        f"workspace: expected at least {values} contiguous values of x's dtype on {x.device}, as "
        "workspace_for(x) makes them",
    )
    f, uncond, noise = found["network"], found["uncond"], found["noise"]
    of_rows = (found["x"], f, uncond, guidance, keys, row, coef, field, noise)
    of_sizes = (numel, sizes, tiles, batch, coef.shape[0], row.stride(0))
    constants = {"REGISTERS": registers, "WIDE": _launch.is_wide(numel)}
    if not on_chip:
        _launch.launch(
            tile_squares, batch * tiles, x, workspace, *of_rows, *of_sizes,
            **constants, **_launch.configuration(numel),
        )  # fmt: skip
    options = _launch.configuration(numel, _launch.ON_CHIP if on_chip else _launch.TILE)
    _launch.launch(
        sample_epsilon, batch, x, epsilon, workspace, *of_rows, *of_sizes,
        ON_CHIP=on_chip, COUPLED=coupled, **constants, **options,
    )  # fmt: skip
