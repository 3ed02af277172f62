"""What is measured, on how many threads, beside what, and the goals."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.baselines import (
    Compiled,
    Draw,
    EulerMaruyama,
    FixedNoise,
    Langevin,
    NormalScore,
    ReverseDiffusion,
    ScoreSDE,
    Tuned,
    Update,
)
from benchmarks.implementations import Ours, OursOp
from sbm_fast import noise

SCORE_SDE, TUNED, COMPILED, OURS = "score_sde", "tuned", "torch.compile", "ours"
RANDN = "torch.randn"
OP = "ours, op alone"


class Stepper(Protocol):
    """An implementation of a workload."""

    def reset(self, x: Tensor) -> None: ...

    def advance(self, steps: int) -> None: ...

    @property
    def left(self) -> int: ...

    @property
    def x(self) -> Tensor: ...


@dataclass(frozen=True)
class Goal:
    """`baseline` must take at least `goal` times as long as ours; `moonshot` is hoped for."""

    baseline: str
    goal: float
    moonshot: float


@dataclass(frozen=True)
class Case:
    """`run()` is timed and does the workload's number of steps; `prepare()` comes before it."""

    prepare: Callable[[], None]
    run: Callable[[], object]


@dataclass(frozen=True)
class Workload(ABC):
    """One group of implementations that do the same.

    Attributes:
        name: the group.
        threads: of torch while it is measured.
        steps: how many steps (or fills) one timed call does; times are reported per step. Enough
            of them that the call's own start counts as little as in a sampler's loop.
        rounds: timed calls of each implementation.
        goals: for the ratios to OURS.
    """

    name: str
    shape: tuple[int, ...]
    threads: int
    steps: int
    rounds: int
    goals: tuple[Goal, ...]

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """Names of the implementations."""

    @abstractmethod
    def case(self, label: str) -> Case:
        """What is timed for one of them."""

    @abstractmethod
    def check(self) -> dict[str, float]:
        """Errors of every implementation; AssertionError when one is not right."""

    @property
    def title(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        return f"{self.name}, {'×'.join(map(str, self.shape))}, {threads}"


@dataclass(frozen=True)
class Sampling(Workload):
    """Steps of a sampler: Euler–Maruyama, or one corrector and one predictor step."""

    corrector: bool

    @property
    def labels(self) -> tuple[str, ...]:
        common = (SCORE_SDE, TUNED, COMPILED, OURS)
        return common if self.corrector else (*common, OP)

    @cached_property
    def start(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))

    @cached_property
    def network(self) -> torch.nn.Module:
        if self.corrector:
            return NormalScore()
        return FixedNoise(torch.randn(self.shape, generator=torch.Generator().manual_seed(2)))

    def stepper(self, label: str, draw: Draw | None = None) -> Stepper:
        if label == SCORE_SDE:
            updates: list[type[Update]] = [EulerMaruyama]
            if self.corrector:
                updates = [Langevin, ReverseDiffusion]
            return ScoreSDE(self.network, updates, draw)
        if label == TUNED:
            return Tuned(self.network, self.corrector, draw)
        if label == COMPILED:
            return Compiled(self.network, self.corrector, draw)
        if label == OP:
            return OursOp(self.network, self.shape, draw)
        return Ours(self.network, self.corrector, self.shape, draw)

    def case(self, label: str) -> Case:
        stepper = self.stepper(label)

        def prepare() -> None:
            if stepper.left < self.steps:
                stepper.reset(self.start)

        return Case(prepare, lambda: stepper.advance(self.steps))

    def check(self) -> dict[str, float]:
        """Four steps on the same noise against the formula in float64.

        The bound is 16 units of float32 a step, relative to the largest value.
        """
        steps = 4
        source = torch.Generator().manual_seed(3)
        tape = [torch.randn(self.shape, generator=source) for _ in range(2 * steps)]
        exact = self._exact(tape, steps)
        bound = 16 * steps * torch.finfo(torch.float32).eps
        errors = {}
        for label in self.labels:
            stepper = self.stepper(label, _play(tape))
            stepper.reset(self.start)
            stepper.advance(steps)
            error = (stepper.x.double() - exact).abs().max() / exact.abs().max()
            errors[label] = float(error)
            assert errors[label] <= bound, f"{self.title}: {label} is off by {error:.2g}"
        return errors

    def _exact(self, tape: list[Tensor], steps: int) -> Tensor:
        network = self.network
        if isinstance(network, FixedNoise):
            network = FixedNoise(network(self.start, self.start).double())
        stepper = Tuned(network, self.corrector, _play([z.double() for z in tape]), torch.float64)
        stepper.reset(self.start.double())
        stepper.advance(steps)
        return stepper.x


@dataclass(frozen=True)
class Normals(Workload):
    """`noise.normal` against torch.randn: a new tensor of standard normals."""

    @property
    def labels(self) -> tuple[str, ...]:
        return (RANDN, COMPILED, OURS)

    def case(self, label: str) -> Case:
        fill = self._fill(label)

        def run() -> None:
            for draw in range(self.steps):
                fill(draw)

        return Case(lambda: None, run)

    def _fill(self, label: str) -> Callable[[int], Tensor]:
        shape = self.shape
        if label == RANDN:
            return lambda draw: torch.randn(shape)
        if label == COMPILED:
            compiled: Callable[[tuple[int, ...]], Tensor] = torch.compile(
                _randn, fullgraph=True, dynamic=False
            )
            return lambda draw: compiled(shape)
        return lambda draw: noise.normal(0, shape, draw=draw, backend="cpu")

    def check(self) -> dict[str, float]:
        """Ours against the contract's reference; all by two moments, within 6 standard errors."""
        errors = {}
        for label in self.labels:
            z = self._fill(label)(5).double()
            if label == OURS:
                reference = noise.normal(0, self.shape, draw=5, backend="eager")
                errors[label] = float((z - reference).abs().max())
                assert errors[label] <= 4e-6, f"{self.title}: ours is off by {errors[label]:.2g}"
            n = z.numel()
            deviation = max(abs(float(z.mean())) * n**0.5, abs(float(z.var()) - 1) * (n / 2) ** 0.5)
            errors.setdefault(label, deviation)
            assert deviation < 6, f"{self.title}: {label} is no standard normal ({deviation:.2g} σ)"
        return errors


def _randn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def _play(tape: list[Tensor]) -> Draw:
    left = iter(tape)
    return lambda like: next(left)


EM, PC, FILL = "Euler–Maruyama step", "PC iteration", "Gaussian fill"
CIFAR, LARGE, SMALL = (64, 3, 32, 32), (512, 3, 32, 32), (64, 1, 8, 8)

WORKLOADS: tuple[Workload, ...] = (
    Sampling(EM, CIFAR, 2, 20, 25, (Goal(SCORE_SDE, 12, 20), Goal(COMPILED, 20, 40)), False),
    Sampling(EM, LARGE, 2, 4, 11, (Goal(SCORE_SDE, 5, 9),), False),
    Normals(FILL, CIFAR, 1, 8, 31, (Goal(RANDN, 2, 2.8),)),
    Normals(FILL, CIFAR, 2, 8, 31, (Goal(RANDN, 4, 5.5),)),
    Sampling(PC, SMALL, 2, 100, 31, (Goal(SCORE_SDE, 15, 25),), True),
    Sampling(PC, CIFAR, 2, 20, 15, (Goal(SCORE_SDE, 8, 15),), True),
)
