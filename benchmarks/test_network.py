"""The network's blocks and DDPM++ at batch 1: eager, torch.compile and ours in one group.

The record, with max-autotune and batch 8, is made by `python -m benchmarks.network`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import Measurement, threads
from benchmarks.network import EAGER, WORKLOADS, Forward, Normalisation, quick
from benchmarks.workloads import OURS, Workload

NORMS = [w for w in WORKLOADS if isinstance(w, Normalisation)]
FORWARD = replace(quick(next(w for w in WORKLOADS if isinstance(w, Forward))), rounds=5)
PAIRS = [
    *((w, label) for w in NORMS for label in w.labels),
    *((FORWARD, label) for label in (EAGER, OURS)),
]


@pytest.mark.parametrize(("workload", "label"), PAIRS)
def test_network(
    workload: Workload,
    label: str,
    benchmark: BenchmarkFixture,
    measured: Callable[[Workload], Measurement],
) -> None:
    """One call is `workload.steps` calls of the function; it fails when one is not right."""
    measurement = measured(workload)
    benchmark.group = f"{workload.title}: {workload.steps} calls"
    benchmark.extra_info |= {
        "seconds_per_call": measurement.timings[label].median,
        "times_ours": measurement.ratios[label].value,
        "error": measurement.errors[label],
    }
    case = workload.case(label)
    with threads(workload.threads):
        benchmark.pedantic(case.run, setup=case.prepare, rounds=5, warmup_rounds=1)
