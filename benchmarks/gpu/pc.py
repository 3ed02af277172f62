"""A predictor–corrector iteration in a CUDA graph: Langevin with norms, then reverse diffusion.

The score is −x, one op, exact for standard normal data under VP.
"""

from functools import partial

from benchmarks.baselines import NormalScore
from benchmarks.gpu.baselines import Baselines
from benchmarks.gpu.checks import Errors, hold_sampler_to_reference
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.context import Case, Context, Entries, Shape
from benchmarks.gpu.subjects import Loop, make_sampler, ours, whole_call
from benchmarks.gpu.timing import Timed
from benchmarks.workloads import COMPILED, SCORE_SDE, Goal

BATCHES = (64, 256, 1024)
GOALS = (Goal(SCORE_SDE, 20, 50), Goal(COMPILED, 5, 12))
NORMS = ("batch_mean", "per_sample", "sigma")


def cases(context: Context) -> dict[str, Case]:
    made: dict[str, Case] = {f"{b}×3×32×32": partial(pair, batch=b) for b in BATCHES}
    return made | {"norms at 256×3×32×32": norms}


def shape_of(context: Context, batch: int) -> Shape:
    return context.size((batch, 3, 32, 32), (batch // 32, 3, 8, 8))


def ours_case(
    context: Context, backend: str, shape: Shape, graph: bool, iterations: int, norm: str
) -> tuple[Timed, Errors]:
    """A whole call of the captured sampler, or rows of its loop."""
    network = NormalScore()
    errors = hold_sampler_to_reference(
        context, backend, network, shape, graph, corrector=True, norm=norm
    )
    sampler = make_sampler(
        context, backend, network, shape, corrector=True, graph=graph, steps=iterations, norm=norm
    )
    if graph:
        return whole_call(sampler, iterations), errors
    start = context.random(shape, 1)
    return Loop(sampler, start, 2).timed(context.size(20, 1)), errors


def pair(context: Context, batch: int) -> Entries:
    shape = shape_of(context, batch)
    steps, iterations = context.size(20, 1), context.size(500, 21)
    comparison = Comparison(
        context,
        f"events; state in L2; `CUDA graph` is a whole call sampler(seed=…) of {iterations} "
        f"iterations, the others are loops of {steps} with all waiting for launches; norms "
        "averaged over the batch, as score_sde has them",
        name="PC iteration",
        shape=shape,
    )
    backends, unavailable = ours(context)
    comparison.unavailable |= unavailable
    graphs = [f"{backend}, CUDA graph" for backend in backends]
    loops = [f"{backend}, Sampler" for backend in backends]
    for backend in backends:
        for label, graph in ((f"{backend}, CUDA graph", True), (f"{backend}, Sampler", False)):
            comparison.add(
                label, partial(ours_case, context, backend, shape, graph, iterations, NORMS[0])
            )
    baselines = Baselines(context, NormalScore(), context.random(shape, 1), None)
    baselines.add_eager(comparison, steps)
    for compiled in (False, True):
        if compiled:
            baselines.add_compiled(comparison, steps, graph=True)
        comparison.measure(20)
        comparison.ratios([*graphs, *loops], GOALS, judged=graphs)
        yield comparison.entry()


def norms(context: Context) -> Entries:
    """What the corrector's norm costs; "sigma" needs no reduction."""
    shape, iterations = shape_of(context, 256), context.size(500, 21)
    comparison = Comparison(
        context,
        f"events; whole calls sampler(seed=…) of {iterations} iterations in a CUDA graph",
        name="PC iteration, by norm",
        shape=shape,
    )
    backends, unavailable = ours(context)
    comparison.unavailable |= unavailable
    for backend in backends:
        for norm in NORMS:
            comparison.add(
                f"{backend}, {norm}",
                partial(ours_case, context, backend, shape, True, iterations, norm),
            )
    comparison.measure(20)
    yield comparison.entry()
