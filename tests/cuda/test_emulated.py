"""The CUDA kernels, emulated, against the compiled CPU kernels: equal to the bit."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import emulated
import op_cases as cases
import pytest
import torch
from op_cases import ROWS, Case
from torch import Tensor

from sbm_fast import _load, noise
from sbm_fast.ops import _philox, affine_step, langevin_epsilon
from sbm_fast.ops import noise as noise_ops
from sbm_fast.plan import TAIL_LANES

pytestmark = [
    pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing()),
    pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON),
]
LAST = torch.channels_last
NAN = float("nan")
SHAPES = [(23, 5), (21,), (12, 1), (20, 3, 7, 9), (21, 128), (10, 1023), (10, 1024), (11, 1025),
          (10, 4, 33, 17), (10, 8, 8, 8), (11, 129, 4), (10, 4096)]  # fmt: skip
DTYPES = [torch.float32, torch.float64]
ORDER = 0
"""Changes with every call: forward, backward, then shuffled ever anew."""


def emulate(op: str, *arguments: Any) -> None:
    global ORDER
    ORDER += 1
    with emulated.emulator().order(ORDER % 5 if ORDER % 5 < 2 else ORDER):
        getattr(emulated, op)(*arguments)


@dataclass
class Bands:
    """Tensors that stand in the middle of larger memory, of which nothing else may change."""

    offset: int = 32
    held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def put(self, name: str, t: Tensor | None) -> Tensor | None:
        """A copy of t with t's strides; `offset` elements before and behind it."""
        if t is None:
            return None
        reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        memory = t.new_full((max(reach + 1, 0) + 2 * self.offset,), -77 if _whole(t) else NAN)
        view = memory.as_strided(t.shape, t.stride(), self.offset)
        view.copy_(t)
        self.held.append((name, view, memory))
        return view

    def check(self) -> None:
        for name, view, memory in self.held:
            free = torch.ones_like(memory, dtype=torch.bool)
            free.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            rest = memory[free]
            assert (rest == -77).all() if _whole(view) else rest.isnan().all(), name


def _whole(t: Tensor) -> bool:
    return not t.is_floating_point()


def differences(a: Tensor, b: Tensor) -> int:
    """Elements that are not equal to the bit, NaNs being equal."""
    if _whole(a):
        return int((a != b).sum())
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    other = a.contiguous().view(whole) != b.contiguous().view(whole)
    return int((other & ~(a.isnan() & b.isnan())).sum())


def outputs(case: Case, bands: Bands, net_input: Tensor | None) -> dict[str, Tensor | None]:
    """What a step writes, poisoned with NaN where the step may leave it alone."""
    batch, dtype = len(case.x), case.x.dtype
    out = {
        "x": case.x,
        "registers": case.registers,
        "net_input": net_input,
        "net_time": torch.full((batch,), NAN, dtype=dtype),
        "first_bad": case.first_bad,
        "epsilon": torch.full((batch,), NAN, dtype=dtype),
    }
    return {name: bands.put(name, t) for name, t in out.items()}


def step(
    call: Callable[..., None],
    case: Case,
    *,
    net_input: Tensor | None = None,
    offset: int = 32,
    leave_out: tuple[str, ...] = (),
    **extra: Any,
) -> dict[str, Tensor | None]:
    """One call on banded outputs; by default with a net_input of the network's dtype."""
    if net_input is None:
        net_input = torch.full_like(case.x, NAN, dtype=case.net_dtype)
        net_input = net_input.contiguous(memory_format=case.net_format)
    bands = Bands(offset)
    out = outputs(case, bands, net_input) | dict.fromkeys(leave_out)
    call(
        out["x"], case.network, case.uncond, case.guidance, out["registers"], case.keys, case.row,
        case.coef, case.field, out["epsilon"], case.noise, out["net_input"], out["net_time"],
        out["first_bad"], *extra.values(),
    )  # fmt: skip
    bands.check()
    return out


