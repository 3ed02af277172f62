"""What a network costs: the rates under it, and DDPM++'s forward, ours beside plain torch's.

Ours: bfloat16, channels_last, fused normalisations, the time's projections from a table, as a CUDA
graph. cudnn.benchmark is on for all; TF32 is as torch has it by default (on for convolutions, off
for products).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.checks import Errors
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.context import Case, Context, Entries, Entry
from benchmarks.gpu.timing import Timed, captured
from benchmarks.plain import half, plain, relative
from benchmarks.workloads import Goal
from sbm_fast.nn.network import Network

BATCHES = (256, 16, 1)
PRESET = "ddpmpp_cifar10"
TINY = {"channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
OURS, PLAIN32, PLAIN16 = "ours, CUDA graph", "eager, float32", "eager, bfloat16"
GOALS = (Goal(PLAIN32, 2.5, 4), Goal(PLAIN16, 1.5, 2))
CONVOLUTIONS = ((128, 32), (256, 16))
"""Channels and side of DDPM++'s two dearest kinds."""
NETWORK_BOUND = 0.05
"""Relative error of a bfloat16 forward against float32."""


def cases(context: Context) -> dict[str, Case]:
    torch.backends.cudnn.benchmark = True
    rates: dict[str, Case] = {"matrix product 8192³": matrix_product, "conv 3×3": convolutions}
    return rates | {f"DDPM++, batch {b}": partial(forward, batch=b) for b in BATCHES}


def matrix_product(context: Context) -> Entries:
    side = context.size(8192, 64)
    a, b = (context.random((side, side), seed, torch.bfloat16) for seed in (1, 2))
    out = torch.full_like(a, torch.nan)
    comparison = Comparison(context, "events; bfloat16, random normals; torch.mm into a tensor")

    def make() -> tuple[Timed, Errors]:
        torch.mm(a, b, out=out)
        part = slice(-64, None)
        reference = a[part].double() @ b.double()
        errors = {"relative": relative(out[part], reference)}
        assert errors["relative"] < 0.01 and bool(out.isfinite().all()), errors
        return Timed(lambda: torch.mm(a, b, out=out)), errors

    comparison.add("bfloat16", make)
    comparison.measure(20)
    comparison.rate("bfloat16", 2.0 * side**3, "FLOP/s")
    yield comparison.entry()


def convolutions(context: Context) -> Entries:
    batch = context.size(256, 1)
    comparison = Comparison(
        context, f"events; bfloat16 channels_last, batch {batch}, 10 in turn; random normals"
    )
    flop = {}
    for channels, side in CONVOLUTIONS:
        label = f"{channels} channels, {side}×{side}"
        flop[label] = 2.0 * 9 * channels**2 * side**2 * batch
        comparison.add(label, partial(convolution, context, channels, side, batch))
    comparison.measure(20)
    for label, amount in flop.items():
        if label in comparison.summaries:
            comparison.rate(label, amount, "FLOP/s")
    yield comparison.entry()


def convolution(context: Context, channels: int, side: int, batch: int) -> tuple[Timed, Errors]:
    last = torch.channels_last
    x = context.random((batch, channels, side, side), 1, torch.bfloat16).to(memory_format=last)
    weight = context.random((channels, channels, 3, 3), 2, torch.bfloat16) / (3 * channels**0.5)
    weight = weight.to(memory_format=last)

    def run() -> None:
        for _ in range(context.size(10, 1)):
            nn.functional.conv2d(x, weight, padding=1)

    with torch.no_grad():
        out = nn.functional.conv2d(x[-1:], weight, padding=1)
        reference = nn.functional.conv2d(x[-1:].double(), weight.double(), padding=1)
    errors = {"relative": relative(out, reference)}
    assert errors["relative"] < 0.01, errors
    return Timed(run, context.size(10, 1)), errors


def ddpmpp(context: Context) -> Network:
    """Random weights; those that a new network has at zero are made random too."""
    torch.manual_seed(0)
    with context.device:
        network = Network.from_preset(PRESET, **context.size({}, TINY)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network.requires_grad_(False)


class Forward:
    """A batch and the networks that see it, with plain torch's output in float32 as the reference.

    All samples are at one row of ours' table; the others compute their time's embedding.
    """

    def __init__(self, context: Context, batch: int) -> None:
        self.context = context
        x = context.random((context.size(batch, 1), 3, 32, 32), 3)
        self.x = x.to(memory_format=torch.channels_last)
        self.labels = torch.linspace(1, 999, 8, device=context.device)
        self.time = self.labels[3].expand(len(x)).contiguous()
        self.row = torch.full((len(x),), 3, dtype=torch.int32, device=context.device)
        self.network = ddpmpp(context)
        self.full = plain(self.network)
        self.half = half(self.full)
        with torch.no_grad():
            self.exact = self.full(self.x, self.time)
        self.flop = self.count() if context.on_gpu else 1.0  # the counter's imports take seconds

    def count(self) -> float:
        """Floating-point operations of one forward."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.full(self.x, self.time)
        return float(counter.get_total_flops())

    def ours(self, graph: bool) -> tuple[Timed, Errors]:
        prepared = half(self.network).prepare(self.labels)
        return self.case(lambda x, time: prepared(x, self.row), torch.bfloat16, graph)

    def case(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype,
        graph: bool = False,
    ) -> tuple[Timed, Errors]:
        """The forward of `network` on the batch in `dtype`, once it gives what float32 gives."""
        x, times = self.x.to(dtype), self.context.size(3, 1)

        @torch.no_grad()
        def once() -> Tensor:
            return network(x, self.time)

        def run() -> None:
            for _ in range(times):
                once()

        errors = {"relative to float32": relative(once(), self.exact)}
        assert errors["relative to float32"] <= NETWORK_BOUND, errors
        return Timed(captured(run, self.context) if graph else run, times), errors

    def entry(self, comparison: Comparison) -> Entry:
        for label in comparison.summaries:
            comparison.rate(label, self.flop, "FLOP/s")
            per_image = comparison.summaries[label].median / len(self.x)
            comparison.note(label, seconds_per_image=per_image)
        return comparison.entry()

    def comparison(self, method: str) -> Comparison:
        return Comparison(
            self.context,
            method,
            name="DDPM++ forward",
            shape=tuple(self.x.shape),
            parameters=self.network.num_parameters(),
            flop=self.flop,
        )


def forward(context: Context, batch: int) -> Entries:
    case = Forward(context, batch)
    comparison = case.comparison(
        "events; channels_last, random weights, cudnn.benchmark; 3 forwards in turn, per forward"
    )
    comparison.add(OURS, lambda: case.ours(graph=True))
    comparison.add("ours", lambda: case.ours(graph=False))
    comparison.add(PLAIN16, lambda: case.case(case.half, torch.bfloat16))
    comparison.add(PLAIN32, lambda: case.case(case.full, torch.float32))
    graph = f"{PLAIN16}, CUDA graph"
    comparison.add(graph, lambda: case.case(case.half, torch.bfloat16, graph=True))
    comparison.measure(15, seconds=5.0)
    comparison.ratios([OURS, "ours"], GOALS, judged=[OURS])
    yield case.entry(comparison)
