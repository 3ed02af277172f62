"""In-tree PEP 517 backend: setuptools, built against the torch that is already installed.

pip and uv build in an isolated environment. Naming torch in `build-system.requires` would download
a second copy of it there, and none would be found without naming it. So nothing is required up
front: the packages that a build needs are looked for in the environment that the wheel is made
for, and only what is missing there is asked for, at the tested version in constraints.txt.

`SBM_FAST_SITE` (site-packages folders, separated like PATH) names that environment where it
cannot be guessed: `uv pip install --python ENV .` outside an activated ENV.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import site
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Settings = dict[str, Any] | None


def _target_sites() -> list[Path]:
    """Site-packages of the environment that is built for, most certain first."""
    named = os.environ.get("SBM_FAST_SITE", "").split(os.pathsep)
    # pip runs the build with the target's interpreter: sys.prefix still names the target.
    found = [Path(p) for p in [*named, *site.getsitepackages(), site.getusersitepackages()] if p]
    # uv and `python -m build` make a real environment: the activated one is on PATH.
    library = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if folder and (Path(folder).parent / "pyvenv.cfg").is_file():
            found.append(Path(folder).parent / library)
    return [p for p in dict.fromkeys(found) if p.is_dir()]


def _version(distribution: str) -> tuple[int, ...]:
    text = importlib.metadata.version(distribution)
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _usable(name: str) -> bool:
    """Whether `name` can be imported in a version that this build can use."""
    if name == "ninja" and shutil.which("ninja"):
        return True
    if importlib.util.find_spec(name) is None:
        return False
    if name == "setuptools":  # knows pyproject.toml's `license = "MIT"` since 77
        return _version("setuptools") >= (77,)
    return name != "torch" or _version("torch") >= (2, 10)


def _find(name: str) -> bool:
    """Make `name` importable, from the target environment if it is not so already."""
    if _usable(name):
        return True
    before = list(sys.path)
    for folder in _target_sites():
        if (folder / name).is_dir():
            sys.path.append(str(folder))  # last: what the build environment has goes first
        elif any(folder.glob("*.pth")):
            site.addsitedir(str(folder))
        importlib.invalidate_caches()
        if _usable(name):
            return True
        sys.path[:] = before
    return False


def _tested(name: str) -> str:
    """The requirement for `name` as constraints.txt pins it, e.g. "torch==2.13.0"."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    return name


def _requires(config_settings: Settings = None) -> list[str]:
    missing = [name for name in ("setuptools", "torch", "ninja") if not _find(name)]
    wanted = [_tested(name) for name in missing]
    if "torch" in missing:
        places = ", ".join(map(str, _target_sites())) or "no site-packages at all"
        print(
            f"sbm_fast: no torch >= 2.10 found in {places}; fetching {_tested('torch')} to build "
            "against. If torch is installed elsewhere, set SBM_FAST_SITE to its site-packages.",
            file=sys.stderr,
        )
    return wanted


get_requires_for_build_wheel = _requires
get_requires_for_build_editable = _requires


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """A source archive compiles nothing: setuptools is enough."""
    return [] if _find("setuptools") else [_tested("setuptools")]


def _call(hook: str, *arguments: Any) -> str:
    for name in ("setuptools", "torch", "ninja"):
        _find(name)
    from setuptools import build_meta

    result: str = getattr(build_meta, hook)(*arguments)
    return result


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return _call("build_sdist", sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _call("build_wheel", wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _call("build_editable", wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return _call("prepare_metadata_for_build_wheel", metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return _call("prepare_metadata_for_build_editable", metadata_directory, config_settings)
