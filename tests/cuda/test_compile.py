"""csrc/*.cu under nvcc, and the library that was made of it, without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkout, cuda_static
from sbm_fast import _load

SOURCES = sorted(cuda_static.CSRC.glob("*.cu"))
ALL = [*SOURCES, *sorted(cuda_static.CSRC.glob("*.cuh"))]
needs_nvcc = pytest.mark.skipif(
    cuda_static.tool("nvcc") is None, reason="nvcc is not in CUDA_HOME, /usr/local/cuda or PATH"
)

# Registers a thread may take, by kernel: blocks of 256 threads, of which 65536 // (256·n) fit a
# multiprocessor. The first pattern that fits a kernel's name counts.
CAPS = {
    r"^step<float, DenseIo, false, false": 48,  # five blocks
    r"^(step|step_with_norms)<float, DenseIo": 80,  # three
    r"^squares<float, DenseIo": 64,
    r"^(step|squares|step_with_norms)<float": 128,  # any layout: two
    r"^(step|squares|step_with_norms)<double": 168,
    r"^fill<": 64,
    r"^keys": 40,
}


@pytest.fixture(scope="module")
def compiled() -> list[cuda_static.Compiled]:
    return cuda_static.compile_all()


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills_and_registers_stay_under_their_caps(
    compiled: list[cuda_static.Compiled],
) -> None:
    assert {(c.source, c.arch) for c in compiled} == {
        (s.name, arch) for s in SOURCES for arch in ("sm_80", "sm_90")
    }
    unused, wrong = set(CAPS), []
    for c in compiled:
        resources = cuda_static.parse_ptxas(c.log)
        names = cuda_static.readable(resources)
        assert resources, c.log
        for mangled, r in resources.items():
            name = names[mangled]
            cap = next((p for p in CAPS if re.search(p, name)), None)
            assert cap is not None, f"{name} has no cap"
            if r.stack or r.spill_stores or r.spill_loads or not 0 < r.registers <= CAPS[cap]:
                wrong.append((name, c.arch, r))
            unused.discard(cap)
    assert not wrong
    assert not unused


def without_comments(path: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.skipif(not SOURCES, reason="no CUDA sources")
def test_kernels_see_no_torch_and_launch_in_one_place() -> None:
    for path in ALL:
        text = without_comments(path)
        assert not re.search(r"torch|ATen|c10", text), path.name
        if path.name != "launch.cuh":
            assert "<<<" not in text and "extern __shared__" not in text, path.name
        assert not re.search(r"__(fsqrt_r[zud]|fdividef|sinf|cosf|logf|expf|powf)\b", text), (
            f"{path.name}: fast functions would give other values than the CPU"
        )


def test_products_and_sums_are_not_contracted() -> None:
    flags = checkout.setup_module().NVCC_FLAGS
    if SOURCES:
        assert "--fmad=false" in flags or "-fmad=false" in flags
    assert "--Werror=all-warnings" in flags
    assert not any("fast" in f or "ftz=true" in f or "prec-" in f for f in flags)


needs_cuda_build = pytest.mark.skipif(
    not (_load.load() and _load.host is not None and _load.host.build_info().get("cuda")),
    reason="this build has no CUDA kernels",
)
LOAD = """
import torch, sbm_fast
from sbm_fast import _load
assert _load.load(), _load.REASON
missing = [n for n in ("affine_step_", "langevin_epsilon_", "normal_", "uniform_", "rademacher_",
                       "words_", "keys_")
           if not torch._C._dispatch_has_kernel_for_dispatch_key("sbm_fast::" + n, "CUDA")]
print("missing", missing)
"""


@needs_cuda_build
def test_the_library_loads_without_a_gpu_and_registers_its_kernels() -> None:
    run = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "missing []"


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_library_holds_code_for_both_architectures() -> None:
    program = cuda_static.tool("cuobjdump")
    if program is None:
        pytest.skip("no cuobjdump")
    listed = cuda_static.output_of(program, "--list-elf", str(_load.library()))
    ptx = cuda_static.output_of(program, "--list-ptx", str(_load.library()))
    for arch in cuda_static.ARCHS:
        assert arch in listed
    assert "sm_90" in ptx
