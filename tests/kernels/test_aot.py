"""The kernels compiled for sm_80 and sm_90 without a GPU: registers, spills, width of accesses."""

import json
from pathlib import Path
from typing import Any

import noise_cases
import pytest

from sbm_fast.ops._library import triton_missing

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())

SCRIPT = Path(__file__).with_name("aot.py")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may take, CUDA C programming guide
ON_80 = (
    "fast fill", "fast step", "fast step bf16", "step fp16 epsilon", "step on chip fp32",
    "step channels_last", "squares fp32", "epsilon on chip fp32", "fast slope", "fast error",
    "fast slope on chip",
)  # fmt: skip

# Registers a thread: what lets so many warps stand on an SM's 65536 that the memory stays busy.
AT_MOST = {"fast fill": 40, "fast step": 64, "fast step bf16": 64, "step channels_last": 64}
AT_MOST |= {"fast slope": 40, "fast slope on chip": 40, "fast error": 64, "fast error on chip": 64}
EVER = 128


@pytest.fixture(scope="module", params=[80, 90])
def found(request: pytest.FixtureRequest) -> tuple[int, dict[str, dict[str, Any]]]:
    names = ON_80 if request.param == 80 else ()
    code = f"import runpy, sys; sys.argv = {['aot.py', str(request.param), *names]!r}; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    printed = noise_cases.run_python(code, TRITON_INTERPRET="0")
    return request.param, json.loads(printed)


def test_nothing_spills(found: tuple[int, dict[str, dict[str, Any]]]) -> None:
    arch, variants = found
    for name, kernel in variants.items():
        assert kernel["STACK"] == kernel["LOCAL"] == 0, name
        assert kernel["REG"] <= AT_MOST.get(name, EVER), (name, kernel["REG"])
        assert kernel["shared"] <= SHARED[arch], name


def test_the_fast_cases_move_sixteen_bytes_at_once(
    found: tuple[int, dict[str, dict[str, Any]]],
) -> None:
    _, variants = found
    assert variants["fast fill"]["wide_stores"] == 2  # 1024 floats by 128 threads
    assert variants["fast step"]["wide_loads"] == 4 and variants["fast step"]["wide_stores"] == 2
    half = variants["fast step bf16"]
    assert half["wide_loads"] == half["wide_stores"] == half["half_loads"] == 2
    slope = variants["fast slope"]  # x, F and the product; the drift
    assert slope["wide_loads"] == 6 and slope["wide_stores"] == 2
    assert variants["fast error"]["wide_loads"] == 2 * 9  # x, u0 and seven slopes


def test_four_normals_of_a_call_meet_in_their_thread(
    found: tuple[int, dict[str, dict[str, Any]]],
) -> None:
    """No element of noise or state crosses threads: no conversion of layouts."""
    _, variants = found
    for name in ("fast fill", "fast step", "fast step bf16"):
        assert variants[name]["converts"] == 0


def test_only_what_is_spelled_out_is_fused(found: tuple[int, dict[str, dict[str, Any]]]) -> None:
    """Box–Muller says `fma` 22 times for a pair: 2 in u, 11 in the log, 9 in the turn."""
    _, variants = found
    assert variants["fast fill"]["fused"] == 4 * 22  # eight elements a thread
    # Both parts of p and q, then r in the sample's result; seven weights and rtol.
    assert variants["fast slope"]["fused"] == 8 * 4
    assert variants["fast slope on chip"]["fused"] == 8 * 4 + 1
    assert variants["fast error"]["fused"] == 8 * 8


LAUNCHES = """
import json
from dataclasses import replace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import op_cases as cases
from sbm_fast import kernels
from sbm_fast.kernels import _launch, affine_step

class Driver:  # as much of one as compiling needs
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
_launch.launch = lambda kernel, programs, on, *arguments, **options: kernel.warmup(
    *arguments, grid=(programs,), **_launch.ARITHMETIC, **options
)
counts = []
def step(shape, row=None, **change):
    case = cases.make(shape)
    batch = shape[0]
    given = {name: getattr(case, name) for name in (
        "x", "network", "uncond", "guidance", "registers", "keys", "row", "coef", "field", "noise")}
    given |= {"epsilon": None, "net_input": torch.zeros(shape), "net_time": torch.zeros(batch),
              "first_bad": case.first_bad}
    kernels.affine_step_(**given | change)
    counts.append(sum(len(caches[0]) for caches in affine_step.step.device_caches.values()))
step((4, 3, 32, 32))
for shape in ((7, 3, 32, 32), (1, 3, 64, 64), (2, 4, 512, 256)):
    step(shape)
for row in torch.arange(5, dtype=torch.int32)[:, None].expand(5, 4):
    step((4, 3, 32, 32), row=row)
step((5, 4, 32, 32), keys=torch.zeros(6, dtype=torch.int64)[1:])
last = torch.channels_last
for shape in ((4, 3, 33, 35), (2, 3, 31, 37)):
    step(shape, network=torch.zeros(shape).contiguous(memory_format=last))
print(json.dumps(counts))
"""

FLOW_LAUNCHES = (
    LAUNCHES.split("counts = []")[0]
    + """
import flow_cases
from sbm_fast.kernels import error_norm, hutchinson

counts = []
def cached(kernel):
    return sum(len(caches[0]) for caches in kernel.device_caches.values())
def slope(shape, probes=1, **change):
    case = replace(flow_cases.flow(shape, probes), **change)
    of_error = flow_cases.error(shape, 8)
    sums = torch.zeros(probes, shape[0], dtype=torch.float64)
    kernels.hutchinson_(torch.zeros(shape), sums, case.x, case.network, case.product, case.keys,
                        case.coef, case.draw, 2, False)
    kernels.error_norm_(torch.zeros(shape[0]), of_error.x, of_error.registers, of_error.weights,
                        *change.get("tolerance", (1e-3, 1e-4)))
    counts.append((cached(hutchinson.slope), cached(error_norm.error)))
slope((4, 3, 32, 32))
for shape in ((7, 3, 32, 32), (1, 3, 32, 32), (2, 3, 36, 28)):
    slope(shape)
slope((4, 3, 32, 32), probes=8)
slope((4, 3, 32, 32), coef=torch.zeros(4, 6, dtype=torch.float64)[:, ::2])
slope((4, 3, 32, 32), draw=1)
print(json.dumps(counts))
"""
)


def test_launches_share_their_kernels() -> None:
    """Batches, image sizes and rows don't compile anew; another layout does, once."""
    counts = json.loads(noise_cases.run_python(LAUNCHES, TRITON_INTERPRET="0"))
    assert set(counts[:-2]) == {1}
    assert counts[-2:] == [2, 2]


def test_slopes_share_their_kernels() -> None:
    """Batches, probes, draws and strides of coefficients don't compile anew."""
    counts = json.loads(noise_cases.run_python(FLOW_LAUNCHES, TRITON_INTERPRET="0"))
    assert {tuple(c) for c in counts} == {(1, 1)}
