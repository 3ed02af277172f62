"""GroupNorm with FiLM, SiLU and the sum before it, and its products; for Triton, more stands in
tests/kernels."""

from dataclasses import replace

import noise_cases
import norm_cases as cases
import pytest
import torch
from norm_cases import BF16, F16, F32, F64, NAN
from op_backends import BACKENDS, call, over, parameters

from sbm_fast import _load

HERE = [name for name in ("eager", "cpu") if name in BACKENDS]
WITH_TRITON = [*HERE, *(name for name in ("triton",) if name in BACKENDS)]
each = pytest.mark.parametrize("backend", HERE)
each_with_triton = pytest.mark.parametrize("backend", [parameters(name) for name in WITH_TRITON])
SHAPES = [
    ((3, 8, 5, 7), 4), ((2, 6), 3), ((4, 5), 5), ((2, 12, 300), 2), ((2, 7, 3, 4, 5), 1),
    ((2, 64, 12, 12), 32), ((1, 3, 1, 1), 3), ((2, 6, 70, 71), 2), ((2, 4100, 2, 2), 10),
    ((2, 1, 9, 9), 1), ((5, 130, 4, 3), 13),
]  # fmt: skip
OPTIONS = [
    {"rows": ""},
    {"silu": False},
    {"rows": "weight bias scale shift"},
    {"rows": "bias scale add", "silu": False},
    {"rows": "weight bias scale shift add", "residual": True, "gain": 0.5**0.5},
    {"rows": "shift", "residual": True},
    {"gain": -3.0, "eps": 1e-2},
]


@over("shape,groups", SHAPES, [SHAPES[0]], WITH_TRITON)
@pytest.mark.parametrize("last", [False, True])
def test_the_formula(shape: tuple[int, ...], groups: int, last: bool, backend: str) -> None:
    for options in OPTIONS:
        case = cases.norm(shape, groups, last=last, **options)
        assert cases.violation(case, cases.output(case, backend)) == "", options


@each
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
def test_dtypes(dtype: torch.dtype, last: bool, backend: str) -> None:
    for shape, groups in (SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[7]):
        for options in (OPTIONS[2], OPTIONS[4]):
            case = cases.norm(shape, groups, last=last, dtype=dtype, **options)
            assert cases.violation(case, cases.output(case, backend)) == ""


@each_with_triton
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_dtypes_may_differ(dtype: torch.dtype, backend: str) -> None:
    """Rows and residual are widened; out is rounded once from what x's own dtype would give."""
    case = cases.norm((2, 6, 9, 5), 3, row_dtype=F16, last=True, **OPTIONS[4])
    assert case.residual is not None
    case.residual = case.residual.to(dtype)
    wide = case.to(F32)
    expected = cases.output(wide, backend)["out"]
    assert torch.equal(cases.output(case, backend)["out"], expected)
    assert torch.equal(cases.output(case, backend, dtype)["out"], expected.to(dtype))


@each
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_product(
    shape: tuple[int, ...], groups: int, last: bool, forward: bool, backend: str
) -> None:
    for options in (OPTIONS[0], OPTIONS[1], OPTIONS[2], OPTIONS[6]):
        p = cases.product(shape, groups, last=last, forward=forward, **options)
        assert cases.product_violation(p, cases.multiplied(p, backend)) == "", options


@each
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
def test_dtypes_of_the_product(dtype: torch.dtype, forward: bool, backend: str) -> None:
    for last in (False, True):
        p = cases.product((2, 6, 31, 33), 2, last=last, forward=forward, dtype=dtype, **OPTIONS[2])
        assert cases.product_violation(p, cases.multiplied(p, backend)) == ""


@each
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mean", [1e2, 1e4, -3e6])
def test_means_far_from_zero(mean: float, last: bool, backend: str) -> None:
    case = cases.norm((2, 6, 40, 33), 3, mean=mean, last=last)
    assert cases.violation(case, cases.output(case, backend)) == ""


@each
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_sum_that_nobody_wants(
    shape: tuple[int, ...], groups: int, last: bool, backend: str
) -> None:
    """Without a total it is made again in the second pass, or never stands in memory."""
    for options in (OPTIONS[3], OPTIONS[4], {"rows": "add", "dtype": BF16}):
        case = cases.norm(shape, groups, last=last, **options)
        assert cases.violation(case, cases.output(case, backend, keep=False)) == "", options
    for of_x, of_add in ((1e4, 0.0), (0.0, 1e4), (1e4, -1e4)):
        case = cases.norm(shape, groups, last=last, rows="weight add", mean=of_x)
        assert case.add is not None
        case.add += of_add
        assert cases.violation(case, cases.output(case, backend, keep=False)) == "", of_add


@each
def test_one_pixel_unlike_the_others(backend: str) -> None:
    """What a shift by the first values would not survive."""
    for last in (False, True):
        case = cases.norm((2, 4, 64, 64), 2, last=last)
        case.x[:, :, 0, 0] += 1e5
        assert cases.violation(case, cases.output(case, backend)) == ""


