"""The error of a Runge–Kutta step in units of its tolerance, on every backend."""

import flow_cases as cases
import pytest
import torch
from op_backends import TWINLESS, over

SHAPES = [(23, 5), (21,), (7, 1), (5, 3, 7, 9), (3, 1023), (2, 1024), (3, 1025), (2, 4, 33, 41)]
FEW_SHAPES = [(3, 5), (4,), (2, 3, 7, 9), (2, 1024), (1, 4, 33, 41)]


@over("shape", SHAPES, FEW_SHAPES, TWINLESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stages", [1, 3, 8, 13])
def test_the_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype, stages: int) -> None:
    case = cases.error(shape, stages, dtype=dtype)
    assert cases.norm_violation(case, cases.norm(case, backend)) == ""
