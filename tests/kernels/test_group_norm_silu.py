"""The Triton kernels of group normalisation: both ways to cut a sample, layouts, dtypes, errors."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_backends import BACKENDS, GPU, call
from torch import Tensor
from triton_norm_cases import (
    EPS,
    Norm,
    everything,
    formula,
    guarded,
    laid_out,
    off,
    plain,
    run,
    whole,
)

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
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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


def hold_to_torch(case: Norm) -> None:
    """At most twice the error of torch in the same dtype, or a rounding of the result."""
    out, total, stats = run(case)
    exact, h = formula(case, torch.float64)
    own, _ = formula(case, case.x.dtype)
    unit = torch.finfo(case.x.dtype).eps
    assert off(out, exact) <= max(2 * off(own, exact), unit)
    if total is not None:
        assert off(total, h) <= unit
    grouped = h.reshape(len(h), case.groups, -1)
    r = (grouped.var(2, correction=0) + EPS).rsqrt()
    expected = torch.stack((grouped.mean(2), r), 2)
    assert off(stats, expected) <= 4 * torch.finfo(case.wide).eps


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_shapes(shape: tuple[int, ...], groups: int, last: bool, scheme: str) -> None:
    """With every option and with none; odd channels, one group, one channel a group."""
    hold_to_torch(everything(shape, groups, last=last))
    hold_to_torch(plain(shape, groups, last=last))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dtypes(dtype: torch.dtype, scheme: str) -> None:
    hold_to_torch(everything((2, 8, 4, 5), 2, dtype, last=True))
    hold_to_torch(replace(everything((2, 8, 4, 5), 2, dtype), total=False))


@pytest.mark.parametrize("missing", ["weight", "bias", "scale", "shift", "add", "residual"])
def test_each_option_alone_is_left_out(missing: str) -> None:
    case = everything((2, 6, 3), 2)
    without = replace(case, **{missing: None})
    neutral = 1.0 if missing == "weight" else 0.0
    given = replace(case, **{missing: torch.full_like(getattr(case, missing), neutral)})
    for a, b in zip(run(without), run(given), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_mean_far_from_zero(scheme: str) -> None:
    """Where E[x²] − E[x]² has no digits left."""
    case = replace(plain((2, 6, 7, 5), 2), x=everything((2, 6, 7, 5), 2, offset=3000.0).x)
    out = run(case)[0]
    exact, _ = formula(case, torch.float64)
    assert off(out, exact) <= 2e-4  # the mean's rounding, 3000·2⁻²⁴


def test_out_of_another_dtype_and_in_place() -> None:
    case = replace(plain((2, 6, 3, 4), 2, torch.bfloat16), silu=True)
    exact, _ = formula(case, torch.float64)
    out, stats = torch.empty(case.x.shape), torch.empty(2, 2, 2)
    call("triton", "group_norm_silu_", out, None, stats, case.x, *[None] * 6, 2, EPS, 1.0, True)
    assert off(out, exact) <= 1e-6
    x = case.x.clone()
    call("triton", "group_norm_silu_", x, None, stats, x, *[None] * 6, 2, EPS, 1.0, True)
    assert torch.equal(x, out.bfloat16())


def test_nan_stays_in_its_group(scheme: str) -> None:
    case = everything((2, 8, 4, 5), 4, last=True)
    case.x[1, 5, 2, 2] = torch.nan
    out = run(case)[0].reshape(2, 4, -1)
    found = out.isnan().all(2)
    assert found[1, 2] and found.sum() == 1 and out.isnan().sum() == out.shape[2]


@pytest.mark.parametrize("last", [False, True])
def test_samples_do_not_depend_on_their_batch(
    last: bool, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, a program takes one group, in the batch all of them: the same bits."""
    monkeypatch.setattr(_groups, "PROGRAMS", 3)
    shape, groups = (3, 4, 3, 5), 2
    case = everything(shape, groups, last=last)
    if scheme == "held":
        of = (4, 15, groups, torch.float32, last, 64)
        assert [_groups.cut(b, *of).constants["GROUPS"] for b in (3, 1)] == [2, 1]
    given = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(1)), last)
    names = ("x", "scale", "shift", "add", "residual")
    alone = replace(case, **{n: getattr(case, n)[1:2] for n in names})
    stats = run(case)[2]
    for mine, theirs in zip(run(alone), run(case), strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine[0], theirs[1])
    for forward in (False, True):
        mine = product(alone, stats[1:2], given[1:2], forward)
        theirs = product(case, stats, given, forward)
        for a, b in zip(mine, theirs, strict=True):
            assert a is None or torch.equal(a[0], b[1])


