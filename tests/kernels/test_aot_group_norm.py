"""The kernels of group normalisation compiled for sm_80 and sm_90 without a GPU: what a DDPM++
forward and backward take of a multiprocessor, and the bytes that they move."""

import json
from pathlib import Path
from typing import Any

import noise_cases
import pytest

from sbm_fast.ops._library import triton_missing

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())

SCRIPT = Path(__file__).with_name("aot_group_norm.py")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may take, CUDA C programming guide
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
QUICK = {
    90: ("fast 128x32", "fast 384x32", "fast 256x16", "fast 256x8", "fast rest", "fast NCHW",
         "chunks 1", "chunks 2", "vjp 128x32", "jvp 128x32"),
    80: ("fast 128x32", "vjp 128x32"),
}  # fmt: skip
Found = dict[str, dict[str, Any]]


def compiled(arch: int, names: tuple[str, ...] = ()) -> Found:
    code = f"import runpy, sys; sys.argv = {['aot_group_norm.py', str(arch), *names]!r}; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    found: Found = json.loads(noise_cases.run_python(code, TRITON_INTERPRET="0"))
    return found


def hold_to_the_machine(found: Found, arch: int, spilled: dict[str, int]) -> None:
    """`spilled`: bytes of a thread's stack that a kernel may take, of some 300 that it holds."""
    for name, kernel in found.items():
        assert kernel["STACK"] <= spilled.get(name, 0), (name, kernel)
        assert kernel["LOCAL"] == 0 and kernel["REG"] <= 128, (name, kernel)
        assert kernel["shared"] <= SHARED[arch], (name, kernel)


@pytest.fixture(scope="module")
def found() -> Found:
    return compiled(90, QUICK[90])


def test_two_tensors_do_not_spill_and_four_hardly(found: Found) -> None:
    hold_to_the_machine(found, 90, {"fast rest": 32})


def test_sm_80() -> None:
    hold_to_the_machine(compiled(80, QUICK[80]), 80, {"fast 128x32": 32})


def test_one_reading_and_one_writing_of_sixteen_bytes_at_once(found: Found) -> None:
    """Each thread reads 64 numbers of 2 bytes in 8 loads, and writes them in 8 stores; with 12
    channels a group, 8 bytes are what is aligned."""
    for name in ("fast 128x32", "fast 256x16", "fast 256x8", "fast NCHW"):
        kernel = found[name]
        assert kernel["lanes"] == 64 * 32 * kernel["warps"] and kernel["bytes"] == 4
        # Rows of scales and the like are read besides.
        assert kernel["wide_loads"] >= kernel["wide_stores"] == 8, (name, kernel)
    rest = found["fast rest"]
    assert rest["wide_loads"] >= rest["wide_stores"] == 16 and rest["bytes"] == 8
    assert found["fast 384x32"]["half_loads"] == 64 * 2 // 8
    product = found["vjp 128x32"]  # two tensors, again from the first cache
    assert product["wide_loads"] >= 2 * 2 * 32 // 8 and product["bytes"] == 6


def test_instructions_leave_time_for_the_memory(found: Found) -> None:
    """An H200 issues 132·128 a clock of 1.755 GHz or more, and copies 4.3 TB/s: that is 27 while 4
    bytes move. 12 channels a group waste a quarter of the lanes, and there it will not do."""
    most = 132 * 128 * 1.755e9 / (4.3e12 / 4)
    for name in ("fast 128x32", "fast 256x16", "fast 256x8", "fast NCHW"):
        kernel = found[name]
        taken = kernel["instructions"] * 32 * kernel["warps"] / kernel["lanes"]
        assert taken <= most, (name, taken)


def test_enough_reads_are_under_way(found: Found) -> None:
    """By Little's law 4.3 TB/s over 132 multiprocessors and 700 ns ask for 23 KB on each."""
    for name in ("fast 128x32", "fast 256x16", "fast 256x8", "fast NCHW", "fast 384x32"):
        kernel = found[name]
        threads = 32 * kernel["warps"]
        programs = min(REGISTERS // (threads * kernel["REG"]), THREADS // threads, 32)
        live = 24 / 32 if name == "fast 384x32" else 1  # lanes that have a channel
        assert programs * kernel["lanes"] * live * 2 >= 23_000, (name, programs)


LAUNCHES = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from sbm_fast import kernels
from sbm_fast.kernels import _launch, group_norm_silu, group_norm_silu_product

class Driver:  # as much of one as compiling needs
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
_launch.launch = lambda kernel, programs, on, *arguments, **options: kernel.warmup(
    *arguments, grid=(programs,), **_launch.ARITHMETIC, **options
)
counts = []
def both(batch, gain=1.0, eps=1e-5, skip=0, side=8):
    x = torch.zeros(batch, 32, side, side).contiguous(memory_format=torch.channels_last)
    weight, stats = torch.zeros(32), torch.zeros(batch, 8, 2)
    film = torch.zeros(batch, 64 + skip)[:, skip:]
    scale, shift = film.chunk(2, dim=1)
    kernels.group_norm_silu_(torch.empty_like(x), None, stats, x, weight, weight, scale, shift,
                             None, None, 8, eps, gain, True)
    kernels.group_norm_silu_product_(torch.empty_like(x), None, x, x, stats, weight, weight, scale,
                                     shift, None, None, 8, gain, True, False)
    counts.append([sum(len(caches[0]) for caches in kernel.device_caches.values())
                   for kernel in (group_norm_silu.hold, group_norm_silu_product.hold_product)])
both(300)
both(512)
both(300, gain=0.5, eps=1.0)
both(1)
both(1, skip=1)
print(json.dumps(counts))
"""


def test_launches_share_their_kernels() -> None:
    """Batches and gains do not compile anew; a batch so small that its programs take fewer groups,
    and rows that are not aligned, do."""
    counts = json.loads(noise_cases.run_python(LAUNCHES, TRITON_INTERPRET="0"))
    assert counts == [[1, 1]] * 3 + [[2, 2], [3, 3]]
