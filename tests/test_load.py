"""The loader finds the compiled part, or says why not; it never loads what does not fit."""

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from sbm_fast import _load

Fresh = Callable[[Path], ModuleType]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Fresh:
    """A loader in its initial state, for a package at the given place and nothing installed."""
    monkeypatch.delenv(_load.DISABLE, raising=False)
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: [])

    def make(package: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location("fresh_load", _load.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "PACKAGE", package)
        return module

    return make


@pytest.fixture
def libraries() -> list[Path]:
    """The two files of the compiled part that this test run uses."""
    library = _load.library()
    if library is None or _load.host is None:
        pytest.skip(f"needs the compiled part: {_load.REASON}")
    return [library, Path(str(_load.host.__file__))]


@pytest.fixture
def tree(tmp_path: Path, libraries: list[Path]) -> Path:
    """A source tree whose package folder holds the compiled part, built from its csrc."""
    assert _load.host is not None
    built = _load.host.build_info()["source_hash"]
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cpp").write_text("int x;\n")
    (tmp_path / "setup.py").touch()
    package = tmp_path / "sbm_fast"
    package.mkdir()
    for path in libraries:
        now = _load.source_hash(tmp_path / "csrc").encode()
        (package / path.name).write_bytes(path.read_bytes().replace(built.encode(), now))
    return tmp_path


def test_this_run_uses_the_compiled_part() -> None:
    if os.environ.get(_load.DISABLE, "") not in ("", "0"):
        pytest.skip(f"{_load.DISABLE} is set")
    assert _load.load(), _load.REASON
    assert _load.COMPILED
    assert _load.REASON == ""
    assert _load.host is not None


def test_hash_sees_contents_and_names_of_sources_only(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("1")
    (tmp_path / "b.cu").write_text("2")
    first = _load.source_hash(tmp_path)
    (tmp_path / "a.h~").write_text("an editor's copy")
    assert _load.source_hash(tmp_path) == first
    (tmp_path / "a.h").write_text("3")
    changed = _load.source_hash(tmp_path)
    (tmp_path / "a.h").rename(tmp_path / "c.h")
    assert len({first, changed, _load.source_hash(tmp_path)}) == 3


def test_disabled_by_the_environment(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = fresh(_load.PACKAGE)
    monkeypatch.setenv(_load.DISABLE, "1")
    assert not loader.load()
    assert loader.REASON == "SBM_FAST_DISABLE_COMPILED is set in the environment"
    assert loader.host is None and loader.library() is None


def test_nothing_built(fresh: Fresh, tmp_path: Path) -> None:
    loader = fresh(tmp_path)
    assert not loader.load()
    assert f"{tmp_path} holds no compiled _host" in loader.REASON
    assert "pip install" in loader.REASON


def test_other_sources(fresh: Fresh, tree: Path) -> None:
    (tree / "csrc" / "op.cpp").write_text("int y;\n")
    loader = fresh(tree / "sbm_fast")
    assert not loader.load()
    assert "was built from other sources" in loader.REASON
    assert str(tree / "csrc") in loader.REASON
    assert f"cd {tree} && {sys.executable} -m pip install -c constraints.txt -e ." in loader.REASON


def test_two_halves_of_different_builds(fresh: Fresh, tree: Path) -> None:
    library = next((tree / "sbm_fast").glob("_C.*"))
    now = _load.source_hash(tree / "csrc").encode()
    library.write_bytes(library.read_bytes().replace(now, b"0" * 64))
    loader = fresh(tree / "sbm_fast")
    assert not loader.load()
    assert "different builds" in loader.REASON


def test_built_for_another_python(fresh: Fresh, tree: Path) -> None:
    host = next((tree / "sbm_fast").glob("_host.*"))
    host.rename(host.with_name("_host.cpython-38-x86_64-linux-gnu.so"))
    loader = fresh(tree / "sbm_fast")
    assert not loader.load()
    assert "a build for another Python: ['_host.cpython-38-x86_64-linux-gnu.so']" in loader.REASON


def test_loaded_once_only(fresh: Fresh, tree: Path) -> None:
    """A copy at another path would define the ops again, and torch would end the process."""
    loader = fresh(tree / "sbm_fast")
    assert not loader.load()
    assert f"{_load.library()} is loaded in this process" in loader.REASON


def test_the_loaded_library_serves_a_second_import(fresh: Fresh, libraries: list[Path]) -> None:
    loader = fresh(libraries[0].parent)
    assert loader.load(), loader.REASON
    assert loader.host is _load.host


def test_ops_of_unknown_origin(fresh: Fresh, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sbm_fast._C")
    loader = fresh(tree / "sbm_fast")
    assert not loader.load()
    assert "sbm_fast's ops are registered in this process" in loader.REASON


def test_a_library_that_does_not_load(fresh: Fresh, tree: Path) -> None:
    mark = b"sbm_fast-source-hash:" + _load.source_hash(tree / "csrc").encode()
    for name in ("_C", "_host"):
        next((tree / "sbm_fast").glob(f"{name}.*")).write_bytes(mark)
    script = f"""
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("load", {_load.__file__!r})
load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load)
load.PACKAGE = Path({str(tree / "sbm_fast")!r})
load.importlib.metadata.distributions = lambda **_: []
print(load.load(), load.REASON)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("False ")
    assert "cannot be loaded by torch" in run.stdout
    assert "file too short" in run.stdout or "invalid ELF header" in run.stdout


def test_a_source_tree_uses_the_installed_library(tmp_path: Path, libraries: list[Path]) -> None:
    """Python started in a checkout imports ./sbm_fast, which hides the installed package."""
    source = _load.PACKAGE.parent
    csrc = Path(__file__).parents[1] / "csrc"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(source / "sbm_fast", tmp_path / "sbm_fast", ignore=ignore)
    shutil.copytree(csrc, tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    script = (
        "import sbm_fast.ops; from sbm_fast import _load;"
        "print(_load.PACKAGE, _load.library(), _load.REASON, sep='|')"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    package, library, reason = run.stdout.strip().split("|")
    assert Path(package) == tmp_path / "sbm_fast"
    assert (library, reason) == (str(libraries[0]), "")

    (tmp_path / "csrc" / "philox.h").write_text("// changed\n")
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split("|")[1] == "None"
    assert "was built from other sources" in run.stdout


def test_warns_once(fresh: Fresh, tmp_path: Path) -> None:
    loader = fresh(tmp_path)
    with pytest.warns(RuntimeWarning, match="without its compiled part.*holds no compiled _host"):
        loader.warn_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.warn_if_missing()