@each
@pytest.mark.parametrize("last", [False, True])
def test_nan_stays_in_its_group(last: bool, backend: str) -> None:
    case = cases.norm((3, 8, 40, 40), 4, last=last)
    clean = cases.output(case, backend)["out"]
    for value in (NAN, float("inf")):
        case.x[1, 5, 39, 2] = value
        got = cases.output(case, backend)["out"]
        hit = torch.zeros_like(got, dtype=torch.bool)
        hit[1, 4:6] = True
        assert got[hit].isnan().all() and torch.equal(got[~hit], clean[~hit])


@each_with_triton
def test_extremes_of_silu(backend: str) -> None:
    """σ's exponential neither overflows into a NaN nor hides one."""
    values = torch.tensor([-1e30, -200.0, -89.0, -88.5, -30.0, 0.0, 30.0, 88.5, 200.0, 1e30])
    shift = torch.cat((values, torch.tensor([float("inf"), NAN])))
    case = cases.norm((2, 12, 4), 3, rows="", silu=True)
    case = replace(case, scale=torch.full((2, 12), -1.0), shift=shift.expand(2, 12).contiguous())
    got = cases.output(case, backend)["out"]
    expected = torch.nn.functional.silu(shift.double())[None, :, None].expand(2, 12, 4)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@each_with_triton
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (0, 4), (2, 4, 0), (2, 4, 3, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    case = cases.norm(shape, 2, **OPTIONS[4])
    assert cases.output(case, backend)["out"].shape == shape
    sums = cases.multiplied(cases.product(shape, 2), backend)["sums"]
    assert torch.equal(sums, torch.zeros(*shape[:2], 2))


@each_with_triton
@pytest.mark.parametrize("last", [False, True])
def test_nothing_outside_the_outputs_is_written(last: bool, backend: str) -> None:
    for shape, groups in (((2, 6, 3, 5), 3), ((2, 6, 41, 53), 1), ((3, 70, 1, 1), 7)):
        case = cases.norm(shape, groups, last=last)
        bands = []
        for dtype, like in (
            (F32, case.x),
            (BF16, case.x),
            (F32, torch.empty(len(case.x), groups, 2)),
        ):
            band = torch.full((like.numel() + 128,), NAN, dtype=dtype)
            bands.append((band, band[64:-64].as_strided(like.shape, like.stride(), 64)))
        (_, out), (_, total), (_, stats) = bands
        call(
            backend, "group_norm_silu_", out, total, stats, case.x, case.weight, case.bias, None,
            None, None, None, groups, case.eps, case.gain, True,
        )  # fmt: skip
        expected = cases.output(case, backend)
        assert torch.equal(out, expected["out"]) and torch.equal(stats, expected["stats"])
        assert torch.equal(total, case.x.to(BF16))
        for band, _ in bands:
            band[64:-64] = NAN
            assert band.isnan().all()


@each_with_triton
def test_in_place(backend: str) -> None:
    for residual in (False, True):
        case = cases.norm((2, 8, 9, 9), 4, residual=residual)
        expected = cases.output(case, backend)["out"]
        out = case.x if case.residual is None else case.residual
        call(
            backend, "group_norm_silu_", out, None, torch.empty(2, 4, 2), case.x, case.weight,
            case.bias, None, None, None, case.residual, 4, case.eps, 1.0, True,
        )  # fmt: skip
        assert torch.equal(out, expected)


@each
@pytest.mark.parametrize(("shape", "groups"), [((9, 12, 5, 7), 3), ((3, 64, 24, 24), 8)])
@pytest.mark.parametrize("last", [False, True])
def test_threads_and_the_batch_do_not_matter(
    last: bool, shape: tuple[int, ...], groups: int, backend: str
) -> None:
    if backend == "eager":
        pytest.skip("torch's reductions promise nothing")
    case = cases.norm(shape, groups, last=last, **OPTIONS[4])
    p = cases.product(shape, groups, last=last)
    whole = cases.output(case, backend) | cases.multiplied(p, backend)
    before = torch.get_num_threads()
    for threads in (2, 3, before):
        torch.set_num_threads(threads)
        again = cases.output(case, backend) | cases.multiplied(p, backend)
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[1:3]):
        picked = cases.output(case.picked(part), backend)
        of_p = replace(p, case=p.case.picked(part), given=p.given[part])
        picked |= cases.multiplied(of_p, backend)
        assert all(torch.equal(picked[name], whole[name][part]) for name in whole)


LEVEL_CODE = """
import hashlib, norm_cases as cases
from sbm_fast import _load
print(_load.host.cpu_level())
for last in (False, True):
    for shape, groups in (((2, 6, 3, 5), 3), ((2, 40, 13, 9), 4)):
        case = cases.norm(shape, groups, last=last, rows="weight bias scale shift add")
        got = cases.output(case, "cpu") | {"alone": cases.output(case, "cpu", keep=False)["out"]}
        for forward in (False, True):
            p = cases.product(shape, groups, last=last, forward=forward)
            got |= {f"{k}{forward}": v for k, v in cases.multiplied(p, "cpu").items()}
        for value in got.values():
            print(hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest())
"""


@pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
def test_instruction_sets_give_the_same_bits() -> None:
    found = noise_cases.by_instruction_set(LEVEL_CODE)
    assert "portable" in found and len(set(found.values())) == 1, found
