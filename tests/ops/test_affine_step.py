"""The affine step on every backend against its formula in float64."""

import itertools
from dataclasses import replace

import op_cases as cases
import pytest
import torch
from op_backends import BACKENDS, call, each, is_slow, over, parameters
from op_cases import ROWS
from torch import Tensor

LANE = 2 * cases.WIDTH
NAN = float("nan")
SHAPES = [(23, 5), (21,), (12, 1), (20, 3, 7, 9), (10, 1023), (11, 1025), (10, 4, 33, 17)]
KINDS = list(itertools.product(SHAPES, [torch.float32, torch.float64], [0, 1], [0, 1]))
FEW_KINDS = [
    ((10, 5), torch.float32, False, False),
    ((10,), torch.float64, True, True),
    ((10, 1), torch.float32, True, False),
    ((10, 1025), torch.float64, False, False),
    ((10, 4, 33, 17), torch.float32, True, True),
]


@over("shape,dtype,guided,explicit", KINDS, FEW_KINDS)
def test_mixed_rows_follow_the_formula(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, explicit: bool
) -> None:
    case = cases.make(shape, dtype=dtype, guided=guided, explicit=explicit)
    slack = 0.0 if explicit else 4 * cases.NOISE_BOUND
    assert cases.violation(case, cases.run(case, backend), slack) == ""


