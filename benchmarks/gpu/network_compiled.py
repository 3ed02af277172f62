"""torch.compile (inductor) of DDPM++ in plain torch, beside ours in the same process.

A phase of its own, because compiling takes most of it. Left out, for time: dynamic shapes, float32.
The captured ones are the same code replayed as a CUDA graph (what reduce-overhead does, without its
bookkeeping).
"""

import os
import tempfile
import time
from functools import partial

import torch

from benchmarks.gpu.checks import Errors
from benchmarks.gpu.context import Case, Context, Entries
from benchmarks.gpu.network import OURS, Forward
from benchmarks.gpu.timing import Timed
from benchmarks.workloads import COMPILED, Goal

TUNED, GRAPH = f"{COMPILED}, max-autotune", ", in a CUDA graph"
GOALS = (Goal(TUNED + GRAPH, 1.1, 1.35), Goal(COMPILED + GRAPH, 1.1, 1.35))
BATCHES = (
    (256, COMPILED), (1, COMPILED), (256, TUNED), (16, COMPILED), (1, TUNED), (16, TUNED),
)  # fmt: skip
"""What matters most first: max-autotune takes minutes."""
CACHE = tempfile.TemporaryDirectory(prefix="sbm_fast_inductor_")


def cases(context: Context) -> dict[str, Case]:
    torch.backends.cudnn.benchmark = True
    # An earlier run's cache would make the seconds to compile those of reading it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
    return {
        f"DDPM++, batch {batch}, {mode}": partial(forward, batch=batch, mode=mode)
        for batch, mode in BATCHES
    }


def forward(context: Context, batch: int, mode: str) -> Entries:
    if context.on_gpu:
        torch._dynamo.reset()
    case = Forward(context, batch)
    comparison = case.comparison(
        "events; bfloat16, channels_last, random weights, cudnn.benchmark; 3 forwards in turn, per "
        "forward; torch.compile with fullgraph and static shapes"
    )
    chosen = {} if mode == COMPILED else {"mode": "max-autotune-no-cudagraphs"}
    compiled = torch.compile(case.half, fullgraph=True, dynamic=False, **chosen)

    def make() -> tuple[Timed, Errors]:
        begin = time.perf_counter()
        made, errors = case.case(compiled, torch.bfloat16)
        comparison.note(mode, seconds_to_compile=time.perf_counter() - begin)
        return made, errors

    comparison.add(OURS, lambda: case.ours(graph=True))
    comparison.add(mode, make)
    comparison.add(mode + GRAPH, lambda: case.case(compiled, torch.bfloat16, graph=True))
    comparison.measure(15, seconds=4.0)
    comparison.ratios([OURS], [goal for goal in GOALS if goal.baseline == mode + GRAPH])
    yield case.entry(comparison)
