"""The plain implementations of `benchmarks.baselines` as cases, held to the law of their result."""

import copy

from torch import Tensor, nn

from benchmarks.baselines import (
    Compiled,
    EulerMaruyama,
    Langevin,
    ReverseDiffusion,
    ScoreSDE,
    Tuned,
    Update,
)
from benchmarks.gpu.checks import Errors, em_law, hold_to_law, pc_law
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.context import Context
from benchmarks.gpu.timing import Timed, captured
from benchmarks.workloads import COMPILED, SCORE_SDE, TUNED, Stepper

COMPILED_GRAPH = "torch.compile, in a CUDA graph"


class Baselines:
    """One workload's: its network, its first state, and F where the network has a fixed one."""

    def __init__(
        self, context: Context, network: nn.Module, start: Tensor, out: Tensor | None
    ) -> None:
        self.context, self.network, self.start, self.out = context, network, start, out
        self.corrector = out is None

    def add_eager(self, comparison: Comparison, steps: int) -> None:
        updates: list[type[Update]] = [EulerMaruyama]
        if self.corrector:
            updates = [Langevin, ReverseDiffusion]
        comparison.add(SCORE_SDE, lambda: self.case(ScoreSDE(self.network, updates), steps))
        comparison.add(TUNED, lambda: self.case(Tuned(self.network, self.corrector), steps))

    def add_compiled(self, comparison: Comparison, steps: int, graph: bool) -> None:
        """torch.compile's loop; with `graph`, its kernels captured by hand besides."""
        stepper = Compiled(self.network, self.corrector)
        comparison.add(COMPILED, lambda: self.case(stepper, steps))
        if graph:
            comparison.add(COMPILED_GRAPH, lambda: self.captured(copy.copy(stepper), steps))

    def case(self, stepper: Stepper, steps: int) -> tuple[Timed, Errors]:
        stepper.reset(self.start)
        stepper.advance(1)
        errors = self.hold(stepper, 1)

        def prepare() -> None:
            if stepper.left < steps:
                stepper.reset(self.start)

        return Timed(lambda: stepper.advance(steps), steps, prepare), errors

    def captured(self, stepper: Compiled, steps: int) -> tuple[Timed, Errors]:
        """The first `steps` steps as one graph, from the first state every time."""
        stepper.reset(self.start)

        def run() -> None:
            stepper.i = 0
            stepper.advance(steps)

        replay = captured(run, self.context)

        def prepare() -> None:
            stepper.x.copy_(self.start)

        prepare()
        replay()
        return Timed(replay, steps, prepare), self.hold(stepper, steps)

    def hold(self, stepper: Stepper, steps: int) -> Errors:
        square = float(self.start.double().square().mean())
        law = pc_law(steps, square) if self.corrector else em_law(steps)
        return hold_to_law(law, self.start, stepper.x, self.out)
