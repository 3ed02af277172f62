"""The error of a Runge–Kutta step in units of its tolerance, on every backend."""

from dataclasses import replace

import flow_cases as cases
import pytest
import torch
from op_backends import BACKENDS, TWINLESS, call, each_twinless, is_slow, over, parameters

NAN, INF = float("nan"), float("inf")
SHAPES = [(23, 5), (21,), (7, 1), (5, 3, 7, 9), (3, 1023), (2, 1024), (3, 1025), (2, 4, 33, 41)]
FEW_SHAPES = [(3, 5), (4,), (2, 3, 7, 9), (2, 1024), (1, 4, 33, 41)]


@over("shape", SHAPES, FEW_SHAPES, TWINLESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stages", [1, 3, 8, 14])
def test_the_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype, stages: int) -> None:
    case = cases.error(shape, stages, dtype=dtype)
    assert cases.norm_violation(case, cases.norm(case, backend)) == ""


@over("shape", [(5, 7), (5, 3, 31, 33)], [(5, 7)], TWINLESS)
def test_slopes_that_cancel_leave_their_digits(backend: str, shape: tuple[int, ...]) -> None:
    """A step's error is small beside its slopes; those are where the step size comes from."""
    for dtype in (torch.float32, torch.float64):
        case = cases.smooth(shape, dtype)
        assert cases.loses_digits(case, cases.norm(case, backend)) == ""


@each_twinless
@pytest.mark.parametrize("tolerance", [(1 / 3, 0.0), (0.0, 0.1), (1e-12, 1e-9), (3.0, 0.7)])
def test_tolerances_are_exact(tolerance: tuple[float, float], backend: str) -> None:
    """A float64 state sees all their bits."""
    case = replace(cases.error((3, 50), dtype=torch.float64), atol=tolerance[0], rtol=tolerance[1])
    assert cases.norm_violation(case, cases.norm(case, backend)) == ""


@over("shape", [(6, 5), (6, 2, 33, 35)], [(6, 5), (6, 4097)], TWINLESS)
def test_nan_is_not_hidden(backend: str, shape: tuple[int, ...]) -> None:
    """Neither in a slope nor in the states, on either side of the maximum."""
    for dtype in (torch.float32, torch.float64):
        assert cases.hides_nan(shape, dtype, backend) == ""


@each_twinless
def test_a_weight_of_0_does_not_read_its_register(backend: str) -> None:
    case = cases.error((5, 33), 6)
    case.weights[:, 2] = 0.0
    case.weights[3, 4] = 0.0
    case.weights[:, 0] = NAN  # that of the old state
    clean = cases.norm(case, backend)
    assert clean.isfinite().all()
    case.registers[2] = NAN
    case.registers[4, 3] = INF
    assert torch.equal(cases.norm(case, backend), clean)


@each_twinless
def test_extremes(backend: str) -> None:
    """No error is 0; none allowed, and none made, is 0/0; what overflows is infinite."""
    case = cases.error((2, 9), 3)
    nothing = replace(case, weights=torch.zeros_like(case.weights))
    assert (cases.norm(nothing, backend) == 0).all()
    exact = replace(nothing, atol=0.0, rtol=0.0)
    assert cases.norm(exact, backend).isnan().all()
    huge = replace(case, registers=case.registers * 1e30, x=case.x * 0, rtol=0.0)
    assert (cases.norm(huge, backend) == INF).all()


@each_twinless
def test_nothing_outside_the_output_is_written(backend: str) -> None:
    for numel in (129, 4097) if is_slow(backend) else (1, 5, 63, 65, 1023, 1025):
        case = cases.error((6, numel), 3)
        band = torch.full((46,), NAN)
        call(
            backend, "error_norm_", band[20:26], case.x, case.registers, case.weights, case.atol,
            case.rtol,
        )  # fmt: skip
        assert torch.equal(band[20:26], cases.norm(case, backend))
        band[20:26] = NAN
        assert band.isnan().all()


@each_twinless
@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (2, 3, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    case = cases.error(shape, 3)
    case.weights.fill_(NAN)
    assert torch.equal(cases.norm(case, backend), torch.zeros(shape[0]))


@each_twinless
def test_memory_formats_do_not_matter(backend: str) -> None:
    case = cases.error((2 if is_slow(backend) else 9, 4, 17, 19), 4)
    plain = cases.norm(case, backend)
    last = torch.channels_last
    of_stages = case.registers.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    swapped = case.registers.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.zeros(4, 2 * len(case.x), dtype=torch.float64).T[::2]
    spread.copy_(case.weights)
    for registers in (of_stages, swapped):
        other = replace(
            case, x=case.x.contiguous(memory_format=last), registers=registers, weights=spread
        )
        assert torch.equal(cases.norm(other, backend), plain)
    assert torch.equal(cases.norm(replace(case, registers=of_stages), backend), plain)


@over("shape", [(30, 3), (9, 257), (5, 2, 40, 33)], [(5, 3), (3, 2, 40, 33)], TWINLESS)
def test_threads_splits_and_permutations_do_not_matter(
    backend: str, shape: tuple[int, ...]
) -> None:
    case = cases.error(shape)
    whole = cases.norm(case, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = cases.norm(case, backend)
    torch.set_num_threads(before)
    assert torch.equal(whole, threaded)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[1:3]):
        assert torch.equal(cases.norm(cases.norm_picked(case, part), backend), whole[part])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
@pytest.mark.parametrize(
    "backend", [parameters(name) for name in TWINLESS if name not in ("cpu", "eager")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 19, 31), (2, 5, 31, 29)])
def test_kernels_give_the_bits_of_the_cpu(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    case = cases.error(shape, dtype=dtype, seed=5)
    assert torch.equal(cases.norm(case, "cpu"), cases.norm(case, backend))


@pytest.mark.parametrize("backend", [name for name in TWINLESS if BACKENDS[name].device == "cpu"])
def test_registers_beyond_two_to_the_31_elements(backend: str) -> None:
    case = cases.error((1, 70), 2)
    far = replace(case, registers=cases.far_apart(case.registers))
    assert torch.equal(cases.norm(case, backend), cases.norm(far, backend))
