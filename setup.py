"""Compiles csrc/ into sbm_fast._C (the torch ops) and sbm_fast._host. The rest: pyproject.toml.

Environment: SBM_FAST_CUDA=0|1 (default: whether nvcc is found; no GPU is needed to compile),
TORCH_CUDA_ARCH_LIST (default "8.0 9.0+PTX"), SBM_FAST_WERROR=0 (nvcc's warnings, and those of the
compiler behind it, are no errors), MAX_JOBS, CXX, CUDA_HOME.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
HOST = CSRC / "host.cpp"
X86 = platform.machine() in ("x86_64", "AMD64")
TORCH_TARGET = (2, 10)

# -ffp-contract=off: a fused multiply-add is written out where it is meant, so that every path gives
# the same bits. -fno-math-errno changes no value; it lets sqrt be one instruction.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -g0 -fvisibility=hidden -fvisibility-inlines-hidden "
    "-ffp-contract=off -fno-math-errno -Wall -Wextra"
).split()
NVCC_FLAGS = (
    "-std=c++17 -O3 --fmad=false --Werror=all-warnings "
    "-Xcompiler=-fPIC,-g0,-fvisibility=hidden,-ffp-contract=off,-Wall"
).split()
SIMD_FLAGS = {
    "avx2": "-mavx2 -mfma".split(),
    "avx512": (
        "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mprefer-vector-width=512"
    ).split(),
}


def simd_level(source: Path) -> str:
    """`avx2` for row_avx2.cpp; empty for a file that every CPU can run."""
    return next((level for level in SIMD_FLAGS if source.stem.endswith(f"_{level}")), "")


def is_cuda(source: Path) -> bool:
    return source.suffix == ".cu" or source.stem.endswith("_cuda")


def library_sources(cuda: bool) -> list[Path]:
    """What _C is made of on this machine."""
    found = sorted(p for p in CSRC.iterdir() if p.suffix in (".cpp", ".cu") and p != HOST)
    return [p for p in found if (cuda or not is_cuda(p)) and (X86 or not simd_level(p))]


def source_hash() -> str:
    """By the loader's own function, since the loader compares the result."""
    spec = importlib.util.spec_from_file_location("_load", ROOT / "sbm_fast" / "_load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: str = module.source_hash(CSRC)
    return result


def find_nvcc() -> str | None:
    """nvcc's path; None without CUDA sources, without nvcc, or with SBM_FAST_CUDA=0."""
    choice = os.environ.get("SBM_FAST_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"SBM_FAST_CUDA: expected 0 or 1, got {choice!r}")
    if choice == "0" or not any(CSRC.glob("*.cu")):
        return None
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    names = [str(Path(home, "bin", "nvcc")) for home in homes if home] + ["nvcc"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and choice == "1":
        sys.exit("SBM_FAST_CUDA=1, but nvcc is not in CUDA_HOME, /usr/local/cuda or PATH")
    return found


def nvcc_flags() -> list[str]:
    choice = os.environ.get("SBM_FAST_WERROR", "1")
    if choice not in ("0", "1"):
        sys.exit(f"SBM_FAST_WERROR: expected 0 or 1, got {choice!r}")
    return [flag for flag in NVCC_FLAGS if choice == "1" or not flag.startswith("--Werror")]


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, e.g. "8.0 9.0a+PTX"."""
    flags = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def find_compiler() -> list[str]:
    candidates = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    for command in candidates:
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    sys.exit("sbm_fast: no C++ compiler found (CXX, c++, g++, clang++). Debian: apt install g++")


def find_ninja() -> str:
    try:
        import ninja
    except ModuleNotFoundError:
        found = shutil.which("ninja")
        return found or sys.exit("sbm_fast: ninja not found. Run: python -m pip install ninja")
    return str(Path(ninja.BIN_DIR, "ninja"))


@dataclass(frozen=True)
class Torch:
    """The installed torch, read from its files: importing it would take seconds."""

    home: Path
    version: str
    cuda: bool

    @classmethod
    def find(cls) -> "Torch":
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("sbm_fast: torch not found. Install torch >= 2.10 first")
        home = Path(spec.submodule_search_locations[0])
        facts: dict[str, object] = {}
        exec((home / "version.py").read_text(), facts)
        return cls(home, str(facts["__version__"]), facts.get("cuda") is not None)


class NinjaFile:
    """The text of a build.ninja, with the quoting that ninja and the shell want."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: list[str], depfile: bool = False) -> None:
        # $in, $out and $flags arrive quoted.
        words = [w if w.startswith("$") else shlex.quote(w).replace("$", "$$") for w in command]
        if depfile:
            words += ["-MMD", "-MF", "$out.d"]
        self.lines += [
            f"rule {name}",
            f"  command = {' '.join(words)}",
            f"  description = {name} $out",
        ]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: str, rule: str, inputs: list[str], flags: Sequence[str] = ()) -> None:
        paths = [re.sub(r"([$ :])", r"$\1", path) for path in (output, *inputs)]
        self.lines.append(f"build {paths[0]}: {rule} {' '.join(paths[1:])}")
        self.lines.append(f"  flags = {shlex.join(flags).replace('$', '$$')}")

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n")


class BuildExt(build_ext):
    """Both libraries by one run of ninja, in a folder that is kept: a rebuild compiles only what
    changed, headers included."""

    def build_extensions(self) -> None:
        self.torch, self.nvcc = Torch.find(), find_nvcc()
        python = sysconfig.get_config_var("SOABI")
        folder = ROOT / "build" / f"ninja-{python}-torch{self.torch.version}"
        folder.mkdir(parents=True, exist_ok=True)
        self.write_facts(folder / "build_facts.h")
        self.write_ninja(folder)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(folder), *jobs]).returncode:
            sys.exit("sbm_fast: the compiler failed; its messages stand above")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / extension.name), str(target))

    def write_facts(self, header: Path) -> None:
        """The header that module.cpp and host.cpp include; only they are compiled again by it."""
        levels = sorted({simd_level(p) for p in library_sources(cuda=False)} - {""})
        facts = {
            "SBM_SOURCE_HASH": source_hash(),
            "SBM_FLAGS": " ".join(CXX_FLAGS),
            "SBM_TORCH_VERSION": self.torch.version,
            "SBM_TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
            "SBM_SIMD": " ".join(["portable", *levels]),
        }
        lines = ["#pragma once", f"#define SBM_CUDA {int(self.nvcc is not None)}"]
        lines += [f'#define {name} "{value}"' for name, value in facts.items()]
        text = "\n".join(lines) + "\n"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)

    def write_ninja(self, folder: Path) -> None:
        include = Path(sysconfig.get_paths()["include"])
        if not (include / "Python.h").is_file():
            sys.exit(f"sbm_fast: no Python.h in {include}. Debian: apt install python3-dev")
        target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
        stable = [f"-DTORCH_TARGET_VERSION={target:#018x}"]
        common = [f"-DSBM_X86={int(X86)}", f"-I{CSRC}"]
        # pybind11's headers come with torch's.
        common += ["-I.", "-isystem", str(self.torch.home / "include"), "-isystem", str(include)]
        cxx = find_compiler()

        file = NinjaFile()
        compile_file = ["$flags", "-c", "$in", "-o", "$out"]
        file.rule("cxx", [*cxx, *CXX_FLAGS, *stable, *common, *compile_file], depfile=True)
        # Without the target: torch 2.11's pybind11 refuses to stand beside it.
        file.rule("host", [*cxx, *CXX_FLAGS, *common, *compile_file], depfile=True)
        file.rule("link", [*cxx, "-shared", "-o", "$out", "$in", "$flags"])
        if self.nvcc:
            arch = gencode_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 9.0+PTX")
            flags = [*nvcc_flags(), *arch, *stable, *common]
            file.rule("nvcc", [self.nvcc, *flags, *compile_file], depfile=True)
            file.rule(
                "nvlink", [self.nvcc, "-shared", "-cudart=static", "-o", "$out", "$in", "$flags"]
            )

        file.build("host.o", "host", [str(HOST)])  # first: it takes longest
        objects = []
        for source in library_sources(cuda=self.nvcc is not None):
            rule = "nvcc" if is_cuda(source) else "cxx"
            objects.append(f"{source.name}.o")
            file.build(objects[-1], rule, [str(source)], SIMD_FLAGS.get(simd_level(source), []))

        # torch's entries stay even where nothing needs them: the weak stream symbol of the CUDA
        # bindings is resolved through them only.
        libraries = ["torch", "torch_cpu", *(["torch_cuda"] if self.torch.cuda else [])]
        keep = "-Xlinker=--no-as-needed" if self.nvcc else "-Wl,--no-as-needed"
        needed = [f"-L{self.torch.home / 'lib'}", keep, *(f"-l{name}" for name in libraries)]
        file.build("sbm_fast._C", "nvlink" if self.nvcc else "link", objects, needed)
        file.build("sbm_fast._host", "link", ["host.o"])
        file.write(folder / "build.ninja")


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            # A module that was renamed since the last build would be installed under both names.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def extensions() -> list[Extension]:
    if sys.platform != "linux":
        print(f"sbm_fast: nothing is compiled on {sys.platform}; everything runs on plain torch")
        return []
    sources = [str(p.relative_to(ROOT)) for p in library_sources(cuda=True)]
    return [
        Extension("sbm_fast._C", sources, py_limited_api=True),
        Extension("sbm_fast._host", [str(HOST.relative_to(ROOT))]),
    ]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["sbm_fast", "sbm_fast.*"]), "sbm_fast.kernels"],
        # Not installed as `kernels`: that import name belongs to another package.
        package_dir={"sbm_fast.kernels": "kernels"},
        package_data={"sbm_fast": ["py.typed", "weights/*.safetensors"]},
        include_package_data=False,
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    )