def emulated_step(*arguments: Any) -> None:
    emulate("affine_step_", *arguments)


def agree(case: Case, **how: Any) -> dict[str, Tensor | None]:
    """Both backends on the same call; what the emulated one wrote."""
    expected = step(affine_step.affine_step_, case, **how)
    got = step(emulated_step, case, **how)
    for name, e in expected.items():
        if e is not None:
            g = got[name]
            assert g is not None
            wrong = differences(g, e)
            assert wrong == 0, f"{name}: {wrong} of {e.numel()} elements"
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for guided in (False, True):
        for explicit in (False, True):
            agree(cases.make(shape, dtype=dtype, guided=guided, explicit=explicit))


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_one_row_for_all_samples(row: int) -> None:
    for shape in ((5, 3, 8, 8), (3, 2100), (9, 6)):
        for dtype in DTYPES:
            case = cases.make(shape, [row] * shape[0], dtype=dtype, seed=row)
            agree(case)
            agree(replace(case, row=case.row[:1].expand(shape[0])))


@pytest.mark.parametrize("net_dtype", [*DTYPES, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_network_dtypes_and_layouts(dtype: torch.dtype, net_dtype: torch.dtype) -> None:
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
def test_layouts_of_the_state_and_of_registers(dtype: torch.dtype) -> None:
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
def test_next_input_in_any_layout(net_dtype: torch.dtype) -> None:
    for shape in ((20, 4, 9, 11), (10, 8, 16, 8)):
        case = cases.make(shape, net_dtype=net_dtype)
        plain = torch.full(shape, NAN, dtype=net_dtype)
        sparse = torch.full((*shape[:-1], 2 * shape[-1]), NAN, dtype=net_dtype)[..., ::2]
        for net_input in (plain, plain.contiguous(memory_format=LAST), sparse):
            agree(case, net_input=net_input)
            agree(case, net_input=net_input, offset=33)


@pytest.mark.parametrize("numel", [1, 4, 63, 64, 65, 1020, 1023, 1024, 1025, 2048])
def test_misaligned_and_gapped_tensors(numel: int) -> None:
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
def test_empty(shape: tuple[int, ...]) -> None:
    """Nothing to do; what is written for a sample without elements differs between backends."""
    agree(cases.make(shape), leave_out=("net_time", "epsilon"))


def random_case(registers: int, seed: int, shape: tuple[int, ...], **how: Any) -> Case:
    """A table of random rows: every coefficient and every field there or not."""
    case = cases.make(shape, **how)
    g = torch.Generator().manual_seed(seed)
    rows, sources = 12, 4 + registers
    value = torch.randn(rows, 2 * sources + len(TAIL_LANES), generator=g, dtype=torch.float64)
    value *= torch.rand(value.shape, generator=g) < 0.6
    value[:, 2 * sources + TAIL_LANES.index("L")] = value[:, 0].abs()
    fields = torch.zeros(rows, 4, dtype=torch.int32)
    fields[:, 0] = torch.randint(-1, registers, (rows,), generator=g) if registers else -1
    fields[:, 1] = torch.randint(0, 3, (rows,), generator=g)
    fields[:, 2] = torch.randint(0, 2**31 - 1, (rows,), generator=g)
    fields[:, 3] = torch.randint(0, 4, (rows,), generator=g)
    return replace(
        case,
        value=value,
        field=fields,
        row=torch.randint(-1, rows + 1, (shape[0],), generator=g).to(torch.int32),
        registers=torch.randn(registers, *shape, generator=g, dtype=torch.float64).to(case.x.dtype),
    )


@pytest.mark.parametrize("registers", [0, 1, 3, 8])
def test_random_rows(registers: int) -> None:
    for seed in range(8):
        shape = ((30, 7), (20, 2, 6, 6), (9, 1100), (40, 32))[seed % 4]
        dtype = DTYPES[seed // 4]
        agree(random_case(registers, seed, shape, dtype=dtype, guided=seed % 3 == 0))


@pytest.mark.parametrize("shape", [(16, 5), (8, 2052), (8, 3, 16, 16)])
def test_what_a_row_does_not_read_cannot_leak(shape: tuple[int, ...]) -> None:
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


def test_first_bad_keeps_the_first_row() -> None:
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
def test_outputs_that_are_not_asked_for(leave_out: tuple[str, ...]) -> None:
    for shape in ((20, 3, 5, 7), (20, 64)):
        agree(cases.make(shape, guided=True), leave_out=leave_out)


# Norms: the sizes take one block, a block a sample, several tiles, and two launches.
NORM_SHAPES = [(12, 7), (12, 3, 8, 8), (7, 1024), (6, 4100), (5, 5000), (64, 1500), (2, 16385)]


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_rows(shape: tuple[int, ...], dtype: torch.dtype, coupled: bool) -> None:
    names = ("per_sample", "sqrt_d", "plain") + ("batch_mean", "batch_mean") * coupled
    rows = [ROWS.index(names[b % len(names)]) for b in range(shape[0])]
    for guided, net_dtype in ((False, torch.bfloat16), (True, dtype)):
        case = cases.make(shape, rows, dtype=dtype, net_dtype=net_dtype, guided=guided)
        agree(case, workspace=None, coupled=coupled)
        agree(replace(case, noise=torch.randn_like(case.x)), workspace=None, coupled=coupled)


def test_sixteen_tiles_on_chip() -> None:
    """The most noise that a block keeps, and one launch, where samples are many."""
    rows = [ROWS.index(("per_sample", "plain", "start", "sqrt_d")[min(b, 3)]) for b in range(64)]
    case = cases.make((64, 16384), rows)
    case.row[4:] = -1
    before = emulated.emulator().launches()
    agree(case, workspace=None, coupled=False)
    assert emulated.emulator().launches() - before == 1


def launches_of(case: Case, **how: Any) -> int:
    before = emulated.emulator().launches()
    step(emulated_step, case, **how)
    return emulated.emulator().launches() - before


def test_launches() -> None:
    """One where no norm is promised or the sample fits on chip, else two."""
    small, large = cases.make((5, 3, 32, 32), [1, 5, 6, 1, 5]), cases.make((2, 16388), [5, 5])
    for case in (small, large):
        assert launches_of(case, leave_out=("epsilon",)) == 1
        assert launches_of(case) == 2
    assert launches_of(small, workspace=None, coupled=False) == 1
    assert launches_of(large, workspace=None, coupled=False) == 2


def test_a_workspace_serves_many_calls() -> None:
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


def test_promises_that_are_not_kept_show_as_nan() -> None:
    """Nothing is read back from a GPU, so no error can be raised."""
    case = cases.make((6, 50), [ROWS.index("batch_mean"), 1, 5, 6, 1, 3])
    out = step(emulated_step, case, leave_out=("epsilon",))
    assert out["x"] is not None
    assert out["x"][[0, 2, 3]].isnan().all() and out["x"][[1, 4, 5]].isfinite().all()
    for shape in ((6, 50), (6, 3000), (6, 20000)):
        case = cases.make(shape, [ROWS.index("batch_mean"), 1, 5, 6, 1, 3])
        out = step(emulated_step, case, workspace=None, coupled=False)
        assert out["x"] is not None and out["epsilon"] is not None
        assert out["x"][0].isnan().all() and out["x"][1:].isfinite().all()
        assert out["epsilon"][0].isnan() and out["epsilon"][1:].isfinite().all()
    case = replace(cases.make((3, 50), [0, 1, 7]), network=None)
    out = step(emulated_step, case, leave_out=("epsilon",))
    assert out["x"] is not None
    assert out["x"][1].isnan().all() and out["x"][[0, 2]].isfinite().all()


def epsilon_of(call: Callable[..., None], case: Case) -> Tensor:
    bands = Bands()
    out = bands.put("epsilon", torch.full((len(case.x),), NAN, dtype=case.x.dtype))
    assert out is not None
    call(
        out, case.x, case.network, case.uncond, case.guidance, case.keys, case.row, case.coef,
        case.field, case.noise,
    )  # fmt: skip
    bands.check()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (21,), (20, 1), *NORM_SHAPES])
def test_langevin_epsilon(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for guided, explicit in ((False, False), (True, True)):
        case = cases.make(shape, dtype=dtype, guided=guided, explicit=explicit)
        expected = epsilon_of(langevin_epsilon.langevin_epsilon_, case)
        got = epsilon_of(lambda *a: emulate("langevin_epsilon_", *a), case)
        assert differences(got, expected) == 0


def test_batch_mean_over_many_samples() -> None:
    """The neighbour tree over the samples at such a row, in any number of warps and rounds."""
    for batch in (1, 2, 31, 33, 257, 1100):
        for share in (1, 3):
            rows = [ROWS.index("batch_mean") if b % share == 0 else 1 for b in range(batch)]
            case = cases.make((batch, 6), rows, seed=batch)
            agree(case, workspace=None, coupled=True)


def test_a_vanishing_score_lets_the_sample_rest() -> None:
    for norm in ("batch_mean", "per_sample", "sqrt_d"):
        case = cases.make((4, 9), [ROWS.index(norm)] * 4)
        assert case.network is not None
        case.x.zero_(), case.network.zero_()
        out = agree(case)
        assert not out["x"].any() and not out["epsilon"].any()  # type: ignore[union-attr]


def test_the_number_of_multiprocessors_does_not_matter() -> None:
    for shape in ((3, 20000), (40, 7), (6, 3, 40, 40)):
        for count in (1, 7, 108):
            with emulated.emulator().multiprocessors(count):
                agree(cases.make(shape, guided=True))


def test_the_network_may_return_its_input() -> None:
    for shape in ((6, 5), (6, 256)):
        case = cases.make(shape, [1] * 6)
        expected = step(affine_step.affine_step_, replace(case, network=case.x.clone()))
        bands = Bands()
        x = bands.put("x", case.x)
        emulate(
            "affine_step_", x, x, None, None, None, case.keys, case.row,
            *without_registers(case), None, None, None, None, None,
        )  # fmt: skip
        assert x is not None and expected["x"] is not None
        assert differences(x, expected["x"]) == 0


def without_registers(case: Case) -> tuple[Tensor, Tensor]:
    keep = [*range(4), *range(cases.WIDTH, cases.WIDTH + 4)]
    keep += range(2 * cases.WIDTH, case.value.shape[1])
    return cases.pack(case.value[:, keep], case.x.dtype), case.field


@pytest.mark.parametrize("kind", ["normal_", "uniform_", "rademacher_", "words_"])
def test_noise(kind: str) -> None:
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
                    check_noise(kind, layout, offset)


def check_noise(kind: str, like: Tensor, offset: int) -> None:
    bands = Bands(offset)
    keys = noise.keys(5, len(like), 3)
    got, expected = bands.put(kind, like), bands.put("expected", like)
    assert got is not None and expected is not None
    emulate(kind, got, keys, 2**32 - 1, 7)
    noise_ops.OPS[kind[:-1]](expected, keys, 2**32 - 1, 7)
    assert differences(got, expected) == 0
    bands.check()


def test_keys() -> None:
    for count in (0, 1, 31, 300):
        for seed, first in ((0, 0), (-1, 2**62), (2**63 - 1, 2**32 - 5)):
            bands = Bands()
            got = bands.put("keys", torch.zeros(count, dtype=torch.int64))
            assert got is not None
            emulate("keys_", got, seed, first)
            assert torch.equal(got, noise.keys(seed, count, first))
            bands.check()


HUGE = 2**31 + 4 * 1024


def reserved(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only what is touched takes memory."""
    no_reserve = 0x4000
    size = count * torch.empty((), dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


def late_words(keys: Tensor, first: int, count: int, draw: int, stream: int) -> tuple[Tensor, ...]:
    j = torch.arange(first // 4, (first + count) // 4)[None]
    there = torch.zeros_like(j)
    counter = (*_philox.split(j), there + draw, there + stream)
    return _philox.philox(counter, _philox.split(keys[:, None]))


def test_noise_beyond_two_to_the_31_elements() -> None:
    keys = noise.keys(3, 1)
    words = late_words(keys, HUGE - 1024, 1024, 4, 1)
    out = reserved(HUGE, torch.int32)[None]
    with emulated.emulator().last_blocks(2):
        emulate("words_", out, keys, 4, 1)
        assert torch.equal(out[:, -1024:], _philox.words_int32(words))
        normal = reserved(HUGE, torch.float32)[None]
        emulate("normal_", normal, keys, 4, 1)
    torch.testing.assert_close(
        normal[:, -1024:].double(), _philox.to_normal(words), rtol=0, atol=cases.NOISE_BOUND
    )


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_more_than_two_to_the_31_elements(net_dtype: torch.dtype) -> None:
    case = cases.make((1, 4), [ROWS.index("plain")])
    x, network = reserved(HUGE, torch.float32)[None], reserved(HUGE, net_dtype)[None]
    tail = slice(HUGE - 1024, HUGE)
    before = torch.randn(1, 1024, dtype=torch.float64).float()
    x[:, tail], network[:, tail] = before, torch.randn(1, 1024).to(net_dtype)
    with emulated.emulator().last_blocks(2):
        emulate(
            "affine_step_", x, network, None, None, None, case.keys, case.row,
            *without_registers(case), None, None, None, None, None,
        )  # fmt: skip
    _, stream, draw, _ = case.field[1].tolist()
    z = _philox.to_normal(late_words(case.keys, HUGE - 1024, 1024, draw, stream))
    a, b, _, d = case.value[1, :4].tolist()
    expected = a * before.double() + b * network[:, tail].double() + d * z
    torch.testing.assert_close(x[:, tail].double(), expected, rtol=1e-6, atol=2e-6)


def test_a_batch_of_more_than_two_to_the_31_elements() -> None:
    for numel in (8, 256):
        batch, last = 2**31 // numel + 40, 40
        end = cases.make((last, numel), [ROWS.index("plain")] * last)
        x = reserved(batch * numel, torch.float32).view(batch, numel)
        network, keys = torch.zeros_like(x[:1]).expand(batch, numel), reserved(batch, torch.int64)
        x[-last:], keys[-last:] = end.x, end.keys
        bad = reserved(batch, torch.int32)
        expected = step(affine_step.affine_step_, replace(end, network=network[-last:]))
        with emulated.emulator().last_blocks(4):
            emulate(
                "affine_step_", x, network, None, None, None, keys, end.row[:1].expand(batch),
                *without_registers(end), None, None, None, None, bad,
            )  # fmt: skip
        assert expected["x"] is not None
        count = 4 if numel == 256 else last
        assert differences(x[-count:], expected["x"][-count:]) == 0


def test_strides_beyond_two_to_the_31() -> None:
    case = cases.make((2, 3, 4, 64), [1, 3], net_dtype=torch.bfloat16)
    assert case.network is not None
    for strides in ((2**31 + 8, 256, 64, 1), (64, 128, 2**30 + 4, 1), (2, 2**30, 512, 8)):
        reach = 1 + sum((n - 1) * s for n, s in zip(case.x.shape, strides, strict=True))
        network = reserved(reach, torch.bfloat16).as_strided(case.x.shape, strides)
        agree(replace(case, network=network.copy_(case.network)))
        x = reserved(reach, torch.float32).as_strided(case.x.shape, strides).copy_(case.x)
        expected = step(affine_step.affine_step_, case)["x"]
        emulate(
            "affine_step_", x, case.network, None, None, case.registers, case.keys, case.row,
            case.coef, case.field, None, None, None, None, None,
        )  # fmt: skip
        assert expected is not None and differences(x, expected) == 0
