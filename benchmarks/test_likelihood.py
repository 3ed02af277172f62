"""Likelihoods of a few digits: ours beside score_sde's algorithm and torchdiffeq.

A small version of `python -m benchmarks.likelihood`, which makes the record.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.likelihood import MOST_ERROR, THREADS, TORCHDIFFEQ, Task
from benchmarks.likelihood_models import shipped_digits
from benchmarks.measure import threads
from benchmarks.workloads import OURS, SCORE_SDE

TASK = Task(shipped_digits, samples=16, batch=8, judged=8)


@pytest.mark.parametrize("probes", [1, 8])
@pytest.mark.parametrize("label", [SCORE_SDE, TORCHDIFFEQ, OURS])
def test_likelihood(label: str, probes: int, benchmark: BenchmarkFixture) -> None:
    """One call is all samples; it fails when the log-densities are not right."""
    benchmark.group = f"log-likelihood, {TASK.samples} digits, {probes} probe(s)"
    with threads(THREADS):
        outcome = benchmark.pedantic(TASK.run, args=(label, probes), rounds=3 if probes == 1 else 1)
    errors = TASK.errors(outcome)
    benchmark.extra_info |= {"nfe_mean": float(outcome.nfe.double().mean()), **errors}
    assert errors["error_rms"] <= MOST_ERROR
