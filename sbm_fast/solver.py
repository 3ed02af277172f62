"""Which solver carries samples along the probability flow, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sbm_fast.backend import Kernels
from sbm_fast.flow import FlowSystem
from sbm_fast.ode import Adaptive, Solution, Tolerance, solve_fixed, solve_torchdiffeq
from sbm_fast.process import count, finite
from sbm_fast.runge_kutta import DOPRI5, FIXED, PEER, TABLEAUS, is_adaptive

STEPS = 50
"""Of a fixed grid, by default."""


@dataclass(frozen=True)
class Solver:
    """A solver and its options.

    Args:
        name: "dopri5" (adaptive; every sample has its own steps), "euler", "heun" or "rk4" (a
            fixed grid), or "torchdiffeq:<method>" (for cross-checks).
        steps, schedule: of a fixed grid: number of steps (default 50), equal in ln(σ/m) or those
            of `sbm_fast.schedule.time_grid`, from t_max to t_min.
        rtol, atol: an adaptive step is accepted when the root mean square over the sample of
            error/(atol + rtol |u|) is at most 1, u being the state in units of its own standard
            deviation. The log-density of an exact trace is one component more; an estimated one is
            not, so that states and steps do not depend on the probes (a known integrand of the
            same size stands in for it).
        max_nfe: evaluations at which "dopri5" leaves a sample where it is; with torchdiffeq, which
            has nothing partial to give, more are an error.
        batch_size: samples at a time; None: all.
        progress: show a progress bar.

    Raises: ValueError, TypeError naming the argument.
    """

    name: str = DOPRI5.name
    steps: int | None = None
    schedule: Any = None
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000
    batch_size: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        known = (*TABLEAUS, f"{PEER}<method>")
        if not isinstance(self.name, str) or not (self.name in TABLEAUS or is_adaptive(self.name)):
            raise ValueError(f"solver: expected one of {known}, got {self.name!r}")
        for name in ("rtol", "atol"):
            finite(name, getattr(self, name), above=0)
        count("max_nfe", self.max_nfe)
        if self.batch_size is not None:
            count("batch_size", self.batch_size)
        for name in ("steps", "schedule"):
            if self.name not in FIXED and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: solver {self.name!r} chooses its own steps; expected None, or a "
                    f"solver of {FIXED}"
                )
        if self.steps is not None:
            count("steps", self.steps)

    def carry(
        self, system: FlowSystem, x: Tensor, kernels: Kernels, *, to_prior: bool = True
    ) -> Solution:
        """Samples x [N, …] from one end of the flow to the other; `u` of the result is x there.

        Raises: ValueError naming the model where its outputs are not finite.
        """
        flow = system.flow
        begin, end = (flow.data, flow.prior) if to_prior else (flow.prior, flow.data)
        u = x / begin.scale
        interval = (begin.position, end.position)
        tolerance = Tolerance(self.rtol, self.atol, self.max_nfe)
        if self.name.startswith(PEER):
            method = self.name.removeprefix(PEER)
            solution = solve_torchdiffeq(
                system, u, interval, method=method, tolerance=tolerance, batch_size=self.batch_size
            )
        elif self.name in FIXED:
            grid = flow.grid(self.steps, self.schedule, STEPS)
            solution = solve_fixed(
                system,
                u,
                grid if to_prior else grid[::-1],
                tableau=TABLEAUS[self.name],
                kernels=kernels,
                batch_size=self.batch_size,
                progress=self.progress,
            )
        else:
            solution = Adaptive(
                system,
                u,
                interval,
                tableau=DOPRI5,
                tolerance=tolerance,
                kernels=kernels,
                batch_size=self.batch_size,
            ).solve(self.progress)
        solution.u.mul_(end.scale)
        return solution
