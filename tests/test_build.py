"""setup.py and the in-tree backend, on a small stand-in for csrc."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import sbm_fast

ROOT = Path(__file__).resolve().parents[1]

MODULE = """
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include "build_facts.h"
#include "part.h"
static struct PyModuleDef d = {{PyModuleDef_HEAD_INIT, "{0}", "sbm_fast-source-hash:"
    SBM_SOURCE_HASH, PART, nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMODINIT_FUNC PyInit_{0}(void) {{ return PyModule_Create(&d); }}
"""
# Understands what setup.py asks of nvcc, and hands it to the C++ compiler.
NVCC = """#!/bin/bash
arguments=()
for a in "$@"; do
  case "$a" in
    --Werror=*|--fmad=*|-gencode=*|-cudart=*) ;;
    -Xcompiler=*|-Xlinker=*) ;;
    *.cu) arguments+=(-x c++ "$a") ;;
    *) arguments+=("$a") ;;
  esac
done
echo "nvcc $*" >> "$(dirname "$0")/log"
exec g++ -fPIC "${arguments[@]}"
"""


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_tested_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build() -> ModuleType:
    return imported(ROOT / "setup.py")


@pytest.fixture
def backend() -> ModuleType:
    return imported(ROOT / "_backend" / "sbm_backend.py")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with tiny sources, at a path that needs quoting."""
    folder = tmp_path / "a $b c"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("_backend", "sbm_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    csrc = folder / "csrc"
    csrc.mkdir()
    # torch 2.11's pybind11, which host.cpp includes, refuses to stand beside the target.
    for name, module, wrong in (("host", "_host", "ifdef"), ("module", "_C", "ifndef")):
        guard = f"#{wrong} TORCH_TARGET_VERSION\n#error\n#endif\n"
        (csrc / f"{name}.cpp").write_text(guard + MODULE.format(module))
    (csrc / "part.h").write_text("#define PART -1\n")
    (csrc / "wide_avx2.cpp").write_text("#ifndef __AVX2__\n#error\n#endif\n")
    (csrc / "wide_avx512.cpp").write_text("#ifndef __AVX512BW__\n#error\n#endif\n")
    (csrc / "plain.cpp").write_text("#ifdef __AVX2__\n#error\n#endif\n")
    return folder


def wheel(project: Path, **environment: str) -> tuple[list[str], str]:
    """Builds a wheel as pip does, in isolation and without an index: its files, and the log."""
    out = project.parent / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-index",
        "--no-deps",
        "-w",
        str(out),
    ]
    run = subprocess.run(
        [*command, "."],
        cwd=project,
        env={**os.environ, "SBM_FAST_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        return [], run.stdout
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist(), run.stdout


def compiled_files(log: str) -> set[str]:
    words = (line.split() for line in log.splitlines())
    return {w[2] for w in words if len(w) == 3 and w[0].startswith("[") and w[1] != "link"}


def test_a_wheel_holds_the_package_and_no_sources(project: Path) -> None:
    files, log = wheel(project)
    assert "sbm_fast/_C.abi3.so" in files, log
    assert any(name.startswith("sbm_fast/_host.cpython-") for name in files)
    assert {"sbm_fast/py.typed", "sbm_fast/kernels/__init__.py", "sbm_fast/_load.py"} <= set(files)
    weights = {f"sbm_fast/weights/{p.name}" for p in (ROOT / "sbm_fast/weights").glob("*.safet*")}
    assert weights <= set(files)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "sbm_fast").rglob("*.py")}
    assert modules <= set(files)
    assert not [name for name in files if name.endswith((".cpp", ".h"))]
    folders = {name.split("/")[0] for name in files}
    assert folders == {"sbm_fast", f"sbm_fast-{sbm_fast.__version__}.dist-info"}


def test_a_rebuild_compiles_what_changed(project: Path) -> None:
    _, log = wheel(project)
    sources = {"module.cpp.o", "plain.cpp.o", "wide_avx2.cpp.o", "wide_avx512.cpp.o", "host.o"}
    assert compiled_files(log) == sources, log
    # The facts hold the sources' hash, so the two files that include them follow every change.
    (project / "csrc" / "plain.cpp").write_text("// changed\n")
    _, log = wheel(project)
    assert compiled_files(log) == {"plain.cpp.o", "module.cpp.o", "host.o"}, log
    (project / "csrc" / "plain.cpp").touch()
    _, log = wheel(project)
    assert compiled_files(log) == {"plain.cpp.o"}, log


def test_a_renamed_module_is_not_installed_twice(project: Path) -> None:
    (project / "sbm_fast" / "old.py").touch()
    files, log = wheel(project)
    assert "sbm_fast/old.py" in files, log
    (project / "sbm_fast" / "old.py").rename(project / "sbm_fast" / "new.py")
    files, _ = wheel(project)
    assert "sbm_fast/new.py" in files and "sbm_fast/old.py" not in files


