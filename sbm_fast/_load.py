"""Finds the compiled part of the package and loads it, or says exactly why there is none.

It consists of two libraries: `_C` registers the torch ops, `_host` (Python functions) says how both
were built. They lie in the package's own folder, except where Python runs in a source tree: there
`./sbm_fast` hides the installed package, whose libraries are then taken if they were built from
the sources of this tree.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

PACKAGE = Path(__file__).resolve().parent
DISABLE = "SBM_FAST_DISABLE_COMPILED"

COMPILED: bool = False
REASON: str = "load() was not called yet"  # empty when COMPILED
host: ModuleType | None = None  # sbm_fast._host when COMPILED

_loaded = False
_warned = False


class Unusable(Exception):
    """Why the libraries of one folder cannot be used."""


def source_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the C++ and CUDA sources in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            content = path.read_bytes()
            digest.update(f"{path.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def load() -> bool:
    """Loads the compiled part once and sets COMPILED, REASON and host. Later calls do nothing."""
    global COMPILED, REASON, host, _loaded
    if not _loaded:
        _loaded = True
        tree = _source_tree()
        if tree and __package__:
            # In a checkout `sbm_fast.kernels` lies beside the package, not in it.
            sys.modules[__package__].__path__.append(str(tree))
        try:
            host = _load_first_usable()
            COMPILED, REASON = True, ""
        except Unusable as error:
            REASON = str(error)
    return COMPILED


def library() -> Path | None:
    """The file that the ops were loaded from; None without a compiled part."""
    return Path(str(sys.modules["sbm_fast._C"].__file__)) if load() else None


def warn_if_missing() -> None:
    """Warns once when the slow plain-torch reference stands in for the compiled part."""
    global _warned
    if not load() and not _warned:
        _warned = True
        message = f"sbm_fast runs without its compiled part, on plain torch: {REASON}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _load_first_usable() -> ModuleType:
    if os.environ.get(DISABLE, "") not in ("", "0"):
        raise Unusable(f"{DISABLE} is set in the environment")
    tree = _source_tree()
    expected = source_hash(tree / "csrc") if tree else ""
    reasons = []
    for folder in dict.fromkeys([PACKAGE, *filter(Path.is_dir, _installed_folders())]):
        try:
            libraries = {name: _library(folder, name) for name in ("_host", "_C")}
            _check_sources(libraries, expected)
            _check_not_registered(libraries["_C"])
            modules = {name: _import(name, path) for name, path in libraries.items()}
        except Unusable as error:
            reasons.append(str(error))
        else:
            sys.modules.update({f"sbm_fast.{name}": module for name, module in modules.items()})
            return modules["_host"]
    raise Unusable("; ".join(reasons) + f"; to mend it: {_build_command(tree)}")


def _source_tree() -> Path | None:
    """The checkout that the package is imported from; None for an installed package."""
    root = PACKAGE.parent
    return root if (root / "csrc").is_dir() and (root / "setup.py").is_file() else None


def _installed_folders() -> Iterator[Path]:
    """Where installed distributions, regular and editable, may have the libraries."""
    for distribution in importlib.metadata.distributions(name="sbm_fast"):
        yield Path(str(distribution.locate_file("sbm_fast"))).resolve()
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            yield Path(unquote(urlsplit(origin["url"]).path), "sbm_fast").resolve()


def _library(folder: Path, name: str) -> Path:
    for suffix in EXTENSION_SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    others = sorted(path.name for path in folder.glob(f"{name}.*"))
    if others:
        wanted = f"{name}{EXTENSION_SUFFIXES[0]}"
        raise Unusable(f"{folder} holds a build for another Python: {others}, needed is {wanted}")
    raise Unusable(f"{folder} holds no compiled {name}")


def _check_sources(libraries: dict[str, Path], expected: str) -> None:
    """Before anything is loaded: an op that is registered cannot be taken back."""
    built = {}
    for name, path in libraries.items():
        mark = re.search(rb"sbm_fast-source-hash:([0-9a-f]{64})", path.read_bytes())
        built[name] = mark.group(1).decode() if mark else "unknown"
    if built["_C"] != built["_host"]:
        raise Unusable(f"{libraries['_C']} and {libraries['_host'].name} are of different builds")
    if expected and built["_C"] != expected:
        raise Unusable(
            f"{libraries['_C']} was built from other sources (hash {built['_C'][:12]}) than "
            f"{PACKAGE.parent / 'csrc'} holds now (hash {expected[:12]})"
        )


def _check_not_registered(library: Path) -> None:
    """Torch ends the process when a library defines ops that are defined already."""
    import torch

    module = sys.modules.get("sbm_fast._C")
    if module is not None:
        if Path(str(module.__file__)) != library:
            raise Unusable(f"{module.__file__} is loaded in this process, so {library} cannot be")
    elif any(name.startswith("sbm_fast::") for name in torch._C._dispatch_get_all_op_names()):
        raise Unusable(f"sbm_fast's ops are registered in this process, so {library} cannot be")


def _import(name: str, path: Path) -> ModuleType:
    import torch  # first: ours need its libraries in the process

    full_name = f"sbm_fast.{name}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Unusable(f"{path} cannot be loaded by torch {torch.__version__}: {error}") from error
    return module


def _build_command(tree: Path | None) -> str:
    if tree is None:
        return f"install sbm_fast again with {sys.executable} -m pip install --force-reinstall"
    editable = "-e " if any(PACKAGE.glob("_C.*")) else ""
    return f"cd {tree} && {sys.executable} -m pip install -c constraints.txt {editable}."
