"""Normals: `sbm_fast.noise.normal` into a tensor that is there, against `torch.randn`'s kernel."""

from functools import partial

import torch

from benchmarks.gpu.checks import Errors
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.context import Case, Context, Entries, Shape
from benchmarks.gpu.subjects import ours
from benchmarks.gpu.timing import Timed, captured, flush_buffer
from benchmarks.workloads import RANDN
from sbm_fast import noise

LARGE, SMALL = (21_845, 3, 32, 32), (64, 3, 32, 32)
BOUND = 4e-6
"""Two backends, each within 2e-6 of the formula."""
SIGMAS = 8.0


def cases(context: Context) -> dict[str, Case]:
    return {
        "64 M": partial(fills, shape=context.size(LARGE, (5, 3, 8, 8)), graph=False),
        "64×3×32×32": partial(fills, shape=context.size(SMALL, (4, 3, 8, 8)), graph=True),
    }


def fills(context: Context, shape: Shape, graph: bool) -> Entries:
    times = context.size(50 if graph else 4, 2)
    how = f"{times} fills in a CUDA graph, in L2" if graph else "an output larger than L2, flushed"
    comparison = Comparison(context, f"events; {how}; per fill", name="Gaussian fill", shape=shape)
    backends, unavailable = ours(context)
    comparison.unavailable |= unavailable
    for backend in backends:
        comparison.add(backend, partial(our_fill, context, backend, shape, times, graph))
    comparison.add(RANDN, partial(torch_fill, context, shape, times, graph))
    comparison.measure(30, None if graph else flush_buffer(context))
    comparison.ratios(backends)
    for label in comparison.summaries:
        comparison.rate(label, torch.Size(shape).numel(), "normals/s")
    yield comparison.entry()


def our_fill(
    context: Context, backend: str, shape: Shape, times: int, graph: bool
) -> tuple[Timed, Errors]:
    keys = noise.keys(0, shape[0], device=context.device)
    out = torch.full(shape, torch.nan, device=context.device)

    def fill() -> None:
        for draw in range(times):
            noise.normal(None, shape, keys=keys, draw=draw, out=out, backend=backend)

    fill()
    errors = moments(out)
    for part in (slice(0, 4), slice(-4, None)):
        few = keys[part].clone()
        reference = noise.normal(
            None, (len(few), *shape[1:]), keys=few, draw=times - 1, device=context.device,
            backend="eager",
        )  # fmt: skip
        error = float((out[part] - reference).abs().max())
        assert error <= BOUND, f"is off from eager by {error:.3g}, more than {BOUND:g}"
        errors["off from eager"] = max(error, errors.get("off from eager", 0.0))
    return Timed(captured(fill, context) if graph else fill, times), errors


def torch_fill(context: Context, shape: Shape, times: int, graph: bool) -> tuple[Timed, Errors]:
    out = torch.full(shape, torch.nan, device=context.device)

    def fill() -> None:
        for _ in range(times):
            out.normal_()

    fill()
    errors = moments(out)
    return Timed(captured(fill, context) if graph else fill, times), errors


def moments(z: torch.Tensor) -> Errors:
    """Standard errors by which mean and variance are off; AssertionError beyond `SIGMAS`."""
    z = z.double()
    root = z.numel() ** 0.5
    off = max(abs(float(z.mean())) * root, abs(float(z.square().mean()) - 1) * root / 2**0.5)
    assert off <= SIGMAS, f"is no standard normal ({off:.3g} standard errors)"
    return {"standard errors off": off}
