"""What only the emulator can look at: launches, huge sizes, memory outside every tensor."""

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import op_cases as cases
import pytest
import torch
from conformance import agree, call, differences, step, without_registers
from op_cases import ROWS, Case
from torch import Tensor

from sbm_fast import _load, noise
from sbm_fast.ops import _philox

pytestmark = [
    pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing()),
    pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON),
]


def launches_of(case: Case, **how: Any) -> int:
    before = emulated.emulator().launches()
    step("emulated", case, **how)
    return emulated.emulator().launches() - before


def test_launches() -> None:
    """One where no norm is promised or the sample fits on chip, else two."""
    small, large = cases.make((5, 3, 32, 32), [1, 5, 6, 1, 5]), cases.make((2, 16388), [5, 5])
    for case in (small, large):
        assert launches_of(case, leave_out=("epsilon",)) == 1
        assert launches_of(case) == 2
    assert launches_of(small, workspace=None, coupled=False) == 1
    assert launches_of(large, workspace=None, coupled=False) == 2


def few_live(shape: tuple[int, ...], rows: tuple[str, ...], **how: Any) -> Case:
    """A batch large enough to be cut in the ways of large ones, of which most samples rest."""
    live = cases.make((len(rows), *shape[1:]), [ROWS.index(name) for name in rows], **how)
    at = torch.arange(len(rows)) * (shape[0] - 1) // (len(rows) - 1)

    def among(t: Tensor, rest: int = 0) -> Tensor:
        return t.new_full((shape[0], *t.shape[1:]), rest).index_copy_(0, at, t)

    assert live.network is not None
    registers = live.registers.transpose(0, 1)
    return replace(
        live,
        x=among(live.x),
        network=among(live.network),
        row=among(live.row, -1),
        keys=among(live.keys),
        registers=among(registers).transpose(0, 1),
        first_bad=among(live.first_bad, -1),
    )


def test_blocks_of_several_tiles() -> None:
    """What a block sums and steps in a loop, sixteen tiles kept on chip among it."""
    norms = ("per_sample", "plain", "sqrt_d", "start", "per_sample", "history", "per_sample")
    large = few_live((4300, 1028), norms)
    agree("emulated", large)
    chip = few_live((264, 16384), norms + norms)
    before = emulated.emulator().launches()
    agree("emulated", chip, workspace=None, coupled=False)
    assert emulated.emulator().launches() - before == 1
    plain = few_live((2200, 3076), ("plain", "start", "clamped", "history", "scale"))
    agree("emulated", plain, leave_out=("epsilon",))
    last = few_live((2200, 4, 32, 32), ("plain", "history", "clamped"), net_dtype=torch.bfloat16)
    assert last.network is not None
    network = last.network.contiguous(memory_format=torch.channels_last)
    last = replace(last, network=network, net_format=torch.channels_last)
    agree("emulated", last, leave_out=("epsilon",))


