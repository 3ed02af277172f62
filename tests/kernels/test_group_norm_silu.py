"""The Triton kernels of group normalisation: both ways to cut a sample, the rule that chooses, and
what must not depend on it. tests/ops has what every backend must do."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import norm_cases as cases
import pytest
import torch
from norm_cases import BF16, F16, F64
from op_backends import BACKENDS, GPU

from sbm_fast.ops._library import triton_missing

if triton_missing():
    pytest.skip(triton_missing(), allow_module_level=True)
if "triton" not in BACKENDS:
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

import triton
import triton.language as tl
from sbm_fast.kernels import _groups, _launch, group_norm_silu, group_norm_silu_product

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    *([pytest.mark.gpu] if GPU else []),
]
ALL: dict[str, Any] = {"rows": "weight bias scale shift add", "residual": True, "gain": 0.5**0.5}
SHAPES = [((2, 8, 4, 5), 2), ((1, 7, 3, 5), 1), ((1, 5, 9), 5), ((1, 12, 3, 2, 3), 4), ((2, 9), 3)]


@pytest.fixture(params=["held", "read twice"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to cut; tiles so small that tiny samples take several chunks of several tiles."""
    small: dict[str, Any] = {"PROGRAMS": 1}
    if request.param == "read twice":
        small |= {"HELD": (), "STREAMED": 32, "CHUNKS": 2, "RUN": 2}
    for name, value in small.items():
        monkeypatch.setattr(_groups, name, value)
    _groups.cut.cache_clear()
    yield request.param
    _groups.cut.cache_clear()


def hold(case: cases.Norm) -> None:
    assert cases.violation(case, cases.output(case, "triton")) == ""


def hold_product(*arguments: Any, **options: Any) -> None:
    p = cases.product(*arguments, **options)
    assert cases.product_violation(p, cases.multiplied(p, "triton")) == ""


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_shapes(shape: tuple[int, ...], groups: int, last: bool, scheme: str) -> None:
    """With every option and with none; odd channels, one group, one channel a group."""
    hold(cases.norm(shape, groups, last=last, **ALL))
    hold(cases.norm(shape, groups, rows="", silu=False, last=last))


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
def test_dtypes(dtype: torch.dtype, scheme: str) -> None:
    for last in (False, True):
        hold(cases.norm((1, 8, 4, 5), 2, dtype=dtype, last=last, **ALL))


def test_means_far_from_zero(scheme: str) -> None:
    """Where E[x²] − E[x]² has no digits left."""
    hold(cases.norm((2, 6, 7, 5), 2, mean=3000.0))
    case = cases.norm((1, 4, 16, 9), 2, last=True)
    case.x[:, :, 0, 0] += 1e5
    hold(case)


def test_nan_stays_in_its_group(scheme: str) -> None:
    case = cases.norm((2, 8, 4, 5), 4, last=True)
    case.x[1, 5, 2, 2] = torch.nan
    out = cases.output(case, "triton")["out"].reshape(2, 4, -1)
    found = out.isnan().all(2)
    assert found[1, 2] and found.sum() == 1 and out.isnan().sum() == out.shape[2]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_product(
    shape: tuple[int, ...], groups: int, forward: bool, last: bool, scheme: str
) -> None:
    rows = "weight bias scale shift"
    hold_product(shape, groups, forward=forward, last=last, rows=rows, gain=0.5)


@pytest.mark.parametrize("forward", [False, True])
def test_product_in_other_dtypes(forward: bool, scheme: str) -> None:
    for dtype in (BF16, F16, F64):
        hold_product((1, 4, 4, 5), 2, dtype=dtype, last=True, forward=forward)
    hold_product((1, 4, 4, 5), 2, rows="", silu=False, forward=forward)


