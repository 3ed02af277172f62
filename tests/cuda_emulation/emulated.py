"""csrc/*.cu on a CPU: compiled unchanged by the C++ compiler, with its <cuda_runtime.h> from here.

`ops()` gives torch.ops.sbm_fast_emulated, which are the CUDA bindings on CPU tensors: the same
kernels, arithmetic, launches and barriers, one thread at a time. What this cannot show: memory
ordering between blocks, speed, registers, and what nvcc makes of the code.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulated"
NAMESPACE = "sbm_fast_emulated"

# The arithmetic flags are setup.py's. The sanitizers call emulator.cpp, not a run-time library:
# a misaligned vector access, an index outside an array or an overflowing int ends the launch.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -fno-math-errno -fno-strict-aliasing "
    "-Wno-unknown-pragmas -Wno-attributes -DSBM_CUDA_EMULATED "
    "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero"
).split()
ADDRESS = ["-fsanitize=address"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def missing() -> str:
    """Why the kernels cannot be emulated here, or ""."""
    if sys.platform != "linux" or compiler() is None:
        return "needs Linux and g++"
    return "" if any(CSRC.glob("*.cu")) else "csrc holds no CUDA kernels"


def _flags(extra: Sequence[str]) -> list[str]:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fused = ["-mfma"] if " fma " in cpu else []  # fmaf as an instruction, not a call
    return [*FLAGS, *fused, *extra]


def _tree(csrc: Path) -> dict[str, bytes]:
    """The sources as they are compiled: launch.cuh is the emulator's."""
    names = [p for p in sorted(csrc.iterdir()) if p.suffix in (".h", ".cuh", ".cu")]
    names += [p for p in (csrc / "bindings_cuda.cpp",) if p.exists()]
    tree = {p.name: p.read_bytes() for p in names}
    shim = [*sorted((HERE / "include").iterdir()), HERE / "emulator.cpp"]
    return tree | {p.name: p.read_bytes() for p in shim}


def build(csrc: Path = CSRC, extra: Sequence[str] = (), cache: Path = CACHE) -> Path:
    """The shared library of the sources in `csrc`; built once for every state of them."""
    tree, flags = _tree(csrc), _flags(extra)
    digest = hashlib.sha256(f"{flags} {torch.__version__} {compiler()}".encode())
    for name, content in tree.items():
        digest.update(f"{name}:{len(content)}:".encode() + content)
    folder = cache / digest.hexdigest()[:16]
    library = folder / "emulated.so"
    if library.exists():
        return library
    part = folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, content in tree.items():
        (part / name).write_bytes(content)
    _compile(part, [n for n in tree if n.endswith((".cu", ".cpp"))], flags)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    for old in sorted(cache.iterdir(), key=lambda p: p.stat().st_mtime)[:-6]:
        shutil.rmtree(old, ignore_errors=True)
    return library


def _compile(folder: Path, sources: list[str], flags: list[str]) -> None:
    torch_home = Path(torch.__file__).parent
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = [str(compiler()), *flags, target, "-I.", "-isystem", str(torch_home / "include")]
    jobs = [
        (name, subprocess.Popen(
            [*command, "-x", "c++", "-c", name, "-o", f"{name}.o"],
            cwd=folder, stderr=subprocess.PIPE, text=True,
        ))
        for name in sources
    ]  # fmt: skip
    for name, job in jobs:
        log = job.communicate()[1]
        if job.returncode:
            raise RuntimeError(f"{name} does not compile for the emulator:\n{log[-6000:]}")
    address = [f for f in flags if f in ADDRESS]
    link = [str(compiler()), "-shared", "-o", "emulated.so", *(f"{name}.o" for name in sources)]
    link += [*address, f"-L{torch_home / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, cwd=folder, check=True)


class Emulator:
    """The scheduler inside a built library."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.emulator_order.argtypes = [ctypes.c_int64]
        self.lib.emulator_last_blocks.argtypes = [ctypes.c_int64]
        self.lib.emulator_launches.restype = ctypes.c_int64

    @contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Blocks and threads forward (0), backward (1) or shuffled (others)."""
        self.lib.emulator_order(seed)
        try:
            yield
        finally:
            self.lib.emulator_order(0)

    @contextmanager
    def last_blocks(self, count: int) -> Iterator[None]:
        """Only the last blocks of every grid run."""
        self.lib.emulator_last_blocks(count)
        try:
            yield
        finally:
            self.lib.emulator_last_blocks(0)

    def launches(self) -> int:
        return int(self.lib.emulator_launches())


@functools.cache
def _built() -> Path | RuntimeError:
    """Kept when it fails too: every test would try again."""
    try:
        return Path(os.environ.get("SBM_FAST_EMULATED_LIBRARY") or build())
    except RuntimeError as error:
        return error


@functools.cache
def emulator() -> Emulator:
    """Builds and loads; loading registers the ops."""
    library = _built()
    if isinstance(library, RuntimeError):
        raise library
    return Emulator(library)


def _op(name: str) -> torch._ops.OpOverload:
    emulator()
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def __getattr__(name: str) -> torch._ops.OpOverload:
    """affine_step_, langevin_epsilon_, normal_, uniform_, rademacher_, words_ and keys_."""
    if name.endswith("_") and not name.startswith("_"):
        return _op(name)
    raise AttributeError(name)