def test_layouts_have_the_same_bits() -> None:
    for case in (everything((2, 12, 4, 4), 3), everything((1, 6, 5), 2)):
        other = {n: laid_out(getattr(case, n), True) for n in ("x", "residual")}
        assert torch.equal(run(case)[0], run(replace(case, **other))[0])


def product(
    case: Norm,
    stats: Tensor,
    given: Tensor,
    forward: bool,
    dots: tuple[Tensor | None, ...] = (None, None),
) -> tuple[Tensor, Any]:
    """(out, sums) of the product at h = x."""
    batch, channels = case.x.shape[:2]
    stats = stats.clone()  # aligned, as allocations are
    out = guarded(case.x)
    sums = None if forward else guarded(case.x, (batch, channels, 2), case.wide)
    call(
        "triton", "group_norm_silu_product_", out, sums, given, case.x, stats, case.weight,
        case.bias, case.scale, case.shift, *dots, case.groups, case.gain, case.silu, forward,
    )  # fmt: skip
    return whole(out), None if sums is None else whole(sums)


def affine_of(case: Norm) -> tuple[Tensor, Tensor]:
    """γ and β [B, C] in float64."""
    batch, channels = case.x.shape[:2]
    one = torch.ones(batch, channels, dtype=torch.float64)
    factor = one if case.scale is None else 1 + case.scale.double()
    weight = one if case.weight is None else case.weight.double()
    bias = 0 * one if case.bias is None else case.bias.double()
    shift = 0 * one if case.shift is None else case.shift.double()
    return weight * factor, bias * factor + shift


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_product(
    shape: tuple[int, ...], groups: int, forward: bool, last: bool, scheme: str
) -> None:
    hold_product(everything(shape, groups, last=last), forward)


@pytest.mark.parametrize("forward", [False, True])
def test_product_in_other_dtypes(forward: bool, scheme: str) -> None:
    for dtype in DTYPES[1:]:
        hold_product(everything((1, 4, 4, 5), 2, dtype, last=True), forward)
    hold_product(plain((1, 4, 4, 5), 2, torch.float64), forward)


