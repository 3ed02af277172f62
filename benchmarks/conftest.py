"""Refuses to run without the compiled part; measures each workload once; prints the ratios."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# `pytest benchmarks` does not put the checkout on the path; behind an installed package it goes.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import headline, require_compiled
from benchmarks.measure import Measurement, measure
from benchmarks.report import table
from benchmarks.workloads import Workload

MEASURED: dict[Workload, Measurement] = {}
HELD: dict[str, float] = {}


def pytest_configure() -> None:
    try:
        require_compiled()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> str:
    return headline()


@pytest.fixture(scope="session")
def measured() -> Callable[[Workload], Measurement]:
    """The interleaved measurement of a workload, made when first asked for."""

    def get(workload: Workload) -> Measurement:
        if workload not in MEASURED:
            MEASURED[workload] = measure(workload)
        return MEASURED[workload]

    return get


@pytest.fixture(scope="session")
def held() -> dict[str, float]:
    """Where the test of the buffers leaves its counts."""
    return HELD


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("interleaved in one process, × ours")
        terminalreporter.write_line(table(MEASURED.values(), HELD or None))
