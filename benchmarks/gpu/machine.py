"""What the machine can do, beside nothing of ours; and what it is."""

import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import machine as host
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.context import Case, Context, Entries, describe, nvidia_smi
from benchmarks.gpu.timing import Timed, captured
from sbm_fast import doctor

LAUNCHES = 1000


def cases(context: Context) -> dict[str, Case]:
    """The machine first: should the report on what was built fail, the rest was measured."""
    own = {"facts": facts, "copy": copy, "launch": launch, "torch.randn": randn}
    return {**own, "build": build}


def facts(context: Context) -> Entries:
    """Torch, the GPU and its tools."""
    entry: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if context.on_gpu:
        p = torch.cuda.get_device_properties(0)
        entry |= {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
            "cudnn": torch.backends.cudnn.version(),
            **nvidia_smi("driver_version,pstate,persistence_mode"),
        }
    entry["nvcc"] = _nvcc()
    yield {"facts": entry}


def build(context: Context) -> Entries:
    """The host, and what of ours works on it."""
    entry: dict[str, Any] = {"doctor": str(doctor()).splitlines()}
    try:
        entry["host"] = host.facts()
    except Exception as error:  # without the compiled part, or pytest-benchmark
        entry["host"] = {"cpu": platform.processor(), "unknown": describe(error)}
    yield {"facts": entry}


def _nvcc() -> str:
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return host.UNKNOWN
    return next((line for line in done.stdout.splitlines() if "release" in line), host.UNKNOWN)


def copy(context: Context) -> Entries:
    """Device to device, bytes read and written counted."""
    comparison = Comparison(
        context, "tensor.copy_, two pairs of buffers in turn, each far larger than L2; events"
    )
    for gibibytes in (1, 4):
        size = context.size(gibibytes * 2**28, 4096)
        comparison.add(f"{gibibytes} GiB", lambda size=size: (copies(context, size), {}))
    comparison.measure(20)
    for gibibytes in (1, 4):
        size = context.size(gibibytes * 2**28, 4096)
        comparison.rate(f"{gibibytes} GiB", 8 * size, "B/s")
    yield comparison.entry()


def copies(context: Context, size: int) -> Timed:
    """Copies of `size` floats, read and written; checked on poisoned targets."""
    sources = [context.random((size,), seed) for seed in (1, 2)]
    targets = [torch.full_like(source, torch.nan) for source in sources]

    def run() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    run()
    if not all(torch.equal(s, t) for s, t in zip(sources, targets, strict=True)):
        raise AssertionError("copy: the target differs from the source")
    return Timed(run, steps=2)


def launch(context: Context) -> Entries:
    """The least that a kernel costs: a multiplication of 32 numbers."""
    count = context.size(LAUNCHES, 5)
    x = context.random((32,), 1)

    def several() -> None:
        for _ in range(count):
            x.mul_(1.0)

    replay = captured(several, context)
    comparison = Comparison(
        context,
        f"{count} times x.mul_(1.0) on 32 numbers: one by one, and as one CUDA graph's nodes; "
        "per kernel",
    )
    comparison.add("eager", lambda: (Timed(several, count), {}))
    comparison.add("in a CUDA graph", lambda: (Timed(replay, count), {}))
    single = captured(lambda: x.mul_(1.0), context)
    comparison.add("graphs of one kernel", lambda: (Timed(_again(single, count), count), {}))
    comparison.measure(20)
    comparison.note("eager", host_seconds=_host_seconds(context, several, count))
    yield comparison.entry()


def _again(run: Callable[[], object], count: int) -> Callable[[], None]:
    def again() -> None:
        for _ in range(count):
            run()

    return again


def _host_seconds(context: Context, run: Callable[[], object], count: int) -> float:
    """What the processor spends on one launch, waiting for the GPU not included."""
    context.synchronize()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    context.synchronize()
    return seconds / count


def randn(context: Context) -> Entries:
    """torch's normals into a tensor that is there."""
    comparison = Comparison(context, "x.normal_(); 64 M exceeds L2, 64×3×32×32 does not; per fill")
    sizes = {"64 M": context.size(2**26, 4096), "64×3×32×32": context.size(196_608, 1024)}
    for label, size in sizes.items():
        x = torch.empty(size, device=context.device)
        times = 4 if label == "64 M" else context.size(100, 2)
        run = captured(_again(x.normal_, times), context)
        comparison.add(label, lambda run=run, times=times: (Timed(run, times), {}))
    comparison.measure(20)
    for label, size in sizes.items():
        comparison.rate(label, size, "normals/s")
    yield comparison.entry()
