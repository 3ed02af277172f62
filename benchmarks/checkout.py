"""This checkout. Imports nothing that is built: the laboratory asks before anything is."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"


def commit() -> str:
    """Its commit, with "+" where tracked files differ from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return head.strip() + "+" * bool(changed.strip())


def setup_module() -> ModuleType:
    """setup.py, for its flags and its hash of the sources."""
    spec = importlib.util.spec_from_file_location("_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_setup"] = module
    spec.loader.exec_module(module)
    return module