def test_the_compilers_message_reaches_the_user(project: Path) -> None:
    (project / "csrc" / "plain.cpp").write_text("#error told you so\n")
    files, log = wheel(project)
    assert not files
    assert "told you so" in log
    assert "sbm_fast: the compiler failed" in log


def test_cuda_sources_go_to_nvcc(project: Path) -> None:
    home = project.parent / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(NVCC)
    (home / "bin" / "nvcc").chmod(0o755)
    (project / "csrc" / "op.cu").write_text('#include "part.h"\n')
    (project / "csrc" / "op_cuda.cpp").write_text('#include "part.h"\n')

    _, log = wheel(project, CUDA_HOME=str(home))
    assert "op.cu.o" not in compiled_files(log) and "op_cuda.cpp.o" not in compiled_files(log)

    files, log = wheel(
        project, CUDA_HOME=str(home), SBM_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a+PTX"
    )
    assert "sbm_fast/_C.abi3.so" in files, log
    assert {"op.cu.o", "op_cuda.cpp.o"} <= compiled_files(log)
    calls = (home / "bin" / "log").read_text()
    assert calls.count(" -gencode=arch=compute_90a,code=[sm_90a,compute_90a] ") == 2
    assert calls.count("-shared") == 1


def test_nvcc_is_missing(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "op.cu").touch()
    monkeypatch.setattr(build, "CSRC", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("SBM_FAST_CUDA", raising=False)
    assert build.find_nvcc() is None
    monkeypatch.setenv("SBM_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is not in CUDA_HOME, /usr/local/cuda or PATH"):
        build.find_nvcc()
    monkeypatch.setenv("SBM_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="SBM_FAST_CUDA: expected 0 or 1, got 'yes'"):
        build.find_nvcc()


def test_architectures(build: ModuleType) -> None:
    assert build.gencode_flags("8.0 9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert build.gencode_flags("10.0a;12.0") == [
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    with pytest.raises(SystemExit, match="got 'Hopper'"):
        build.gencode_flags("Hopper")


def test_other_processors_get_the_portable_files(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    monkeypatch.setattr(build, "CSRC", project / "csrc")
    monkeypatch.setattr(build, "HOST", project / "csrc" / "host.cpp")
    monkeypatch.setattr(build, "X86", False)
    assert [p.name for p in build.library_sources(cuda=False)] == ["module.cpp", "plain.cpp"]


def test_no_flag_trades_accuracy_for_speed(build: ModuleType) -> None:
    assert "-ffp-contract=off" in build.CXX_FLAGS
    lists = [build.CXX_FLAGS, build.NVCC_FLAGS, *build.SIMD_FLAGS.values()]
    flags = " ".join(flag for flags in lists for flag in flags)
    for unsafe in ("fast-math", "fast_math", "Ofast", "unsafe", "associative", "finite-math"):
        assert unsafe not in flags


def test_nothing_is_asked_for_where_all_is_installed(backend: ModuleType) -> None:
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []
    assert backend.get_requires_for_build_sdist() == []


def test_what_is_missing_is_asked_for_as_tested(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "_usable", lambda name: False)
    monkeypatch.setattr(backend, "_target_sites", lambda: [Path("/nowhere")])
    wanted = backend.get_requires_for_build_wheel()
    assert [line.split("==")[0] for line in wanted] == ["setuptools", "torch", "ninja"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(wanted) <= set(pins)
    message = capfd.readouterr().err
    assert "no torch >= 2.10 found in /nowhere" in message
    assert "SBM_FAST_SITE" in message


def test_an_old_torch_is_not_built_against(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "2.9.1+cu126")
    assert not backend._usable("torch")
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "2.10.0")
    assert backend._usable("torch")


def test_the_named_site_is_searched_first(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SBM_FAST_SITE", str(tmp_path))
    assert backend._target_sites()[0] == tmp_path


def test_warnings_of_nvcc_are_errors_unless_asked(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBM_FAST_WERROR", raising=False)
    assert build.nvcc_flags() == build.NVCC_FLAGS
    monkeypatch.setenv("SBM_FAST_WERROR", "0")
    assert set(build.NVCC_FLAGS) - set(build.nvcc_flags()) == {"--Werror=all-warnings"}
    monkeypatch.setenv("SBM_FAST_WERROR", "no")
    with pytest.raises(SystemExit, match="SBM_FAST_WERROR: expected 0 or 1, got 'no'"):
        build.nvcc_flags()


def test_bindings_compile_with_the_oldest_headers_tried() -> None:
    """torch 2.11's array reference has no operator==, only equals(); built by hand against it."""
    for path in (ROOT / "csrc").glob("bindings_*"):
        assert not re.search(r"sizes\(\)(\.slice\(\d\))? *[!=]=", path.read_text()), path.name
