"""GroupNorm with SiLU, bfloat16 channels_last, in the shapes of DDPM++: at batch 256 against the
memory, as one reading and one writing; at batch 1 against launches.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.gpu.checks import Errors
from benchmarks.gpu.comparison import COPY, Comparison
from benchmarks.gpu.context import Case, Context, Entries, Shape
from benchmarks.gpu.machine import copies
from benchmarks.gpu.timing import Timed, captured, flush_buffer
from benchmarks.workloads import COMPILED, Goal
from sbm_fast.nn import functional
from sbm_fast.ops.group_norm_silu import group_norm_silu_

EAGER, TUNED, GRAPH = "eager", f"{COMPILED}, max-autotune", ", in a CUDA graph"
OP, OURS = "op alone", "ours"
BATCH = 256
IMAGES = ((128, 32), (256, 16), (256, 8))
"""Channels and side."""
ROTATED = 256 * 2**20
"""Bytes of inputs taken in turn, several times an L2."""
SHARE = Goal(COPY, 0.75, 0.88)
GOALS = (Goal(EAGER, 4, 7), Goal(COMPILED, 1.3, 1.8))
GOALS_ALONE = (Goal(EAGER + GRAPH, 1, 2), Goal(EAGER, 6, 12))
GROUPS, EPS = 32, 1e-6


def cases(context: Context) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for film in (False, True):
        for channels, side in IMAGES if not film else IMAGES[:1]:
            name = f"{BATCH}×{channels}×{side}×{side}{', FiLM and pre-add' if film else ''}"
            found[name] = partial(large, channels=channels, side=side, film=film)
    for channels, side in IMAGES:
        found[f"1×{channels}×{side}×{side}"] = partial(small, channels=channels, side=side)
    return found


class Inputs:
    """Some x in turn and what is shared by them; every implementation is a function of x."""

    def __init__(self, context: Context, shape: Shape, count: int, film: bool) -> None:
        self.context = context
        batch, channels = shape[:2]
        last, half = torch.channels_last, torch.bfloat16
        self.xs = [context.random(shape, k, half).to(memory_format=last) for k in range(count)]
        self.weight, self.bias = (context.random((channels,), 50 + k, half) for k in range(2))
        self.given: dict[str, Tensor] = {}
        if film:
            for k, name in enumerate(("scale", "shift", "add")):
                self.given[name] = context.random((batch, channels), 60 + k, half)

    def fixed(self) -> tuple[int, Tensor, Tensor, float]:
        return GROUPS, self.weight, self.bias, EPS

    @torch.no_grad()
    def eager(self, x: Tensor) -> Tensor:
        return plain.group_norm_silu(x, *self.fixed(), **self.given)

    @torch.no_grad()
    def ours(self, x: Tensor) -> Tensor:
        y = functional.group_norm_silu(x, *self.fixed(), **self.given)
        assert isinstance(y, Tensor) and y.stride() == x.stride()  # eager's may be NCHW
        return y

    def op(self) -> Callable[[Tensor], Tensor]:
        """The kernel into outputs that are there."""
        x = self.xs[0]
        outs = [torch.full_like(x, torch.nan) for _ in self.xs]
        stats = torch.empty(len(x), GROUPS, 2, device=x.device)
        rows = (self.given.get("scale"), self.given.get("shift"), self.given.get("add"))
        turn = 0

        def run(x: Tensor) -> Tensor:
            nonlocal turn
            turn += 1
            out = outs[turn % len(outs)]
            group_norm_silu_(
                out, None, stats, x, self.weight, self.bias, *rows, None, GROUPS, EPS, 1.0, True
            )
            return out

        return run

    def case(
        self, function: Callable[[Tensor], Tensor], rounds: int = 1, graph: bool = False
    ) -> tuple[Timed, Errors]:
        """All x one after the other, once the function is seen to be right."""
        errors = self.hold(function)

        def run() -> None:
            for _ in range(rounds):
                # Held until all are there, so that none is written where the last one lies in L2.
                outs = [function(x) for x in self.xs]
                del outs

        made = captured(run, self.context) if graph else run
        return Timed(made, rounds * len(self.xs)), errors

    def hold(self, function: Callable[[Tensor], Tensor], samples: int = 4) -> Errors:
        """The first and last samples against float64, to twice eager's error and one rounding; all
        of it finite."""
        x = self.xs[-1]
        out = function(x)
        assert bool(out.isfinite().all()), "not all of the output is finite"
        eager, errors = self.eager(x), {"relative": 0.0, "eager's": 0.0}
        for part in (slice(0, samples), slice(-samples, None)):
            given = {name: value[part].double() for name, value in self.given.items()}
            weight, bias = self.weight.double(), self.bias.double()
            exact = plain.group_norm_silu(
                x[part].double().contiguous(), GROUPS, weight, bias, EPS, **given
            )
            for name, value in (("relative", out), ("eager's", eager)):
                errors[name] = max(errors[name], plain.relative(value[part], exact))
        bound = 2 * errors["eager's"] + torch.finfo(x.dtype).eps
        assert errors["relative"] <= bound, errors
        return errors


def compiled(inputs: Inputs, mode: str) -> Callable[[Tensor], Tensor]:
    """As eager; without cudagraphs of its own, whose inputs would be copied."""
    if inputs.context.on_gpu:
        torch._dynamo.reset()
    chosen = {} if mode == COMPILED else {"mode": "max-autotune-no-cudagraphs"}
    function: Callable[[Tensor], Tensor] = torch.compile(
        inputs.eager, fullgraph=True, dynamic=False, **chosen
    )
    return function


def large(context: Context, channels: int, side: int, film: bool) -> Entries:
    shape = context.size((BATCH, channels, side, side), (2, 32, 4, 4))
    elements = torch.Size(shape).numel()
    count = context.size(max(3, ROTATED // (2 * elements)), 2)
    inputs = Inputs(context, shape, count, film)
    comparison = Comparison(
        context,
        f"events; a buffer of 512 MiB written before each timed call; {count} inputs and outputs "
        "in turn, as one CUDA graph, so that no launch is waited for; 4 bytes an element count",
        name="GroupNorm + SiLU, bfloat16 channels_last" + (", FiLM and pre-add" if film else ""),
        shape=shape,
        bytes_per_element=4,
    )
    comparison.add(COPY, lambda: (copies(context, context.size(2**28, 4096)), {}))
    comparison.add(OP, lambda: inputs.case(inputs.op(), graph=True))
    comparison.add(OURS, lambda: inputs.case(inputs.ours, graph=True))
    comparison.add(EAGER, lambda: inputs.case(inputs.eager, graph=True))
    flush = flush_buffer(context)
    for mode in ("", COMPILED, TUNED):
        if mode:
            comparison.add(mode, lambda mode=mode: inputs.case(compiled(inputs, mode), graph=True))
        comparison.measure(20, flush, seconds=4.0)
        comparison.ratios([OP, OURS], GOALS)
        share_of_copy(comparison, 4 * elements)
        yield comparison.entry()


def share_of_copy(comparison: Comparison, amount: int) -> None:
    for label in (OP, OURS):
        comparison.miss(label, COPY)
    bandwidth = comparison.rate(COPY, 8 * comparison.context.size(2**28, 4096), "B/s")
    for label in (OP, OURS):
        rate = comparison.rate(label, amount, "B/s")
        if rate / bandwidth > 0:
            comparison.fraction(label, rate / bandwidth, SHARE)


def small(context: Context, channels: int, side: int) -> Entries:
    shape = context.size((1, channels, side, side), (1, 32, 4, 4))
    inputs, rounds = Inputs(context, shape, 1, film=False), context.size(20, 1)
    comparison = Comparison(
        context,
        f"events; warm L2; {rounds} calls one after the other, with all waiting for launches, or "
        "as one CUDA graph",
        name="GroupNorm + SiLU, bfloat16 channels_last",
        shape=shape,
    )
    for mode in ("", COMPILED, TUNED):
        functions = {mode: partial(compiled, inputs, mode)}
        if not mode:
            functions = {OURS: lambda: inputs.ours, EAGER: lambda: inputs.eager}
        for label, make in functions.items():
            function = make()
            for graph in (False, True):
                case = partial(inputs.case, function, rounds, graph)
                comparison.add(label + (GRAPH if graph else ""), case)
        comparison.measure(20, seconds=2.0)
        comparison.ratios([OURS, OURS + GRAPH], GOALS_ALONE, judged=[OURS + GRAPH])
        yield comparison.entry()
