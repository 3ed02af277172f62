"""Where and with what a measurement was made."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.checkout import UNKNOWN, commit
from sbm_fast import _load, doctor

QUIET = 0.1
"""Cores that others may keep busy."""


def require_compiled() -> None:
    """RuntimeError, with the reason, when the compiled part is not there: eager would be timed."""
    if not _load.load():
        raise RuntimeError(f"benchmarks: need the compiled part of sbm_fast, but {_load.REASON}")


def begin() -> float:
    """What every command that keeps a record says first; how many cores others keep busy.

    Ends the program where the compiled part is missing.
    """
    try:
        require_compiled()
    except RuntimeError as error:
        sys.exit(str(error))
    print(headline(), flush=True)
    busy = busy_cores()
    if busy > QUIET:
        print(f"warning: other processes keep {busy:.2f} cores busy; these times mean little")
    return busy


def facts() -> dict[str, object]:
    """Machine, versions and build, as they go into the record."""
    report = doctor()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_set": report.cpu_level,
        "system": platform.platform(),
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "versions": {
            **report.versions,
            "pytest-benchmark": importlib.metadata.version("pytest-benchmark"),
            "compiler": str(report.build["compiler"]),
            "inductor_compiler": _first_line(os.environ.get("CXX", "g++"), "--version"),
        },
        "flags": report.build["flags"],
        "source_hash": report.build["source_hash"],
        "commit": commit(),
        "threads_available": torch.get_num_threads(),
    }


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores everybody together keeps busy while this process sleeps.

    More than a few percent spoils what runs on all cores: its slowest thread waits for a time
    slice at every step, even behind a process of the lowest priority.
    """
    before, begin = _busy_ticks(), time.perf_counter()
    time.sleep(seconds)
    elapsed = time.perf_counter() - begin
    return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / elapsed


def _busy_ticks() -> int:
    """All but idle and iowait of /proc/stat's first line; guest time is in user time already."""
    ticks = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4]


def headline() -> str:
    """One line for people."""
    f = facts()
    versions = f["versions"]
    assert isinstance(versions, dict)
    shown = ("sbm_fast", "torch", "python", "compiler")
    return (
        f"{f['cpu']}, {f['cores']} cores, {f['instruction_set']}, load {f['load_average']}; "
        + ", ".join(f"{name} {versions[name]}" for name in shown)
        + f"; commit {f['commit']}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.partition("\n")[0]
