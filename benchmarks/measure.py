"""Interleaved timing of a workload's implementations in one process."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.workloads import OURS, Case, Workload


@dataclass(frozen=True)
class Timing:
    """Seconds per step over the rounds."""

    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """How many times as long as ours: of the medians, and quartiles of the ratios per round."""

    value: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """One workload: checked first, then timed."""

    workload: Workload
    errors: dict[str, float]
    timings: dict[str, Timing]
    ratios: dict[str, Ratio]


def measure(workload: Workload) -> Measurement:
    """Checks every implementation, then times them in turn, A B C A B C …, in this process.

    Raises: AssertionError when one computes something else.
    """
    with threads(workload.threads):
        errors = workload.check()
        cases = {label: workload.case(label) for label in workload.labels}
        seconds = interleave(cases, workload.rounds)
    per_step = {label: values / workload.steps for label, values in seconds.items()}
    ours = per_step[OURS]
    return Measurement(
        workload,
        errors,
        {label: Timing(float(np.median(v)), _quartiles(v)) for label, v in per_step.items()},
        {
            label: Ratio(float(np.median(v) / np.median(ours)), _quartiles(v / ours))
            for label, v in per_step.items()
        },
    )


def interleave(cases: Mapping[str, Case], rounds: int, untimed: int = 2) -> dict[str, np.ndarray]:
    """Seconds of every case's run, [rounds] each; one of each in a round, after untimed ones.

    Garbage is collected before every timed call, so that each pays for its own only.
    """
    seconds = {label: np.empty(rounds) for label in cases}
    with frozen_heap():
        for number in range(-untimed, rounds):
            for label, case in cases.items():
                case.prepare()
                gc.collect()
                begin = time.perf_counter()
                case.run()
                end = time.perf_counter()
                if number >= 0:
                    seconds[label][number] = end - begin
    return seconds


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch on that many threads; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What is alive now is not looked at by collections inside, which makes them quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)