def hold_product(case: Norm, forward: bool) -> None:
    """Against autograd through the formula in float64."""
    g = torch.Generator().manual_seed(2)
    last = case.x.stride(1) == 1
    given = laid_out(torch.randn(case.x.shape, generator=g).to(case.x.dtype), last)
    gamma, beta = affine_of(case)
    dots = [torch.randn(gamma.shape, generator=g).to(case.wide) for _ in range(2)]
    wide = (...,) + (None,) * (case.x.ndim - 2)

    def function(h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        normal = torch.nn.functional.group_norm(h, case.groups, eps=EPS)
        n = normal * gamma[wide] + beta[wide]
        return torch.nn.functional.silu(n) if case.silu else n

    def exact(dtype: torch.dtype) -> tuple[Tensor, ...]:
        at = tuple(t.to(dtype) for t in (case.x.contiguous(), gamma, beta))
        if forward:
            change = tuple(t.to(dtype) for t in (case.gain * given.contiguous(), *dots))
            return (torch.func.jvp(function, at, change)[1],)
        _, vjp = torch.func.vjp(function, *at)
        of_h, of_gamma, of_beta = vjp(given.contiguous().to(dtype))
        return case.gain * of_h, torch.stack((of_gamma, of_beta), 2)

    grouped = case.x.double().reshape(len(case.x), case.groups, -1)
    r = (grouped.var(2, correction=0) + EPS).rsqrt()
    stats = torch.stack((grouped.mean(2), r), 2).to(case.wide)
    found = product(case, stats, given, forward, tuple(dots) if forward else (None, None))
    units = (torch.finfo(case.x.dtype).eps, torch.finfo(case.wide).eps)
    references = zip(exact(torch.float64), exact(case.wide), strict=True)
    for value, (reference, own), unit in zip(found, references, units, strict=False):
        assert off(value, reference) <= max(2 * off(own, reference), 2 * unit)


def test_nothing_to_do() -> None:
    for shape in ((0, 4, 3), (2, 4, 0)):
        case = plain(shape, 2)
        assert run(case)[2].eq(0).all()
        assert product(case, run(case)[2], case.x, False)[1].eq(0).all()


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
    out, steps, b, start, slice, pixels, image, groups,  # noqa: ANN001
    D: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets, from the tensor's first byte, of a tile of bytes; −1 where nothing is."""
    lanes = _groups.lanes_of(slice, groups, D, DEPTH, GROUPS)
    at = _groups.tile_at(b.to(tl.int64), start, pixels, image, lanes, PIXELS, WIDE)
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
    steps = (channels, 1) if last else (1, pixels)
    offsets[(1,)](
        out, steps, batch - 1, pixels - 5, groups // 2 - 1, pixels, image, groups,
        D=d, DEPTH=4, GROUPS=2, PIXELS=rows, WIDE=_launch.is_wide(image),
    )  # fmt: skip
    for p in range(rows):
        for lane in range(8):
            c = (groups - 2) * d + lane // 4 * d + lane % 4
            there = p < 5 and lane % 4 < d
            place = (batch - 1) * image + (pixels - 5 + p) * steps[0] + c * steps[1]
            assert out[p, lane] == (place if there else -1)


X = torch.zeros(2, 6, 4, 4)
BAD = [
    ("x", "got 1 dimensions", {"x": torch.zeros(3)}),
    ("groups", "divisor of the 6 channels, got 4", {"groups": 4}),
    ("groups", "at most 16384 channels", {"x": torch.zeros(1, 40000), "groups": 1}),
    ("stats", r"float32 tensor \[2, 3, 2\]", {"stats": torch.zeros(2, 3, 3)}),
    ("stats", r"float32 tensor \[2, 3, 2\]", {"stats": torch.zeros(2, 3, 2).double()}),
    ("out", "shape of x", {"out": torch.zeros(2, 6, 4)}),
    ("residual", "shape of x", {"residual": torch.zeros(2, 6, 1, 1)}),
    ("x", "contiguous or channels_last", {"x": X.transpose(2, 3)[:, :, ::2].expand(2, 6, 2, 4),
     "out": X[:, :, :2].contiguous()}),
    ("weight", r"tensor \[6\]", {"weight": torch.zeros(5)}),
    ("scale", r"tensor \[2, 6\]", {"scale": torch.zeros(1, 6)}),
    ("shift", "beside one another", {"shift": torch.zeros(6, 2).T}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "change"), BAD)
def test_errors_name_what_is_wrong(name: str, message: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "out": X.clone(), "total": None, "stats": torch.zeros(2, 3, 2), "x": X, "weight": None,
        "bias": None, "scale": None, "shift": None, "add": None, "residual": None, "groups": 3,
        "eps": EPS, "gain": 1.0, "silu": True,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        call("triton", "group_norm_silu_", *(given | change).values())


def test_sums_are_made_backward_only() -> None:
    sums, stats = torch.zeros(2, 6, 2), torch.zeros(2, 3, 2)
    for given, forward in ((sums, True), (sums[:1], False)):
        with pytest.raises(RuntimeError, match="sums: "):
            call(
                "triton", "group_norm_silu_product_", X.clone(), given, X, X, stats, *[None] * 6,
                3, 1.0, True, forward,
            )  # fmt: skip
