"""The CPU workloads: every implementation of one in one group, and its ratio to ours.

pytest-benchmark times one implementation after another; the ratios in `extra_info` and in the table
below its own come from the interleaved measurement.
"""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.buffers import pc_buffers
from benchmarks.measure import Measurement, threads
from benchmarks.workloads import WORKLOADS, Workload

PAIRS = [pytest.param(w, label, id=label) for w in WORKLOADS for label in w.labels]


@pytest.mark.parametrize(("workload", "label"), PAIRS)
def test_workload(
    workload: Workload,
    label: str,
    benchmark: BenchmarkFixture,
    measured: Callable[[Workload], Measurement],
) -> None:
    """One call is `workload.steps` steps; it fails when an implementation is not right."""
    measurement = measured(workload)
    ratio = measurement.ratios[label]
    benchmark.group = f"{workload.title}: {workload.steps} steps a call"
    benchmark.extra_info |= {
        "seconds_per_step": measurement.timings[label].median,
        "times_ours": ratio.value,
        "times_ours_quartiles": ratio.quartiles,
        "error": measurement.errors[label],
    }
    case = workload.case(label)
    with threads(workload.threads):
        benchmark.pedantic(case.run, setup=case.prepare, rounds=7, warmup_rounds=2)


def test_pc_buffers(benchmark: BenchmarkFixture, held: dict[str, float]) -> None:
    """State-size buffers alive during PC beyond the network's own (the time is of no interest)."""
    held |= benchmark.pedantic(pc_buffers, rounds=1)
    benchmark.group = "state-size buffers alive during PC"
    benchmark.extra_info |= held
    assert held["ours"] <= 4