@pytest.mark.parametrize("last", [False, True])
def test_samples_do_not_depend_on_their_batch(
    last: bool, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, a program takes one group, in the batch all of them: the same bits."""
    monkeypatch.setattr(_groups, "PROGRAMS", 3)
    shape, groups = (3, 4, 3, 5), 2
    if scheme == "held":
        of = (4, 15, groups, torch.float32, last, 64)
        assert [_groups.cut(b, *of).constants["GROUPS"] for b in (3, 1)] == [2, 1]
    case = cases.norm(shape, groups, last=last, **ALL)
    one = slice(1, 2)  # a view, whose samples are those of the batch
    alone = cases.output(case.picked(one), "triton")
    for name, value in cases.output(case, "triton").items():
        assert torch.equal(alone[name], value[one]), name
    for forward in (False, True):
        p = cases.product(shape, groups, last=last, forward=forward)
        dots = {n: None if not forward else getattr(p, n)[one] for n in ("weight_dot", "bias_dot")}
        part = replace(p, case=p.case.picked(one), given=p.given[one], **dots)
        alone = cases.multiplied(part, "triton")
        for name, value in cases.multiplied(p, "triton").items():
            assert torch.equal(alone[name], value[one]), name


def test_samples_apart_in_memory() -> None:
    for last in (False, True):
        case = cases.norm((4, 6, 3, 5), 3, last=last)
        apart = case.picked(slice(None, None, 2))
        dense = replace(apart, x=apart.x.clone(memory_format=torch.preserve_format))
        assert apart.x.stride() != dense.x.stride()
        assert torch.equal(*(cases.output(c, "triton")["out"] for c in (apart, dense)))


@pytest.mark.parametrize(
    ("batch", "channels", "side", "last", "expected"),
    [  # (slices, chunks, tiles, held, groups a program, warps)
        (256, 128, 32, True, (8, 1, 1, True, 4, 8)),
        (256, 256, 32, True, (16, 1, 1, True, 2, 8)),
        (256, 384, 32, True, (16, 1, 1, True, 2, 16)),
        (256, 256, 16, True, (8, 1, 1, True, 4, 4)),
        (256, 256, 8, True, (4, 1, 1, True, 8, 2)),
        (1, 128, 32, True, (32, 1, 1, True, 1, 4)),
        (1, 256, 8, True, (32, 1, 1, True, 1, 1)),
        (256, 128, 32, False, (32, 1, 1, True, 1, 2)),
        (1, 128, 64, True, (1, 128, 1, False, 32, 8)),
        (256, 128, 64, True, (1, 128, 1, False, 32, 8)),
        (1, 128, 256, False, (32, 64, 1, False, 1, 8)),
    ],
)
def test_one_rule_by_sizes(
    batch: int, channels: int, side: int, last: bool, expected: tuple[int, ...]
) -> None:
    how = _groups.cut(batch, channels, side**2, 32, torch.bfloat16, last, group_norm_silu.VALUES)
    kernel = how.constants
    found = (how.slices, how.chunks, how.tiles, how.held, kernel["GROUPS"], kernel["num_warps"])
    assert found == expected


def test_every_pixel_and_group_is_in_one_tile() -> None:
    """Whether groups are held, and the order of sums, are the same for every batch."""
    for channels, groups in ((4, 1), (12, 3), (96, 32), (2048, 2), (16384, 1)):
        for pixels in (1, 15, 64, 4095, 2**18):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for last in (False, True):
                    of = (channels, pixels, groups, dtype, last, group_norm_silu_product.VALUES)
                    found = [_groups.cut(batch, *of) for batch in (1, 16, 1024)]
                    for how in found:
                        kernel = how.constants
                        assert how.slices * kernel["GROUPS"] >= groups
                        assert how.chunks * how.tiles * kernel["PIXELS"] >= pixels
                        assert (how.chunks * how.tiles - how.tiles) * kernel["PIXELS"] < pixels
                        assert kernel["DEPTH"] >= channels // groups
                    orders = {(h.held, h.chunks, h.tiles, h.constants["PIXELS"]) for h in found}
                    assert len(orders) == 1


@triton.jit(do_not_specialize=["b", "start", "slice", "pixels", "groups"])
def offsets(  # noqa: ANN201
    out, steps, b, start, slice, pixels, groups,  # noqa: ANN001
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets, from the tensor's first byte, of a tile of bytes; −1 where nothing is."""
    lanes = _groups.lanes_of(slice, groups, D, DEPTH, GROUPS)
    at = _groups.tile_at(b.to(tl.int64), start, pixels, lanes, PIXELS, WIDE)
    base = out.to(tl.pointer_type(tl.int8), bitcast=True)
    offset = _groups.pointers((base, steps), at).to(tl.int64) - base.to(tl.int64)
    lane = tl.arange(0, PIXELS)[:, None] * (GROUPS * DEPTH) + tl.arange(0, GROUPS * DEPTH)[None, :]
    tl.store(out + lane, tl.where(at[3], offset, -1))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("pixels", [2**20, 2**28])
def test_offsets_beyond_two_to_the_31(pixels: int, last: bool) -> None:
    """The last tile of a batch; nothing so large is allocated."""
    d, groups, batch, rows = 3, 8, 300, 8
    channels, image = d * groups, d * groups * pixels
    out = torch.zeros(rows, 2 * 4, dtype=torch.int64, device=BACKENDS["triton"].device)
    steps = (image, channels, 1) if last else (image, 1, pixels)
    offsets[(1,)](
        out, steps, batch - 1, pixels - 5, groups // 2 - 1, pixels, groups,
        D=d, DEPTH=4, GROUPS=2, PIXELS=rows, WIDE=_launch.is_wide(image),
    )  # fmt: skip
    for p in range(rows):
        for lane in range(8):
            c = (groups - 2) * d + lane // 4 * d + lane % 4
            there = p < 5 and lane % 4 < d
            place = (batch - 1) * image + (pixels - 5 + p) * steps[1] + c * steps[2]
            assert out[p, lane] == (place if there else -1)


@triton.jit
def mean_of_many(out: Any, pixels: Any, D: tl.constexpr) -> None:
    one = tl.zeros([1], tl.float32) + 1.0
    first, second = group_norm_silu_product.means_of((one, 2.0 * one), pixels, D, 1, 1)
    tl.store(out + tl.arange(0, 1), first)
    tl.store(out + 1 + tl.arange(0, 1), second)


def test_groups_of_more_values_than_31_bits_count() -> None:
    """2³³ values; only their number is at hand."""
    out = torch.zeros(2, device="cuda" if GPU else "cpu")
    mean_of_many[(1,)](out, 2**23, 1024)
    assert out.tolist() == [2.0**-33, 2.0**-32]
