"""Builds, tests and measures on an offline machine with an NVIDIA GPU, in one command.

    python3 benchmarks/gpu_lab.py --out FOLDER            (or python3 -m benchmarks.gpu_lab)
    python3 benchmarks/gpu_lab.py --out FOLDER --dry-run  all of it on a CPU in tiny sizes

FOLDER gets lab.json (everything), table.txt (the same for people, printed at the end), build.log,
tests.log and lab.log (what the other phases printed). It takes at most 8 minutes, begins with what
matters most, and lab.json is rewritten as it goes, so a run cut short leaves its part. For what
there was no time for: `--only build PHASE`, which leaves all the time to PHASE. The GPU's settings
are read, never changed. To keep a run: copy its lab.json to benchmarks/results/gpu.json;
`python -m benchmarks.readme --write` then puts its table into README.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started as a file: benchmarks/ is on the path, its parent is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.checkout import commit, setup_module
from benchmarks.gpu.files import write_whole
from benchmarks.gpu.phases import MOST, all_phases
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.table import table

SECONDS = 465.0
"""Eight minutes, less the start and the end of this process."""


def header(dry_run: bool) -> dict[str, Any]:
    """What the record begins with."""
    return {
        "dry_run": dry_run,
        "command": shlex.join(["python3", "benchmarks/gpu_lab.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "commit": commit(),
        # Where the machine has no .git, this says what was measured.
        "sources": setup_module().source_hash(),
    }


NEEDED = ("torch", "numpy", "setuptools", "ninja", "pytest", "safetensors", "tqdm")
"""What the build, the tests and `import sbm_fast` cannot do without. Others are missed where they
are needed: without triton its figures are "not available"."""


def lacking(needed: Sequence[str] = NEEDED) -> list[str]:
    """What of that this Python does not have, each with what is wanted."""
    missing = [name for name in needed if not _there(name)]
    # An older one refuses pyproject.toml's license.
    if "setuptools" in needed and "setuptools" not in missing:
        version = importlib.metadata.version("setuptools")
        if int(re.findall(r"\d+", version)[0]) < 77:
            missing.append(f"setuptools >= 77 (it has {version})")
    return missing


def _there(name: str) -> bool:
    command = name == "ninja" and shutil.which(name) is not None
    return command or importlib.util.find_spec(name) is not None


def why_no_gpu() -> str:
    """Empty where the driver finds a device. Asked in a process of its own."""
    code = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
result = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
assert result == 0, f"cuInit or cuDeviceGetCount gave error {result}"
assert count.value, "the driver finds no device"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def laboratory(folder: Path, dry_run: bool, seconds: float, only: list[str] | None) -> int:
    """Runs it; the number of phases that were not done."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("lab.json", "table.txt", "build.log", "tests.log", "lab.log"):
        (folder / old).unlink(missing_ok=True)
    phases = [p for p in all_phases(dry_run) if only is None or p.name in only]
    runner = Runner(folder, seconds, environment={"OMP_NUM_THREADS": "1"} if dry_run else {})
    try:
        runner.run(phases, header(dry_run))
    finally:
        try:
            text = table(runner.record)
        except Exception:  # lab.json has everything; what follows must still be written
            text = traceback.format_exc()
        write_whole(folder / "table.txt", text + "\n")
        print(text, flush=True)
    return sum(phase["status"] != "done" for phase in runner.record["phases"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="for record, table and logs")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in tiny sizes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(MOST), help="these phases")
    arguments = parser.parse_args()
    if missing := lacking():
        sys.exit(f"gpu_lab: {sys.executable} lacks {', '.join(missing)}; nothing was begun")
    if not arguments.dry_run and (reason := why_no_gpu()):
        sys.exit(f"gpu_lab: needs an NVIDIA GPU ({reason}); --dry-run goes through it on a CPU")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out: Path = arguments.out.resolve()
    missed = laboratory(out, arguments.dry_run, arguments.seconds, arguments.only)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
