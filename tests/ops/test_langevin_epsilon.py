"""The data-dependent step size: alone, and as the step finds it."""

from dataclasses import replace

import op_cases as cases
import pytest
import torch
from op_backends import call, each, is_slow, over
from op_cases import ROWS
from torch import Tensor

NORMS = ("batch_mean", "per_sample", "sqrt_d")


def epsilon_of(case: cases.Case, backend: str) -> Tensor:
    out = torch.full((len(case.x),), float("nan"), dtype=case.x.dtype)
    call(
        backend, "langevin_epsilon_", out, case.x, case.network, case.uncond, case.guidance,
        case.keys, case.row, case.coef, case.field, case.noise,
    )  # fmt: skip
    return out


def violation(case: cases.Case, got: Tensor) -> str:
    """ "" when ε is the float64 formula to twice torch's own error (plus the noise's own bound)."""
    exact = cases.epsilons(case, torch.float64)
    plain = cases.epsilons(case, case.x.dtype).double()
    wide = case.x.dtype == torch.float64
    ulp = torch.finfo(case.x.dtype).eps * (64 if wide else 4)
    noise = 0.0 if case.noise is not None else 4 * cases.NOISE_BOUND
    error = (got.double() - exact).abs()
    bound = 2 * (plain - exact).abs() + (ulp + noise) * exact.abs()
    at = int((error - bound).argmax()) if len(error) else 0
    if len(error) == 0 or bool((error <= bound).all()):
        return ""
    return f"sample {at}: {got[at]} against {exact[at]}"


SHAPES = [(21,), (20, 1), (20, 5), (11, 3, 31, 33), (11, 1024), (12, 5000)]
FEW_SHAPES = [(11,), (10, 5), (10, 3, 31, 33), (10, 5000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over("shape", SHAPES, FEW_SHAPES)
def test_mixed_rows_follow_the_formula(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for guided, explicit in ((False, False), (True, True)):
        case = cases.make(shape, dtype=dtype, guided=guided, explicit=explicit)
        got = epsilon_of(case, backend)
        assert violation(case, got) == ""
        others = [b for b in range(len(got)) if cases.norm_of(case, b) == 0]
        assert (got[others] == 0).all()


@each
@pytest.mark.parametrize("norm", NORMS)
def test_the_step_finds_the_same_epsilon(norm: str, backend: str) -> None:
    shape = (3, 30, 41) if is_slow(backend) else (7, 3, 40, 41)
    case = cases.make(shape, [ROWS.index(norm)] * shape[0], guided=True)
    out = cases.run(case, backend)
    assert torch.equal(out["epsilon"], epsilon_of(case, backend))
    assert cases.violation(case, out, 8 * cases.NOISE_BOUND) == ""


@each
@pytest.mark.parametrize("norm", NORMS)
def test_a_vanishing_score_lets_the_sample_rest(norm: str, backend: str) -> None:
    case = cases.make((4, 9), [ROWS.index(norm)] * 4)
    resting = slice(None) if norm == "batch_mean" else slice(1, 3)
    case.x[resting] = 0
    assert case.network is not None
    case.network[resting] = 0
    out = cases.run(case, backend)
    assert (out["epsilon"][resting] == 0).all()
    assert torch.equal(out["x"][resting], case.x[resting])
    assert out["x"].isfinite().all()


@each
def test_batch_mean_sees_only_the_samples_at_such_a_row(backend: str) -> None:
    row = ROWS.index("batch_mean")
    case = cases.make((6, 50), [row, 1, row, -1, row, len(ROWS)])
    alone = cases.permuted(case, torch.tensor([0, 2, 4]))
    assert torch.equal(epsilon_of(case, backend)[[0, 2, 4]], epsilon_of(alone, backend))


@over("shape", [(12, 7), (12, 3, 33, 32)], [(12, 3, 4, 5)])
def test_batch_memory_and_threads_do_not_matter(backend: str, shape: tuple[int, ...]) -> None:
    rows = [ROWS.index(n) for n in ("per_sample", "sqrt_d")] * 6
    case = cases.make(shape, rows)
    whole = epsilon_of(case, backend)
    for part in (torch.arange(5, 6), torch.arange(11, -1, -1)):
        assert torch.equal(epsilon_of(cases.permuted(case, part), backend), whole[part])
    if len(shape) == 4:
        assert case.network is not None
        last = torch.channels_last
        other = replace(
            case,
            x=case.x.contiguous(memory_format=last),
            network=case.network.contiguous(memory_format=last),
        )
        assert torch.equal(epsilon_of(other, backend), whole)
    both = cases.make(shape, [ROWS.index("batch_mean")] * 12)
    one = epsilon_of(both, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(epsilon_of(case, backend), whole)
    assert torch.equal(epsilon_of(both, backend), one)
    torch.set_num_threads(before)


@each
def test_nan_in_the_score_is_not_hidden(backend: str) -> None:
    case = cases.make((3, 9), [ROWS.index("per_sample")] * 3)
    assert case.network is not None
    case.network[1, 4] = float("nan")
    got = epsilon_of(case, backend)
    assert got[1].isnan() and got[[0, 2]].isfinite().all()
    assert cases.run(case, backend)["first_bad"].tolist() == [-1, ROWS.index("per_sample"), -1]


@each
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    epsilon_of(cases.make(shape), backend)
