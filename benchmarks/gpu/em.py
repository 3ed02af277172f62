"""The Euler–Maruyama update: at 64 M elements against the memory, at 64×3×32×32 against launches.

Its network costs nothing (a fixed output), so only the update is timed.
"""

from functools import partial

import torch

from benchmarks.baselines import FixedNoise
from benchmarks.gpu.baselines import Baselines
from benchmarks.gpu.checks import Errors, hold_op_to_reference, hold_sampler_to_reference
from benchmarks.gpu.comparison import COPY, Comparison
from benchmarks.gpu.context import Case, Context, Entries
from benchmarks.gpu.machine import copies
from benchmarks.gpu.subjects import Loop, Op, make_sampler, ours, whole_call
from benchmarks.gpu.timing import Timed, flush_buffer
from benchmarks.workloads import COMPILED, SCORE_SDE, Goal

LARGE = (21_845, 3, 32, 32)
"""64 M elements, and a whole number of samples."""
SMALL = (64, 3, 32, 32)
SETS = 3
SHARE = Goal(COPY, 0.85, 0.93)
GOALS = (Goal(SCORE_SDE, 6, 9), Goal(COMPILED, 2, 2.7))


def cases(context: Context) -> dict[str, Case]:
    return {
        "64 M, float32 network": partial(large, dtype=torch.float32),
        "64 M, bfloat16 network": partial(large, dtype=torch.bfloat16),
        "64×3×32×32": small,
    }


def large(context: Context, dtype: torch.dtype) -> Entries:
    """Device memory bound: 4 bytes of x read, 4 written, and those of F read."""
    shape = context.size(LARGE, (5, 3, 8, 8))
    x, out = context.random(shape, 1), context.random(shape, 2, dtype)
    per_element = 8 + out.element_size()
    comparison = Comparison(
        context,
        f"events; a buffer of 512 MiB written before each timed call; `{COPY}` and the op alone "
        f"(cuda, triton) on rotating buffers, {SETS} sets of x and F; the others on one set, "
        f"larger than L2; the share of the copy counts {per_element} bytes an element",
        name="Euler–Maruyama step",
        shape=shape,
        bytes_per_element=per_element,
    )
    backends, unavailable = ours(context)
    comparison.unavailable |= unavailable
    comparison.add(COPY, lambda: (copies(context, context.size(2**28, 4096)), {}))
    for backend in backends:
        comparison.add(backend, partial(op_alone, context, backend, x, out))
    loops = [f"{backend}, Sampler" for backend in backends]
    for backend, label in zip(backends, loops, strict=True):
        comparison.add(label, partial(loop, context, backend, x, out))
    baselines = Baselines(context, FixedNoise(out), x, out)
    flush = flush_buffer(context)
    baselines.add_eager(comparison, context.size(4, 1))
    for compiled in (False, True):
        if compiled:
            baselines.add_compiled(comparison, context.size(4, 1), graph=False)
        comparison.measure(20, flush)
        goals = GOALS if dtype == torch.float32 else ()
        comparison.ratios([*backends, *loops], goals)
        judge_share(comparison, backends, x.numel(), per_element)
        yield comparison.entry()


def judge_share(
    comparison: Comparison, backends: tuple[str, ...], elements: int, per_element: int
) -> None:
    """Bytes that must move over the time they took, against the copy beside it."""
    for backend in backends:
        comparison.miss(backend, COPY)
    if COPY not in comparison.summaries:
        return
    bandwidth = comparison.rate(COPY, 2 * 4 * comparison.context.size(2**28, 4096), "B/s")
    for backend in backends:
        if backend in comparison.summaries:
            rate = comparison.rate(backend, per_element * elements, "B/s")
            comparison.fraction(backend, rate / bandwidth, SHARE)


def op_alone(
    context: Context, backend: str, x: torch.Tensor, out: torch.Tensor
) -> tuple[Timed, Errors]:
    op = Op(backend, x.clone(), out)
    errors = hold_op_to_reference(op, backend)
    op.rotate(*((x.clone(), out.clone()) for _ in range(SETS - 1)))
    return op.timed(context.size(8, 2)), errors


def loop(
    context: Context, backend: str, x: torch.Tensor, out: torch.Tensor
) -> tuple[Timed, Errors]:
    """The public sampler's rows; what it computes was checked with the op."""
    sampler = make_sampler(context, backend, FixedNoise(out), tuple(x.shape), corrector=False)
    few = tuple(x[:4].shape)
    network = FixedNoise(out[:4].clone())
    errors = hold_sampler_to_reference(context, backend, network, few, False, corrector=False)
    return Loop(sampler, x, 1).timed(context.size(8, 1)), errors


def small(context: Context) -> Entries:
    """Launch bound: everything lies in L2."""
    shape = context.size(SMALL, (4, 3, 8, 8))
    x, out = context.random(shape, 1), context.random(shape, 2)
    network = FixedNoise(out)
    steps, calls = context.size(20, 1), context.size(500, 3)
    comparison = Comparison(
        context,
        f"events; warm L2; `CUDA graph` is a whole call sampler(seed=…) of {calls} steps, the "
        f"others are loops of {steps} steps with all waiting for launches",
        name="Euler–Maruyama step",
        shape=shape,
    )
    backends, unavailable = ours(context)
    comparison.unavailable |= unavailable
    labels = []
    for backend in backends:
        for graph in (True, False):

            def make(backend: str = backend, graph: bool = graph) -> tuple[Timed, Errors]:
                errors = hold_sampler_to_reference(
                    context, backend, network, shape, graph, corrector=False
                )
                sampler = make_sampler(
                    context, backend, network, shape, corrector=False, graph=graph, steps=calls
                )
                if graph:
                    return whole_call(sampler, calls), errors
                return Loop(sampler, x, 1).timed(steps), errors

            labels.append(f"{backend}, {'CUDA graph' if graph else 'Sampler'}")
            comparison.add(labels[-1], make)
    baselines = Baselines(context, network, x, out)
    baselines.add_eager(comparison, steps)
    for compiled in (False, True):
        if compiled:
            baselines.add_compiled(comparison, steps, graph=True)
        comparison.measure(30)
        comparison.ratios(labels)
        yield comparison.entry()
