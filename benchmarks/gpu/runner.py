"""Runs the phases one after the other within the time there is, and keeps the record.

Standard library only: whatever a phase does to its process, the record stays.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.gpu.files import read_json, write_json
from benchmarks.gpu.phases import Phase

POLL = 0.2
SKIPPED = "skipped: time"


@dataclass
class Runner:
    """The laboratory's loop.

    Attributes:
        folder: where lab.json and the logs go.
        seconds: for everything, the ending of a last phase included.
        grace: seconds between asking a process to end (SIGINT) and ending it, and at most between
            that and going on.
        environment: variables added for the phases' processes.
    """

    folder: Path
    seconds: float
    grace: float = 4.0
    environment: dict[str, str] | None = None

    def run(self, phases: Sequence[Phase], header: dict[str, Any]) -> dict[str, Any]:
        """The record; lab.json holds it after every phase, and nearly so during one.

        The last phase may take all that the others left.
        """
        self.begin = time.monotonic()
        self.record = {**header, "finished": False, "seconds": 0.0, "phases": {}}
        self.keep()
        with tempfile.TemporaryDirectory() as parts:
            *others, last = phases
            for phase in (*others, replace(last, most=self.seconds)):
                self.phase(phase, Path(parts, f"{phase.name}.json"))
                self.keep()
        self.record["finished"] = True
        self.keep()
        return self.record

    def keep(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.begin, 1)
        write_json(self.folder / "lab.json", self.record)

    def phase(self, phase: Phase, part: Path) -> None:
        """Runs one phase and puts what it wrote into the record."""
        begin = time.monotonic()
        left = self.begin + self.seconds - begin - self.grace
        limit = min(phase.most, left)
        entry: dict[str, Any] = {"title": phase.title, "status": "running", "most": phase.most}
        self.record["phases"][phase.name] = entry
        if limit < min(phase.least, phase.most):
            entry["status"] = SKIPPED
            _say(f"{phase.name}: {SKIPPED}")
            return
        _say(f"{phase.name}: {phase.title}, at most {limit:.0f} s …")
        with (self.folder / phase.log).open("ab") as log:
            command = [word.replace("{part}", str(part)) for word in phase.command]
            log.write(f"== {phase.name}: {' '.join(command)}\n".encode())
            log.flush()
            try:
                process = self.start(command, log)
            except OSError as error:
                entry["status"] = f"failed: {error}"
                return
            try:
                status = self.wait(process, begin + limit, part, entry)
            except BaseException:  # the laboratory itself is being ended
                entry["status"] = "killed: with the laboratory"
                self.keep()
                raise
            finally:
                self.end(process)
        readable = take(part, entry)
        entry["status"] = status or _meaning(process.returncode)
        entry["status"] += "" if readable else ", but its part cannot be read"
        entry["seconds"] = round(time.monotonic() - begin, 1)
        _say(f"{phase.name}: {entry['status']} after {entry['seconds']:.0f} s")

    def start(self, command: list[str], log: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_NO_INDEX": "1"}
        path = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
        environment |= self.environment or {}
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # A group, to end children with it; no session of its own, which could outlive us.
            preexec_fn=os.setpgrp,
        )

    def wait(
        self, process: subprocess.Popen[bytes], end: float, part: Path, entry: dict[str, Any]
    ) -> str:
        """Until it ends, or its time does; its part goes into the record as it grows."""
        seen = 0
        while time.monotonic() < end:
            try:
                process.wait(POLL)
                return ""
            except subprocess.TimeoutExpired:
                now = part.stat().st_mtime_ns if part.exists() else 0
                if now != seen:
                    seen = now
                    take(part, entry)
                    self.keep()
        return "killed: its time was over"

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Asks what is left of the process and its children to end, then ends it."""
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.grace)
        _signal(process, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may hold it; the others go on
            process.wait(self.grace)


def take(part: Path, entry: dict[str, Any]) -> bool:
    """Puts what a phase has written into its entry; False where it is no JSON."""
    try:
        entry.update(read_json(part))
    except ValueError:
        return False
    return True


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _meaning(code: int) -> str:
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    return "done" if code == 0 else f"failed: exit code {code}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
