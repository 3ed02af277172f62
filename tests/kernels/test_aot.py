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
    "step channels_last", "squares fp32", "epsilon on chip fp32",
)  # fmt: skip

# Registers a thread: what lets so many warps stand on an SM's 65536 that the memory stays busy.
AT_MOST = {"fast fill": 40, "fast step": 64, "fast step bf16": 64, "step channels_last": 64}
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
    assert half["wide_loads"] == 3 and half["wide_stores"] == 2  # F: eight halves in one


def test_four_normals_of_a_call_meet_in_their_thread(
    found: tuple[int, dict[str, dict[str, Any]]],
) -> None:
    """No element of noise or state crosses threads: no conversion of layouts."""
    _, variants = found
    for name in ("fast fill", "fast step"):
        assert variants[name]["converts"] == 0
