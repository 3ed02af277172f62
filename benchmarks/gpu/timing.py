"""Times calls in turn, A B C A B C …, by device events on a GPU and by the clock on a CPU."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.measure import frozen_heap

LEAST_ROUNDS = 5
FLUSH_BYTES = 512 * 2**20
"""Several times any L2."""


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Timed:
    """`run()` is timed and does `steps` steps; `prepare()` comes before it, untimed."""

    run: Callable[[], object]
    steps: int = 1
    prepare: Callable[[], object] = nothing


@dataclass(frozen=True)
class Summary:
    """Seconds per step over the rounds."""

    values: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def entry(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "quartiles": quartiles(self.values),
            "rounds": len(self.values),
        }


def quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def flush_buffer(context: Context) -> Tensor:
    """What is written to put everything else out of L2."""
    return torch.empty(context.size(FLUSH_BYTES, 1024) // 4, device=context.device)


def interleave(
    cases: Mapping[str, Timed],
    context: Context,
    rounds: int,
    *,
    flush: Tensor | None = None,
    seconds: float = 10.0,
) -> dict[str, Summary]:
    """Every case's seconds per step after two untimed rounds; fewer rounds when time is over.

    With `flush`, that buffer is written before each timed call. It also keeps the GPU busy while
    the call is put into its queue, so what is timed is the GPU's work and not the first launch;
    without it the time includes all waiting for launches.
    """
    taken: dict[str, list[float]] = {label: [] for label in cases}
    clock = _Clock(context, flush)
    rounds = context.size(rounds, 1)
    with frozen_heap():
        for case in cases.values():
            for _ in range(context.size(2, 1)):
                case.prepare()
                case.run()
        context.synchronize()
        begin = time.perf_counter()
        for number in range(rounds):
            for label, case in cases.items():
                case.prepare()
                if context.on_gpu:
                    gc.collect()  # so that each pays for its own garbage only
                taken[label].append(clock.seconds(case.run) / case.steps)
            if number + 1 >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                break
    return {label: Summary(np.array(values)) for label, values in taken.items()}


class _Clock:
    """Seconds of a call: between device events, or by the host's clock in a dry run."""

    def __init__(self, context: Context, flush: Tensor | None) -> None:
        self.context, self.flush = context, flush
        if context.on_gpu:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, run: Callable[[], object]) -> float:
        self.context.synchronize()
        if self.flush is not None:
            self.flush.fill_(1.5)
        if not self.context.on_gpu:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) * 1e-3


def captured(run: Callable[[], object], context: Context) -> Callable[[], object]:
    """`run` as a CUDA graph, to be replayed; itself in a dry run."""
    if not context.on_gpu:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    # The graph works on the memory of what it was captured from, which must outlive it.
    def replay(held: object = run) -> None:
        graph.replay()

    return replay
