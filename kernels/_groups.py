"""Tiles of whole groups of channels: device functions of group normalisation, and the rule by which
a tensor is cut.

A tile is [PIXELS, LANES] of one sample: GROUPS groups beside one another, DEPTH lanes a group, the
least power of two that holds its D channels. The steps from sample to sample, pixel to pixel and
channel to channel are the view's own, so NCHW and channels_last are read by the same code, each
along its contiguous dimension. A view is (tensor, (sample step, pixel step, channel step)); (None,
None) is no tensor.

Sums over a group run in a fixed tree of halves, zeros where nothing is. It depends on the layout,
but not on GROUPS or on the number of warps, and so a sample's result not on its batch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, interpreted
from ._row import divide, root
from ._sum import halve, neighbours

HELD = ((128, 8192), (64, 16384), (32, 32768))
"""(bytes of neighbouring channels, lanes): the widest that fits is what one program holds."""
SMALL = 1024  # lanes below which a program takes further groups
PROGRAMS = 264  # two a multiprocessor of the largest GPU; below it, programs take fewer groups
STREAMED = 4096  # lanes of a tile of what is read twice
SEGMENT = 256  # bytes of neighbouring channels of such a tile
RUN = 32  # pixels of it at least, where a group has so many channels that they would be fewer
CHUNKS = 128  # of a sample's pixels at most: their statistics are merged by every program
DEEPEST = 16384  # channels of a group
MOST_WARPS = 16
REGISTERS = 128  # a thread; the compiler takes more than it needs, and fewer programs stand at once
ON_GPU = tl.constexpr(not interpreted())  # the interpreter knows no assembler
# Their values make no other kernel.
UNSPECIALISED = (
    "eps_low", "eps_high", "gain_low", "gain_high", "groups", "slices", "chunks", "tiles",
)  # fmt: skip

View = tuple[Any, Any]


@triton.jit
def lanes_of(slice, groups, D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr):
    """Channel of every lane of a slice of the channels, and whether it exists."""
    lane = tl.arange(0, GROUPS * DEPTH)
    exists = slice * GROUPS + lane // DEPTH < groups
    if D == DEPTH:
        c = slice * (GROUPS * D) + lane
    else:
        c = slice * (GROUPS * D) + lane // DEPTH * D + lane % DEPTH
        exists &= lane % DEPTH < D
    return c, exists


@triton.jit
def tile_at(b, start, pixels, lanes, PIXELS: tl.constexpr, WIDE: tl.constexpr):
    """A tile: (sample, pixels [PIXELS], channels [LANES], which exist)."""
    p, c = start + tl.arange(0, PIXELS), lanes[0]
    live = (p < pixels)[:, None] & lanes[1][None, :]
    if WIDE:
        p, c = p.to(tl.int64), c.to(tl.int64)
    return b, p, c, live


@triton.jit
def pointers(view, at):
    steps = view[1]
    base = view[0] + at[0] * steps[0]
    return base + (at[1] * steps[1])[:, None] + (at[2] * steps[2])[None, :]


@triton.jit
def read(view, at, A: tl.constexpr, WHOLE: tl.constexpr):
    """The tile in the type of the arithmetic, zeros where nothing is. WHOLE: all of it exists."""
    where = pointers(view, at)
    v = tl.load(where) if WHOLE else tl.load(where, mask=at[3], other=0.0)
    return v.to(A)


@triton.jit
def write(view, at, v, WHOLE: tl.constexpr):
    v = v.to(view[0].dtype.element_ty)
    if WHOLE:
        tl.store(pointers(view, at), v)
    else:
        tl.store(pointers(view, at), v, mask=at[3])


@triton.jit
def read_lanes(vector, b, step, lanes, A: tl.constexpr):
    """The sample's row of a tensor [B, C]; of one [C] where step is 0."""
    return tl.load(vector + b * step + lanes[0], mask=lanes[1], other=0.0).to(A)


@triton.jit
def affine(
    weight, bias, scale, shift, scale_step, shift_step, b, lanes, A: tl.constexpr
):  # fmt: skip
    """γ = weight·(1 + scale) and β = bias·(1 + scale) + shift of the lanes."""
    beta = tl.zeros(lanes[0].shape, A)
    gamma = beta + 1.0
    if weight is not None:
        gamma = read_lanes(weight, b, 0, lanes, A)
    if bias is not None:
        beta = read_lanes(bias, b, 0, lanes, A)
    if scale is not None:
        factor = 1.0 + read_lanes(scale, b, scale_step, lanes, A)
        gamma *= factor
        beta *= factor
    if shift is not None:
        beta += read_lanes(shift, b, shift_step, lanes, A)
    return gamma, beta


