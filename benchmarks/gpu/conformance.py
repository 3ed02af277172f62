"""The tests marked `gpu`, counted as they go.

python -m benchmarks.gpu.conformance PART [--dry-run]

The part is written after every test, so a crash or a hang leaves the results before it and the name
of the test it came in. Only files that can have such tests are collected: the others would cost
seconds, and count as errors where what they import is missing. A dry run collects only, and only
the ops' tests.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkout import ROOT
from benchmarks.gpu.files import write_json

FAILURES_KEPT = 50
WRITE_EVERY = 0.5
TRITON_ALONE = ("test_error_norm", "test_group_norm_silu", "test_hutchinson")
"""Tests of the ops without a kernel in csrc/."""


class Record:
    """A pytest plugin that keeps outcomes.

    `running` is the test in progress; `failures` are the first few, with their last line.
    """

    def __init__(self, part: Path) -> None:
        self.path, self.written = part, 0.0
        self.counts = {"collected": 0, "passed": 0, "failed": 0, "errors": 0, "skipped": 0}
        self.failures: list[dict[str, str]] = []
        self.skips: dict[str, int] = {}
        self.running = ""

    def write(self, status: str = "unfinished", force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self.written > WRITE_EVERY:
            self.written = now
            write_json(self.path, self.part(status))

    def part(self, status: str) -> dict[str, Any]:
        return {
            "tests": self.counts,
            "pytest": status,
            "running": self.running,
            "failed_tests": self.failures,
            "skips": self.skips,
        }

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """There may not be time for all: each in its old order, by `place`."""
        items.sort(key=lambda item: place(item.nodeid))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.counts["collected"] = len(session.items)
        self.write(force=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.fail("errors", report.nodeid, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            kind = "failed" if report.when == "call" else "errors"
            self.fail(kind, report.nodeid, str(report.longreprtext))
        elif report.skipped:
            self.counts["skipped"] += 1
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else "xfail"
            self.skips[reason] = self.skips.get(reason, 0) + 1
        elif report.when == "call":
            self.counts["passed"] += 1
        self.write(force=report.failed)

    def fail(self, kind: str, test: str, text: str) -> None:
        self.counts[kind] += 1
        if len(self.failures) < FAILURES_KEPT:
            lines = [line for line in text.splitlines() if line.strip()]
            message = [line for line in lines if line.startswith("E ")] or lines[-1:] or [""]
            self.failures.append({"test": test, "message": message[0][:300]})


def place(nodeid: str) -> int:
    """The captured sampler first, then the compiled ops; Triton, which compiles at each, last.

    A parameter of several words names the backend among them; "cuda" is Triton's kernel too where
    an op has no other.
    """
    file, _, test = nodeid.partition("::")
    if "triton" in nodeid or "/kernels/" in file or Path(file).stem in TRITON_ALONE:
        return 3
    if file.endswith("test_capture_gpu.py"):
        return 0
    return 1 if "cuda" in test or "/cuda/" in file else 2


def files(tests: Path) -> list[Path]:
    """Those with tests marked `gpu`, by themselves or by a helper module that marks them."""
    mark = re.compile(r"\bmark\.gpu\b")
    marking = {path for path in sorted(tests.rglob("*.py")) if mark.search(path.read_text("utf-8"))}
    helpers = "|".join(path.stem for path in marking if not path.stem.startswith("test_"))
    imports = re.compile(rf"^\s*(?:from|import) +(?:{helpers or '(?!)'})\b", re.MULTILINE)
    found = {path for path in tests.rglob("test_*.py") if imports.search(path.read_text("utf-8"))}
    return sorted(found | {path for path in marking if path.stem.startswith("test_")})


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("part", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    record = Record(arguments.part)
    options = ["-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-v"]
    options += ["--tb=short", "--durations=10"]
    if arguments.dry_run:
        options.append("--collect-only")
    tests = ROOT / "tests" / "ops" if arguments.dry_run else ROOT / "tests"
    chosen = [str(path) for path in files(tests)]
    code = pytest.main([*chosen, "--rootdir", str(ROOT), *options], plugins=[record])
    status = pytest.ExitCode(code).name.lower()
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record.running = ""
    record.write(status, force=True)
    nothing = arguments.dry_run and code == pytest.ExitCode.NO_TESTS_COLLECTED
    sys.exit(0 if nothing else int(code))


if __name__ == "__main__":
    main()