@each
@pytest.mark.parametrize("net_dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_dtypes(net_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    shape = (10 if is_slow(backend) else 20, 3, 5, 7)
    case = cases.make(shape, dtype=dtype, net_dtype=net_dtype, guided=True, explicit=True)
    out = cases.run(case, backend)
    assert cases.violation(case, out) == ""
    check_next(case, out)


def check_next(case: cases.Case, out: dict[str, Tensor]) -> None:
    """net_input = c_in·x' rounded once, net_time = label, where the next row evaluates."""
    coef = case.coef[:, 0]
    for b, row in enumerate(case.row.tolist()):
        c_in = coef[row, LANE + 3] if 0 <= row < len(coef) else torch.tensor(0.0)
        if c_in == 0:
            assert out["net_input"][b].isnan().all() and out["net_time"][b].isnan()
        else:
            assert torch.equal(out["net_input"][b], (c_in * out["x"][b]).to(case.net_dtype))
            assert out["net_time"][b] == coef[row, LANE + 4]


@each
@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_next_input_and_time(net_dtype: torch.dtype, backend: str) -> None:
    case = cases.make((10 if is_slow(backend) else 20, 3, 5, 7), net_dtype=net_dtype)
    plain = cases.run(case, backend)
    check_next(case, plain)
    last = replace(case, net_format=torch.channels_last)
    out = cases.run(last, backend)
    assert out["net_input"].is_contiguous(memory_format=torch.channels_last)
    assert cases.same(plain, out) == ""


@each
def test_half_infinities_overflow_and_subnormals(backend: str) -> None:
    """x' goes to half by rounding to nearest, with ∞ and subnormals as torch has them."""
    hard = torch.tensor([65504.0, 65519.9, 65520.0, 1e6, 6e-8, 2.9e-8, 3.1e-8, 1e-5, -7e-6, 0.0])
    case = cases.make((1, 10), [ROWS.index("scale")], net_dtype=torch.float16)
    case.value[ROWS.index("scale"), :1] = 1.0
    case.value[ROWS.index("scale"), LANE + 3] = 1.0
    case.x[0] = hard
    assert torch.equal(cases.run(case, backend)["net_input"][0], hard.half())


@each
def test_every_half_and_bfloat16_value_is_read_as_torch_reads_it(backend: str) -> None:
    bits = torch.arange(-(2**15), 2**15, 17 if is_slow(backend) else 1, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        case = cases.make((1, len(bits)), [1], net_dtype=dtype)
        case.value[1, : cases.WIDTH] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        case.network = bits.view(dtype)[None]
        out = cases.run(case, backend)
        finite = case.network.isfinite()
        assert torch.equal(out["x"][finite], case.network[finite].float())
        assert torch.equal(out["x"].isfinite(), finite)
        assert int(out["first_bad"]) == 1


@each
def test_finished_rows_are_left_alone(backend: str) -> None:
    for row in (-1, -7, len(ROWS), len(ROWS) + 5, 2**31 - 1, -(2**31)):
        case = cases.make((3, 7), [row] * 3)
        out = cases.run(case, backend)
        assert torch.equal(out["x"], case.x) and torch.equal(out["registers"], case.registers)
        assert out["net_input"].isnan().all() and out["net_time"].isnan().all()
        assert (out["first_bad"] == -1).all()


@over("shape", [(16, 5), (8, 2051)], [(3, 5), (1, 2051)])
def test_what_a_row_does_not_read_cannot_leak(backend: str, shape: tuple[int, ...]) -> None:
    """NaN in the network, in registers and in x where the coefficient is 0."""
    for name, poison in {
        "start": ("x", "network", "registers"),
        "plain": ("registers",),
        "scale": ("network", "registers"),
        "clamped": ("H1",),
        "per_sample": ("registers",),
    }.items():
        case = cases.make(shape, [ROWS.index(name)] * shape[0])
        clean = cases.run(case, backend)
        assert case.network is not None
        for what in poison:
            target = case.registers[1] if what == "H1" else getattr(case, what)
            target.fill_(NAN)
        out = cases.run(case, backend)
        assert out["x"].isfinite().all(), name
        assert torch.equal(out["x"], clean["x"]) and (out["first_bad"] == -1).all(), name


@each
@pytest.mark.parametrize("weight", [NAN, float("inf")])
def test_guidance_of_a_network_that_is_not_read_cannot_leak(backend: str, weight: float) -> None:
    case = cases.make((4, 9), [ROWS.index("scale")] * 4, guided=True)
    assert case.guidance is not None
    case.guidance.fill_(weight)
    out = cases.run(case, backend)
    assert out["x"].isfinite().all() and (out["first_bad"] == -1).all()


@each
def test_registers_are_read_before_they_are_written(backend: str) -> None:
    case = cases.make((4, 9), [ROWS.index("history")] * 4)
    case.field[ROWS.index("history"), 0] = 1
    out = cases.run(case, backend)
    assert cases.violation(case, out, 4 * cases.NOISE_BOUND) == ""
    assert torch.equal(out["registers"][0], case.registers[0])


@each
def test_clamps_keep_nan_and_first_bad_keeps_the_first_row(backend: str) -> None:
    clamped = ROWS.index("clamped")
    for bad in (NAN, float("inf"), -float("inf")):
        for net_dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = cases.make((5, 70), [clamped] * 5, net_dtype=net_dtype)
            assert case.network is not None
            case.network[1, 69] = bad
            case.network[3, 0] = bad
            case.first_bad = torch.tensor([-1, -1, -1, 0, -1], dtype=torch.int32)
            out = cases.run(case, backend)
            assert out["first_bad"].tolist() == [-1, clamped, -1, 0, -1], (bad, net_dtype)
            assert not out["x"][1, 69].isfinite()
            if bad != bad:
                assert out["registers"][0, 1, 69].isnan()
            assert out["x"][[0, 2, 4]].isfinite().all()


@each
def test_clamp_bounds_the_estimate(backend: str) -> None:
    case = cases.make((3, 50), [ROWS.index("clamped")] * 3)
    case.value[ROWS.index("clamped"), : 2 * cases.WIDTH] = 0
    case.value[ROWS.index("clamped"), 2] = 1.0
    case.x *= 10
    x = cases.run(case, backend)["x"]
    assert x.abs().max() == torch.tensor(0.8)


@each
def test_nothing_outside_the_outputs_is_written(backend: str) -> None:
    for numel in (129,) if is_slow(backend) else (1, 5, 63, 65, 1023, 1025):
        case = cases.make((10, numel))
        band = torch.full((12, numel + 40), NAN)
        band[1:11, 20 : 20 + numel] = case.x
        expected = cases.run(case, backend)["x"]
        case = replace(case, x=band[1:11, 20 : 20 + numel])
        call(
            backend, "affine_step_", case.x, case.network, None, None, case.registers, case.keys,
            case.row, case.coef, case.field, torch.zeros(10), None, None, None, None,
        )  # fmt: skip
        assert torch.equal(band[1:11, 20 : 20 + numel], expected)
        band[1:11, 20 : 20 + numel] = NAN
        assert band.isnan().all()


@each
@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (2, 3, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    out = cases.run(cases.make(shape), backend)
    assert out["x"].shape == shape


@each
def test_memory_formats_do_not_matter(backend: str) -> None:
    case = cases.make((10 if is_slow(backend) else 20, 4, 9, 11), guided=True)
    plain = cases.run(case, backend)
    assert case.network is not None and case.uncond is not None
    last = torch.channels_last
    other = replace(
        case,
        x=case.x.contiguous(memory_format=last),
        network=case.network.contiguous(memory_format=last),
        uncond=case.uncond.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        registers=case.registers.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    )
    assert cases.same(plain, cases.run(other, backend)) == ""


@over("shape", [(30, 3), (30, 257), (11, 2, 40, 33)], [(11, 5, 41)])
def test_threads_splits_and_permutations_do_not_matter(
    backend: str, shape: tuple[int, ...]
) -> None:
    case = cases.make(shape, guided=True)
    case.row[case.row == ROWS.index("batch_mean")] = ROWS.index("per_sample")
    whole = cases.run(case, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = cases.run(case, backend)
    torch.set_num_threads(before)
    assert cases.same(whole, threaded) == ""
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[3:10]):
        out = cases.run(cases.permuted(case, part), backend)
        for name in cases.OUTPUTS:
            expected = whole[name][:, part] if name == "registers" else whole[name][part]
            assert torch.equal(out[name].nan_to_num(7.0), expected.nan_to_num(7.0)), name


@each
def test_the_network_may_return_its_input(backend: str) -> None:
    case = cases.make((6, 5), [1] * 6)
    expected = cases.run(replace(case, network=case.x.clone()), backend)["x"]
    x = case.x.clone()
    call(
        backend, "affine_step_", x, x, None, None, case.registers, case.keys, case.row, case.coef,
        case.field, None, None, None, None, None,
    )  # fmt: skip
    assert torch.equal(x, expected)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
def test_backends_agree() -> None:
    for seed in range(3):
        case = cases.make((40, 130), guided=True, seed=seed)
        cpu, eager = cases.run(case, "cpu"), cases.run(case, "eager")
        for name in ("x", "registers"):
            torch.testing.assert_close(cpu[name], eager[name], rtol=2e-6, atol=1e-5)
        assert torch.equal(cpu["first_bad"], eager["first_bad"])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
@pytest.mark.parametrize(
    "backend", [parameters(name) for name in BACKENDS if name not in ("cpu", "eager")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10, 6), (10, 5, 31, 29)])
def test_kernels_give_the_bits_of_the_cpu(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    """The same formulas in the same order, fused where they say so: noise, rows and norms."""
    case = cases.make(shape, dtype=dtype, guided=True, seed=5)
    assert cases.same(cases.run(case, "cpu"), cases.run(case, backend)) == ""