@triton.jit
def sigmoid(n):
    """1/(1 + e⁻ⁿ); in float32 by the special-function unit, to a few units of the last place.

    `tl.exp` and a division care for subnormals, which 1 + e⁻ⁿ swallows: twice the instructions of
    all the rest, more than there is time for at the speed of a copy.
    """
    if ON_GPU and n.dtype == tl.float32:
        s = tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
            "add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [n], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        s = 1.0 / (1.0 + tl.exp(-n))
    return s


@triton.jit
def over_pixels(v, PIXELS: tl.constexpr):
    """The sum [LANES] of [PIXELS, LANES]."""
    return neighbours(halve(v, PIXELS), PIXELS // min(PIXELS, 1024))


@triton.jit
def over_lanes(v, DEPTH: tl.constexpr, GROUPS: tl.constexpr):
    """The sum [GROUPS] of each group's lanes."""
    w = v
    for i in tl.static_range(1, 15):
        if DEPTH >> i >= 1:
            w = tl.sum(tl.reshape(w, (GROUPS, 2, DEPTH >> i)), axis=1)
    return tl.reshape(w, (GROUPS,))


@triton.jit
def over_group(
    v, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """The sum [GROUPS] of a tile: of eight pixels, of each group's lanes, of what is left.

    The eight are those that a thread has, neighbours with channels first and far apart with
    channels last: so little crosses threads.
    """
    LANES: tl.constexpr = GROUPS * DEPTH
    EIGHT: tl.constexpr = min(8, PIXELS)
    LEFT: tl.constexpr = PIXELS // EIGHT
    w = v
    for i in tl.static_range(1, 4):
        if EIGHT >> i >= 1:
            if LAST:
                w = tl.sum(tl.reshape(w, (2, (EIGHT >> i) * LEFT, LANES)), axis=0)
            else:
                w = tl.sum(tl.reshape(w, (LEFT, 2, EIGHT >> i, LANES)), axis=1)
    for i in tl.static_range(1, 15):
        if DEPTH >> i >= 1:
            w = tl.sum(tl.reshape(w, (LEFT, GROUPS, 2, DEPTH >> i)), axis=2)
    return over_pixels(tl.reshape(w, (LEFT, GROUPS)), LEFT)


@triton.jit
def spread(v, DEPTH: tl.constexpr, GROUPS: tl.constexpr):
    """[GROUPS] to all lanes of each group."""
    return tl.reshape(tl.broadcast_to(v[:, None], (GROUPS, DEPTH)), (GROUPS * DEPTH,))


@triton.jit
def values_of_group(pixels, D: tl.constexpr, A: tl.constexpr):
    """How many values a group has: more than 31 bits can say, where samples are so large."""
    return (tl.cast(pixels, tl.int64) * D).to(A)


@triton.jit
def inverse_root(variance, eps):
    return divide(variance * 0.0 + 1.0, root(variance + eps))


@triton.jit
def groups_of(row, slice, groups, GROUPS: tl.constexpr):
    """Where the values of a slice's groups lie in [rows, groups], and which exist."""
    g = slice * GROUPS + tl.arange(0, GROUPS)
    return row * groups + g, g < groups


@dataclass(frozen=True)
class Cut:
    """How a sample is cut: `slices` of whole groups, and each of them into `chunks` of pixels.

    Attributes:
        held: a program holds its slice's every pixel; else it goes through the chunk's `tiles`.
        constants: the kernel's.
    """

    slices: int
    chunks: int
    tiles: int
    held: bool
    constants: dict[str, Any]


@lru_cache(4096)
def cut(
    batch: int, channels: int, pixels: int, groups: int, dtype: torch.dtype, last: bool, values: int
) -> Cut:
    """The one rule, by sizes only; a thread can hold `values` numbers of 32 bits of a tile.

    Whether a program holds its groups, and the chunks where it does not, which set the order of
    sums, do not depend on the batch; how many groups it takes does, which changes no sum.
    """
    d = channels // groups
    depth, rows, all_groups = (triton.next_power_of_2(n) for n in (d, pixels, groups))
    run = dtype.itemsize * (d if last else d * pixels)  # bytes of a group that lie together
    values = values // 4 if dtype == torch.float64 else values

    def width(segment: int) -> int:
        return min(triton.next_power_of_2(triton.cdiv(segment, run)), all_groups)

    fitting = [
        width(segment)
        for segment, lanes in HELD
        if rows * depth * width(segment) <= min(lanes, values * 32 * MOST_WARPS)
    ]
    tiles = chunks = 1
    if fitting:
        wide = fitting[0]
        while wide < all_groups and rows * depth * wide < SMALL:
            wide *= 2
        while wide > 1 and batch * triton.cdiv(groups, wide) < PROGRAMS:
            wide //= 2
        few = batch * triton.cdiv(groups, wide) < PROGRAMS
        a_thread = values // 2 if few else values
    else:
        streamed, a_thread = (STREAMED, 16) if dtype.itemsize <= 4 else (STREAMED // 2, 4)
        wide = min(width(SEGMENT), max(1, streamed // depth))
        lanes = depth * wide
        rows = max(streamed // lanes, min(RUN, DEEPEST // lanes), 1)
        count = triton.cdiv(pixels, rows)
        tiles = triton.cdiv(count, CHUNKS)
        chunks = triton.cdiv(count, tiles)
    constants = {
        "D": d, "DEPTH": depth, "GROUPS": wide, "PIXELS": rows,
        "WHOLE": d == depth and groups % wide == 0 and pixels % (rows * tiles) == 0,
        "WIDE": _launch.is_wide(channels * pixels),
        "LAST": last,
        "num_warps": min(max(1, rows * depth * wide // 32 // a_thread), MOST_WARPS),
        "maxnreg": REGISTERS,
    }  # fmt: skip
    return Cut(triton.cdiv(groups, wide), chunks, tiles, bool(fitting), constants)


class Sizes:
    """Those of x [B, C, …], whether channels come last in its memory, and how its like are viewed.

    RuntimeError where the shape does not fit the groups.
    """

    def __init__(self, x: Tensor, groups: int, name: str) -> None:
        self.x, self.groups, self.name = x, groups, name
        _launch.require(
            x.dim() >= 2, f"{name}: expected [samples, channels, …], got {x.dim()} dimensions"
        )
        self.batch, self.channels = x.shape[:2]
        fit = groups >= 1 and self.channels > 0 and self.channels % groups == 0
        _launch.require(
            fit, f"groups: expected a divisor of the {self.channels} channels, got {groups}"
        )
        d = self.channels // groups
        _launch.require(
            d <= DEEPEST, f"groups: at most {DEEPEST} channels a group are supported, got {d}"
        )
        self.pixels = x[:1, :1].numel() if self.batch else 0
        # One pixel lies both ways: then rows of channels are the longer ones.
        one = self.pixels == 1 and self.channels > 1
        self.last = one or not (x.is_contiguous() or lies_as(x, False))

    def view(self, t: Tensor | None, name: str, *, written: bool = False) -> View:
        """A tensor of x's shape that lies as x does; no samples share memory that is `written`."""
        if t is None:
            return None, None
        _launch.require(t.shape == self.x.shape, f"{name}: expected the shape of {self.name}")
        floating = t.dtype in _launch.FLOATS
        _launch.require(floating, f"{name}: expected float32, float64, bfloat16 or float16")
        there = _launch.same_device(t, self.x)
        _launch.require(there, f"{name}: expected a tensor on {self.x.device}")
        _launch.require(
            lies_as(t, self.last),
            f"{name}: expected samples without gaps, with channels "
            f"{'last' if self.last else 'first'} in memory as those of {self.name}",
        )
        size = self.channels * self.pixels
        step = t.stride(0) if self.batch > 1 else size
        apart = not written or step >= size
        _launch.require(apart, f"{name}: its samples share memory")
        return t, (step, self.channels, 1) if self.last else (step, 1, self.pixels)

    def row(self, t: Tensor | None, name: str, shared: bool = False) -> int:
        """Step from sample to sample of a tensor [B, C], or 0 of one [C]."""
        if t is None:
            return 0
        shape = self.x.shape[1:2] if shared else self.x.shape[:2]
        _launch.require(
            t.shape == shape and _launch.same_device(t, self.x),
            f"{name}: expected a tensor [{'' if shared else 'samples, '}{self.channels}] on "
            f"{self.x.device}",
        )
        _launch.require(
            t.dtype in _launch.FLOATS, f"{name}: expected float32, float64, bfloat16 or float16"
        )
        together = self.channels <= 1 or t.stride(-1) == 1
        _launch.require(together, f"{name}: expected channels beside one another in memory")
        return 0 if shared else t.stride(0)

    def pairs(self, t: Tensor, columns: int, name: str) -> None:
        """RuntimeError for anything but a table of pairs in the type of the statistics."""
        wide = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        shape = (self.batch, columns, 2)
        ok = t.shape == shape and t.dtype == wide and t.is_contiguous()
        _launch.require(
            ok and _launch.same_device(t, self.x),
            f"{name}: expected a contiguous {str(wide)[6:]} tensor {list(shape)} on "
            f"{self.x.device}",
        )

    def cut(self, values: int) -> Cut:
        of = (self.batch, self.channels, self.pixels, self.groups, self.x.dtype, self.last)
        return cut(*of, values)


def lies_as(t: Tensor, last: bool) -> bool:
    """Whether every sample lies in one piece, as [channels, …] or as […, channels]."""
    if t.numel() == 0:
        return True
    return (t[0].movedim(0, -1) if last else t[0]).is_contiguous()