def test_promises_that_are_not_kept_show_as_nan() -> None:
    """Nothing is read back from a GPU, so no error can be raised."""
    case = cases.make((6, 50), [ROWS.index("batch_mean"), 1, 5, 6, 1, 3])
    out = step("emulated", case, leave_out=("epsilon",))
    assert out["x"] is not None
    assert out["x"][[0, 2, 3]].isnan().all() and out["x"][[1, 4, 5]].isfinite().all()
    for shape in ((6, 50), (6, 3000), (6, 20000)):
        case = cases.make(shape, [ROWS.index("batch_mean"), 1, 5, 6, 1, 3])
        out = step("emulated", case, workspace=None, coupled=False)
        assert out["x"] is not None and out["epsilon"] is not None
        assert out["x"][0].isnan().all() and out["x"][1:].isfinite().all()
        assert out["epsilon"][0].isnan() and out["epsilon"][1:].isfinite().all()
    case = replace(cases.make((3, 50), [0, 1, 7]), network=None)
    out = step("emulated", case, leave_out=("epsilon",))
    assert out["x"] is not None
    assert out["x"][1].isnan().all() and out["x"][[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
@pytest.mark.parametrize("shift", [-36, -1, 1, 36, -72, 72])
def test_an_output_that_begins_before_or_within_the_state(backend: str, shift: int) -> None:
    """Two windows of one buffer: refused where they share memory, from either side."""
    case = cases.make((2, 36), [ROWS.index("plain")] * 2)
    buffer = torch.zeros(3 * 72)
    x, network = (buffer[at : at + 72].view(2, 36).copy_(case.x) for at in (72, 72 + shift))
    given = (x, network, None, None, None, case.keys, case.row, *without_registers(case))
    if abs(shift) == 72:
        call(backend, "affine_step_", *given, None, None, None, None, None)
        return
    with pytest.raises(RuntimeError, match="network: is another view of the state"):
        call(backend, "affine_step_", *given, None, None, None, None, None)


def test_the_stride_of_a_single_sample_says_nothing() -> None:
    case = cases.make((1, 3, 32, 32), [ROWS.index("plain")], net_dtype=torch.bfloat16)
    assert case.network is not None
    stepped = [
        step("emulated", replace(case, x=x, network=network))["x"]
        for x, network in (
            (case.x, case.network),
            (case.x.as_strided(case.x.shape, (7, 1024, 32, 1)),
             case.network.as_strided(case.x.shape, (0, 1024, 32, 1))),
        )
    ]  # fmt: skip
    assert stepped[0] is not None and stepped[1] is not None
    assert differences(*stepped) == 0


HUGE = 2**32 + 4 * 1024


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


def test_noise_beyond_two_to_the_32_elements() -> None:
    keys = noise.keys(3, 1)
    words = late_words(keys, HUGE - 1024, 1024, 4, 1)
    out = reserved(HUGE, torch.int32)[None]
    with emulated.emulator().last_blocks(2):
        call("emulated", "words_", out, keys, 4, 1)
        assert torch.equal(out[:, -1024:], _philox.words_int32(words))
        normal = reserved(HUGE, torch.float32)[None]
        call("emulated", "normal_", normal, keys, 4, 1)
    torch.testing.assert_close(
        normal[:, -1024:].double(), _philox.to_normal(words), rtol=0, atol=cases.NOISE_BOUND
    )


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_more_than_two_to_the_32_elements(net_dtype: torch.dtype) -> None:
    case = cases.make((1, 4), [ROWS.index("plain")])
    x, network = reserved(HUGE, torch.float32)[None], reserved(HUGE, net_dtype)[None]
    tail = slice(HUGE - 1024, HUGE)
    before = torch.randn(1, 1024, dtype=torch.float64).float()
    x[:, tail], network[:, tail] = before, torch.randn(1, 1024).to(net_dtype)
    with emulated.emulator().last_blocks(2):
        call(
            "emulated", "affine_step_", x, network, None, None, None, case.keys, case.row,
            *without_registers(case), None, None, None, None, None,
        )  # fmt: skip
    _, stream, draw, _ = case.field[1].tolist()
    z = _philox.to_normal(late_words(case.keys, HUGE - 1024, 1024, draw, stream))
    a, b, _, d = case.value[1, :4].tolist()
    expected = a * before.double() + b * network[:, tail].double() + d * z
    torch.testing.assert_close(x[:, tail].double(), expected, rtol=1e-6, atol=2e-6)


def test_a_batch_of_more_than_two_to_the_32_elements() -> None:
    for numel in (8, 256):
        batch, last = 2**31 // numel + 40, 40
        end = cases.make((last, numel), [ROWS.index("plain")] * last)
        x = reserved(batch * numel, torch.float32).view(batch, numel)
        network, keys = torch.zeros_like(x[:1]).expand(batch, numel), reserved(batch, torch.int64)
        x[-last:], keys[-last:] = end.x, end.keys
        bad = reserved(batch, torch.int32)
        expected = step("cpu", replace(end, network=network[-last:]))
        with emulated.emulator().last_blocks(4):
            call(
                "emulated", "affine_step_", x, network, None, None, None, keys,
                end.row[:1].expand(batch), *without_registers(end), None, None, None, None, bad,
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
        agree("emulated", replace(case, network=network.copy_(case.network)))
        x = reserved(reach, torch.float32).as_strided(case.x.shape, strides).copy_(case.x)
        expected = step("cpu", case)["x"]
        call(
            "emulated", "affine_step_", x, case.network, None, None, case.registers, case.keys,
            case.row, case.coef, case.field, None, None, None, None, None,
        )  # fmt: skip
        assert expected is not None and differences(x, expected) == 0


@pytest.mark.slow
def test_no_access_outside_any_tensor() -> None:
    """AddressSanitizer around torch's own allocations, reads included."""
    library = emulated.build(extra=emulated.ADDRESS)
    runtime = subprocess.run(
        [str(emulated.compiler()), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    chosen = "mixed_rows or layouts or misaligned or random_rows or noise or (norm_rows and shape3)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen,
         str(Path(__file__).with_name("test_conformance.py"))],
        env={**os.environ, "SBM_FAST_EMULATED_LIBRARY": str(library), "LD_PRELOAD": runtime,
             "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True, text=True,
    )  # fmt: skip
    found = run.stderr.find("ERROR: AddressSanitizer")
    assert found < 0, run.stderr[found : found + 3000]
    assert run.returncode == 0, run.stdout[-3000:]
