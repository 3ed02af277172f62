"""The CUDA kernels against the compiled CPU kernels: equal to the bit. Emulated, and on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import conformance
import emulated
import op_cases as cases
import pytest
import torch
from conformance import NAN, Bands, Outputs, differences, epsilon_of, random_case
from op_cases import ROWS
from torch import Tensor

from sbm_fast import _load, noise
from sbm_fast.ops import affine_step

pytestmark = pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
LAST = torch.channels_last
SHAPES = [(23, 5), (21,), (12, 1), (20, 3, 7, 9), (21, 128), (10, 1023), (10, 1024), (11, 1025),
          (10, 4, 33, 17), (10, 8, 8, 8), (11, 129, 4), (10, 4096)]  # fmt: skip
DTYPES = [torch.float32, torch.float64]
Agree = Callable[..., Outputs]
EMULATED = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())


BACKENDS = [pytest.param("emulated", marks=EMULATED)]
if torch.cuda.is_available():
    BACKENDS.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def agree(backend: str) -> Agree:
    return partial(conformance.agree, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_rows(agree: Agree, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for guided in (False, True):
        for explicit in (False, True):
            agree(cases.make(shape, dtype=dtype, guided=guided, explicit=explicit))


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_one_row_for_all_samples(agree: Agree, row: int) -> None:
    for shape in ((5, 3, 8, 8), (3, 2100), (9, 6)):
        for dtype in DTYPES:
            case = cases.make(shape, [row] * shape[0], dtype=dtype, seed=row)
            agree(case)
            agree(replace(case, row=case.row[:1].expand(shape[0])))


@pytest.mark.parametrize("net_dtype", [*DTYPES, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_network_dtypes_and_layouts(
    agree: Agree, dtype: torch.dtype, net_dtype: torch.dtype
) -> None:
    for shape in ((20, 3, 5, 7), (10, 8, 12, 16), (10, 3, 32, 32)):
        case = cases.make(shape, dtype=dtype, net_dtype=net_dtype, guided=True)
        assert case.network is not None and case.uncond is not None
        plain = agree(case)
        turned = case.uncond.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        last = case.network.contiguous(memory_format=LAST)
        for network, uncond in ((last, case.uncond), (last, turned), (case.network, turned)):
            got = agree(replace(case, network=network, uncond=uncond, net_format=LAST))
            for name in ("x", "net_input"):
                assert differences(got[name], plain[name]) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_the_state_and_of_registers(agree: Agree, dtype: torch.dtype) -> None:
    for shape in ((20, 4, 9, 11), (10, 8, 16, 8)):
        case = cases.make(shape, dtype=dtype, guided=True, explicit=True)
        assert case.noise is not None
        channels = case.registers.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        agree(replace(case, x=case.x.contiguous(memory_format=LAST)))
        agree(replace(case, registers=channels))
        agree(replace(case, noise=case.noise.contiguous(memory_format=LAST)))
        other = case.x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
        agree(replace(case, x=other, registers=channels))


@pytest.mark.parametrize("net_dtype", [*DTYPES, torch.bfloat16, torch.float16])
def test_next_input_in_any_layout(agree: Agree, net_dtype: torch.dtype) -> None:
    for shape in ((20, 4, 9, 11), (10, 8, 16, 8)):
        case = cases.make(shape, net_dtype=net_dtype)
        plain = torch.full(shape, NAN, dtype=net_dtype)
        sparse = torch.full((*shape[:-1], 2 * shape[-1]), NAN, dtype=net_dtype)[..., ::2]
        for net_input in (plain, plain.contiguous(memory_format=LAST), sparse):
            agree(case, net_input=net_input)
            agree(case, net_input=net_input, offset=33)


@pytest.mark.parametrize("numel", [1, 4, 63, 64, 65, 1020, 1023, 1024, 1025, 2048])
def test_misaligned_and_gapped_tensors(agree: Agree, numel: int) -> None:
    for dtype in DTYPES:
        for net_dtype in (dtype, torch.bfloat16):
            case = cases.make((11, numel), dtype=dtype, net_dtype=net_dtype, guided=True)
            assert case.network is not None
            for offset in (33, 34, 36):
                agree(case, offset=offset)
            shifted, gapped = (torch.full((11, numel + g), NAN, dtype=net_dtype) for g in (1, 5))
            shifted = shifted.flatten()[1 : 1 + 11 * numel].view(11, numel).copy_(case.network)
            gapped = gapped[:, 2 : 2 + numel].copy_(case.network)
            for network in (shifted, gapped):
                agree(replace(case, network=network))
            wide = torch.full((11, numel + 3), NAN, dtype=dtype)
            agree(replace(case, x=wide[:, 1 : 1 + numel].copy_(case.x)))


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (2, 3, 0)])
def test_empty(agree: Agree, shape: tuple[int, ...]) -> None:
    """Nothing to do; what is written for a sample without elements differs between backends."""
    agree(cases.make(shape), leave_out=("net_time", "epsilon"))


@pytest.mark.parametrize("registers", [0, 1, 3, 8])
def test_random_rows(agree: Agree, registers: int) -> None:
    for seed in range(8):
        shape = ((30, 7), (20, 2, 6, 6), (9, 1100), (40, 32))[seed % 4]
        dtype = DTYPES[seed // 4]
        agree(random_case(registers, seed, shape, dtype=dtype, guided=seed % 3 == 0))


@pytest.mark.parametrize("poison", ["x", "network", "H0", "H2"])
def test_a_source_reaches_only_what_its_coefficients_say(agree: Agree, poison: str) -> None:
    """Each of x' and the register's own coefficients gates what it reads: 0·NaN is no NaN."""
    for seed in range(4):
        shape = ((40, 7), (40, 32))[seed % 2]
        case = random_case(3, seed, shape, dtype=DTYPES[seed // 2])
        case.field[:, 3] = 0
        bad = case.registers[int(poison[1])] if poison[0] == "H" else getattr(case, poison)
        bad[:, ::3] = NAN
        out = agree(case)
        assert out["x"] is not None and out["x"].isnan().any() and out["x"].isfinite().any()


@pytest.mark.parametrize("shape", [(16, 5), (8, 2052), (8, 3, 16, 16)])
def test_what_a_row_does_not_read_cannot_leak(agree: Agree, shape: tuple[int, ...]) -> None:
    for name, poisons in {
        "start": ("x", "network", "registers"),
        "plain": ("registers",),
        "scale": ("network", "registers"),
        "per_sample": ("registers",),
    }.items():
        for net_dtype in (torch.float32, torch.bfloat16):
            case = cases.make(shape, [ROWS.index(name)] * shape[0], net_dtype=net_dtype)
            for what in poisons:
                getattr(case, what).fill_(NAN)
            out = agree(case)
            assert out["x"].isfinite().all(), name  # type: ignore[union-attr]


def test_first_bad_keeps_the_first_row(agree: Agree) -> None:
    clamped = ROWS.index("clamped")
    for numel in (70, 64, 1500):
        for net_dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for bad in (NAN, float("inf")):
                case = cases.make((6, numel), [clamped] * 5 + [0], net_dtype=net_dtype)
                assert case.network is not None
                case.network[1, numel - 1] = case.network[3, 0] = case.network[5, 2] = bad
                case.first_bad = torch.tensor([-1, -1, -1, 0, -1, -1], dtype=torch.int32)
                out = agree(case)
                expected = [-1, clamped, -1, 0, -1, -1]
                assert out["first_bad"].tolist() == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("leave_out", [("net_input",), ("net_time",), ("first_bad",),
                                       ("net_input", "net_time", "first_bad")])  # fmt: skip
def test_outputs_that_are_not_asked_for(agree: Agree, leave_out: tuple[str, ...]) -> None:
    for shape in ((20, 3, 5, 7), (20, 64)):
        agree(cases.make(shape, guided=True), leave_out=leave_out)


# Norms: the sizes take one block, a block a sample, several tiles, and two launches.
NORM_SHAPES = [
    (12, 7),
    (12, 3, 8, 8),
    (7, 1024),
    (12, 3000),
    (6, 4100),
    (5, 5000),
    (64, 1500),
    (2, 16385),
]


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_rows(agree: Agree, shape: tuple[int, ...], dtype: torch.dtype, coupled: bool) -> None:
    names = ("per_sample", "sqrt_d", "plain") + ("batch_mean", "batch_mean") * coupled
    rows = [ROWS.index(names[b % len(names)]) for b in range(shape[0])]
    for guided, net_dtype in ((False, torch.bfloat16), (True, dtype)):
        case = cases.make(shape, rows, dtype=dtype, net_dtype=net_dtype, guided=guided)
        agree(case, workspace=None, coupled=coupled)
        agree(replace(case, noise=torch.randn_like(case.x)), workspace=None, coupled=coupled)


def test_a_workspace_serves_many_calls(agree: Agree) -> None:
    for shape in ((12, 7), (6, 5000), (5, 3, 32, 32)):
        for dtype in DTYPES:
            names = ("batch_mean", "per_sample", "plain", "sqrt_d", "batch_mean")
            rows = [ROWS.index(names[b % 5]) for b in range(shape[0])]
            workspace = affine_step.workspace_for(torch.empty(shape, dtype=dtype))
            bands = Bands()
            held = bands.put("workspace", workspace)
            assert held is not None
            for seed in range(6):
                case = cases.make(shape, rows, dtype=dtype, seed=seed)
                agree(case, workspace=held, coupled=True)
                assert not held[:4].view(torch.uint8).any(), "the ticket is not back at 0"
            bands.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (21,), (20, 1), *NORM_SHAPES])
def test_langevin_epsilon(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for guided, explicit in ((False, False), (True, True)):
        case = cases.make(shape, dtype=dtype, guided=guided, explicit=explicit)
        assert differences(epsilon_of(backend, case), epsilon_of("cpu", case)) == 0


def test_batch_mean_over_many_samples(agree: Agree) -> None:
    """The neighbour tree over the samples at such a row, in any number of warps and rounds."""
    for batch in (1, 2, 31, 33, 257, 1100):
        for share in (1, 3):
            rows = [ROWS.index("batch_mean") if b % share == 0 else 1 for b in range(batch)]
            case = cases.make((batch, 6), rows, seed=batch)
            agree(case, workspace=None, coupled=True)


def test_a_vanishing_score_lets_the_sample_rest(agree: Agree) -> None:
    for norm in ("batch_mean", "per_sample", "sqrt_d"):
        case = cases.make((4, 9), [ROWS.index(norm)] * 4)
        assert case.network is not None
        case.x.zero_(), case.network.zero_()
        out = agree(case)
        assert not out["x"].any() and not out["epsilon"].any()  # type: ignore[union-attr]


def test_the_network_may_return_its_input(backend: str) -> None:
    for shape in ((6, 5), (6, 256)):
        case = cases.make(shape, [1] * 6)
        expected = conformance.step("cpu", replace(case, network=case.x.clone()))
        bands = Bands()
        x = bands.put("x", case.x)
        conformance.call(
            backend, "affine_step_", x, x, None, None, None, case.keys, case.row,
            *conformance.without_registers(case), None, None, None, None, None,
        )  # fmt: skip
        assert x is not None and expected["x"] is not None
        assert differences(x, expected["x"]) == 0


@pytest.mark.parametrize("kind", ["normal_", "uniform_", "rademacher_", "words_"])
def test_noise(backend: str, kind: str) -> None:
    dtypes = [torch.int32] if kind == "words_" else [*DTYPES, torch.bfloat16, torch.float16]
    for shape in ((0, 3), (3, 0), (5,), (40, 3), (9, 64), (3, 1023), (2, 4100), (3, 4, 5, 6)):
        for dtype in dtypes:
            like = torch.zeros(shape, dtype=dtype)
            layouts = [like]
            if len(shape) == 4 and kind != "words_":
                layouts += [like.contiguous(memory_format=LAST), like.double()[:, :, ::2].to(dtype)]
                layouts += [torch.zeros(3, 4, 5, 12, dtype=dtype)[..., ::2]]
            for layout in layouts:
                for offset in (32, 33):
                    check_noise(backend, kind, layout, offset)


def check_noise(backend: str, kind: str, like: Tensor, offset: int) -> None:
    bands = Bands(offset)
    keys = noise.keys(5, len(like), 3)
    got, expected = bands.put(kind, like), bands.put("expected", like)
    assert got is not None and expected is not None
    for name, out in ((backend, got), ("cpu", expected)):
        conformance.call(name, kind, out, keys, 2**32 - 1, 7)
    assert differences(got, expected) == 0
    bands.check()


def test_keys(backend: str) -> None:
    for count in (0, 1, 31, 300):
        for seed, first in ((0, 0), (-1, 2**62), (2**63 - 1, 2**32 - 5)):
            bands = Bands()
            got = bands.put("keys", torch.zeros(count, dtype=torch.int64))
            assert got is not None
            conformance.call(backend, "keys_", got, seed, first)
            assert torch.equal(got, noise.keys(seed, count, first))
            bands.check()
