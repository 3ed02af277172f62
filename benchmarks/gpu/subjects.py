"""Ours on each backend, as it is measured: a sampler's loop, its captured call, the op alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import sbm_fast
from benchmarks.baselines import STEPS
from benchmarks.gpu.context import Context, Shape
from benchmarks.gpu.timing import Timed
from benchmarks.implementations import options, score_model
from sbm_fast.backend import choose_backend
from sbm_fast.doctor import backends
from sbm_fast.methods import make_plan
from sbm_fast.plan import Plan
from sbm_fast.run import Run
from sbm_fast.sampler import Sampler


def ours(context: Context) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends that work here, the best first, and why others don't."""
    off = backends()
    if context.dry_run:
        return ("eager" if off["cpu"] else "cpu",), {}
    wanted = ("cuda", "triton")
    return tuple(b for b in wanted if not off[b]), {b: off[b] for b in wanted if off[b]}


def make_sampler(
    context: Context,
    backend: str,
    network: nn.Module,
    shape: Shape,
    *,
    corrector: bool,
    graph: bool = False,
    steps: int | None = None,
    **changes: Any,
) -> Sampler:
    """A public sampler of score_sde's plan of 1000 steps, or of as many as are asked for.

    `changes` replace options of the method. In a dry run nothing is captured.
    """
    steps = context.size(STEPS, 21) if steps is None else steps
    return Sampler(
        score_model(network),
        sbm_fast.VPSDE(),
        shape,
        backend=backend,
        device=context.device,
        cuda_graph=graph and context.on_gpu,
        **(options(corrector, steps) | changes),  # type: ignore[arg-type]
    )


def whole_call(sampler: Sampler, iterations: int) -> Timed:
    """`sampler(seed=…)` from the seed to the samples, everything but the first call's capture."""
    return Timed(lambda: sampler(seed=0), steps=iterations)


@dataclass
class Loop:
    """Rows of a sampler's `Run` one by one, with everything that a user's loop pays."""

    sampler: Sampler
    start: Tensor
    rows_per_step: int
    run: Run | None = field(default=None, init=False)

    def reset(self) -> None:
        self.run = self.sampler.start(seed=0, x_init=self.start)
        self.run.advance(int(self.run.plan.evaluates.argmax()))

    @property
    def left(self) -> int:
        return 0 if self.run is None else (self.run.plan.rows - self.run.row) // self.rows_per_step

    def timed(self, steps: int) -> Timed:
        def prepare() -> None:
            if self.left < steps:
                self.reset()

        def run() -> None:
            assert self.run is not None
            self.run.advance(steps * self.rows_per_step)

        return Timed(run, steps, prepare)


class Op:
    """`affine_step_` alone, Euler–Maruyama's rows, on a state and a network output that are given.

    `numbers` are the global numbers of the samples, which give them their noise.
    """

    def __init__(self, backend: str, x: Tensor, out: Tensor, first_sample: int = 0) -> None:
        self.step: Callable[..., None] = choose_backend(backend, x.device).affine_step_
        self.plan = _plan()
        self.first = int(self.plan.evaluates.argmax())
        self.coef, self.field = self.plan.pack(torch.float32, x.device)
        batch, device = len(x), x.device
        numbers = torch.arange(self.plan.rows, dtype=torch.int32, device=device)
        self.rows = numbers[:, None].expand(-1, batch).contiguous().unbind(0)
        self.keys = sbm_fast.noise.keys(0, batch, first_sample, device)
        self.time = torch.zeros(batch, device=device)
        self.bad = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self.sets = [(x, out)]
        self.i = self.first

    def rotate(self, *sets: tuple[Tensor, Tensor]) -> "Op":
        """Further states and outputs, taken in turn, so that none is found in a cache."""
        self.sets += sets
        return self

    def advance(self, steps: int) -> None:
        for row in self.rows[self.i : self.i + steps]:
            x, out = self.sets[self.i % len(self.sets)]
            self.step(
                x, out, None, None, None, self.keys, row, self.coef, self.field, None, None,
                None, self.time, self.bad,
            )  # fmt: skip
            self.i += 1

    def timed(self, steps: int) -> Timed:
        def prepare() -> None:
            if self.plan.rows - self.i < steps:
                self.i = self.first

        return Timed(lambda: self.advance(steps), steps, prepare)


@cache
def _plan() -> Plan:
    arguments: dict[str, Any] = {"given_start": True, **options(False)}
    return make_plan(model=score_model(_Eps()), sde=sbm_fast.VPSDE(), **arguments)


class _Eps(nn.Module):
    predicts = "eps"
