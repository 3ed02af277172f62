"""torch.compile (inductor, default mode) of the same U-Net, beside eager in the same process.

A phase of its own, because compiling takes most of it. Left out, for time: max-autotune, dynamic
shapes, float32 but at the largest batch. The captured one is the same code replayed as a CUDA graph
(what reduce-overhead does, without its bookkeeping).
"""

import os
import tempfile
import time
from functools import partial

import torch

from benchmarks.gpu.checks import Errors
from benchmarks.gpu.context import Case, Context, Entries
from benchmarks.gpu.network import BATCHES, Forward
from benchmarks.gpu.timing import Timed
from benchmarks.workloads import COMPILED

HALF, FULL = torch.bfloat16, torch.float32
NAMES = {HALF: "bfloat16", FULL: "float32"}


CACHE = tempfile.TemporaryDirectory(prefix="sbm_fast_inductor_")


def cases(context: Context) -> dict[str, Case]:
    torch.backends.cudnn.benchmark = True
    # An earlier run's cache would make the seconds to compile those of reading it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
    wanted = [(batch, HALF) for batch in BATCHES] + [(BATCHES[0], FULL)]
    return {
        f"U-Net, batch {batch}, {NAMES[dtype]}": partial(forward, batch=batch, dtype=dtype)
        for batch, dtype in wanted
    }


def forward(context: Context, batch: int, dtype: torch.dtype) -> Entries:
    if context.on_gpu:
        torch._dynamo.reset()
    case = Forward(context, batch)
    comparison = case.comparison(
        "events; channels_last, random weights, cudnn.benchmark; 3 forwards in turn, per forward; "
        "torch.compile's default mode, fullgraph, static shapes"
    )
    network = case.half if dtype == HALF else case.network
    compiled = torch.compile(network, fullgraph=True, dynamic=False)

    def make() -> tuple[Timed, Errors]:
        begin = time.perf_counter()
        made, errors = case.case(compiled, dtype)
        comparison.note(COMPILED, seconds_to_compile=time.perf_counter() - begin)
        return made, errors

    eager, graph = f"eager, {NAMES[dtype]}", f"{COMPILED}, in a CUDA graph"
    comparison.add(eager, lambda: case.case(network, dtype))
    comparison.add(COMPILED, make)
    comparison.add(graph, lambda: case.case(compiled, dtype, graph=True))
    comparison.measure(15, seconds=4.0)
    comparison.ratios([COMPILED])
    yield case.entry(comparison)
