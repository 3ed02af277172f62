"""Drift and divergence of the probability flow on every backend."""

import itertools

import flow_cases as cases
import pytest
import torch
from op_backends import TWINLESS, each_twinless, is_slow, over

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = float("nan")
SHAPES = [(23, 5), (21,), (7, 1), (5, 3, 7, 9), (3, 1023), (2, 1024), (3, 1025), (2, 4, 33, 41)]
FEW_SHAPES = [(3, 5), (4,), (2, 3, 7, 9), (2, 1024), (1, 4, 33, 41)]


@over("shape", SHAPES, FEW_SHAPES, TWINLESS)
@pytest.mark.parametrize("probes", [None, 1, 3, 8])
def test_the_formula(backend: str, shape: tuple[int, ...], probes: int | None) -> None:
    if is_slow(backend) and probes == 8:
        probes = 2
    kinds = [(F32, F32), (F32, F64), (F64, F64), (F64, F32)]
    for dtype, sums in kinds[:2] if is_slow(backend) else kinds:
        for gaussian in (False, True):
            case = cases.flow(shape, probes, dtype=dtype, sums=sums, gaussian=gaussian)
            assert cases.violation(case, cases.slope(case, backend)) == "", (dtype, sums)


@each_twinless
@pytest.mark.parametrize("net_dtype", [F32, F64, BF16, F16])
def test_dtypes_of_network_and_product(net_dtype: torch.dtype, backend: str) -> None:
    for dtype, sums, gaussian in itertools.product((F32, F64), (F32, F64), (False, True)):
        case = cases.flow(
            (3, 3, 5, 7), 2, dtype=dtype, net_dtype=net_dtype, sums=sums, gaussian=gaussian
        )
        assert cases.violation(case, cases.slope(case, backend)) == ""


@over("shape", [(30, 3), (9, 257), (5, 2, 40, 33)], [(5, 3), (3, 2, 40, 33)], TWINLESS)
def test_threads_splits_and_permutations_do_not_matter(
    backend: str, shape: tuple[int, ...]
) -> None:
    case = cases.flow(shape, 3)
    whole = cases.slope(case, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = cases.slope(case, backend)
    torch.set_num_threads(before)
    assert cases.same(whole, threaded)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[1:3]):
        drift, divergence = cases.slope(cases.picked(case, part), backend)
        assert whole[1] is not None and divergence is not None
        assert torch.equal(drift, whole[0][part]) and torch.equal(divergence, whole[1][:, part])
