"""Solvers for du/dt = f(t, u) over independent samples, each at its own time.

Every sample has its own time, step size, error and acceptance, so its result does not depend on
its neighbours. The stages are rows of the affine step (`sbm_fast.stages`), the error norm is the
reduction `error_norm_`. Nothing is read back but, every few steps, which samples are done: their
places go to samples that wait, and when none waits they are closed up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sbm_fast.backend import Kernels
from sbm_fast.ops._row import per_sample
from sbm_fast.runge_kutta import Tableau
from sbm_fast.stages import Growth, Pool, Stages, System

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
FIRST_STEP = 0.01
"""The first step, as a share of the interval."""
LOST = 1e-9
"""A step this small, as a share of the interval, at which the slopes are still not finite."""


@dataclass(frozen=True, eq=False)
class Solution:
    """u [N, …] at the end of the interval, or where a sample was left (`finished` False).

    integrals float64 [Q, N], nfe int64 [N] evaluations of the slope, finished bool [N].
    """

    u: Tensor
    integrals: Tensor
    nfe: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, u: Tensor, columns: int) -> Solution:
        count = len(u)
        return cls(
            torch.empty_like(u, memory_format=torch.contiguous_format),
            u.new_zeros((columns, count), dtype=torch.float64),
            u.new_zeros(count, dtype=torch.int64),
            u.new_zeros(count, dtype=torch.bool),
        )

    def put(self, pool: Pool, which: Tensor, finished: Tensor) -> None:
        """Takes over the samples at these places of the pool."""
        samples = pool.samples[which]
        self.u[samples] = pool.registers[0, which]
        self.integrals[:, samples] = pool.integrals[:, which]
        self.nfe[samples] = pool.nfe[which]
        self.finished[samples] = finished[which]


def solve_fixed(
    system: System,
    u: Tensor,
    grid: list[float],
    *,
    tableau: Tableau,
    kernels: Kernels,
    batch_size: int | None = None,
    progress: bool = False,
) -> Solution:
    """All samples over one grid of times, `batch_size` at a time; the error is not looked at.

    Raises: ValueError with the system's message where a state or an integral is not finite.
    """
    solution, stages = Solution.empty(u, system.columns), Stages(system, tableau, kernels, u)
    batch = max(1, min(batch_size or len(u), len(u)))
    with tqdm(total=len(u), unit="sample", disable=not progress, dynamic_ncols=True) as bar:
        for samples in torch.arange(len(u), device=u.device).split(batch):
            system.select(samples)
            pool = Pool.of(system, u, samples, grid[0], 0.0, tableau.stages)
            pool.nfe.fill_(int(tableau.first_same_as_last))
            good = pool.active
            for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
                # Where a sample is lost, its time and count stay those of that step.
                pool.t.copy_(torch.where(good, t, pool.t))
                pool.nfe.add_(good * stages.evaluations)
                if i == 0 or not tableau.first_same_as_last:
                    stages.begin(pool)
                pool.h.fill_(t_next - t)
                growth = stages.step(pool, pool.h)
                pool.integrals.add_(growth.integrals)
                pool.registers[0].copy_(pool.u)
                if tableau.first_same_as_last:
                    pool.registers[1].copy_(pool.registers[-1])
                    pool.first.copy_(growth.last)
                good = _finite(pool.u, pool.integrals)
            if not good.all():
                bad = torch.nonzero(~good).flatten()
                raise ValueError(system.not_finite(samples[bad], pool.t[bad], pool.nfe[bad]))
            solution.put(pool, torch.arange(len(samples), device=u.device), pool.active)
            bar.update(len(samples))
    return solution


def _finite(state: Tensor, integrals: Tensor) -> Tensor:
    """Whether both are finite, bool [B]."""
    flat = torch.isfinite(state).reshape(len(state), math.prod(state.shape[1:]))
    return flat.all(1) & torch.isfinite(integrals).all(0)


@dataclass(frozen=True)
class Tolerance:
    """When a step is accepted, and when a sample is given up."""

    rtol: float
    atol: float
    max_nfe: int


class Adaptive:
    """Steps whose size follows each sample's own error (PI control, Gustafsson 1991).

        h' = h · clip(0.9 e^(−0.7/p) e_before^(0.4/p), 0.2, 10),   p the order,   accepted if e ≤ 1

    and after a rejection h' = h · clip(0.9 e^(−1/p), 0.2, 1).
    """

    def __init__(
        self,
        system: System,
        u: Tensor,
        interval: tuple[float, float],
        *,
        tableau: Tableau,
        tolerance: Tolerance,
        kernels: Kernels,
        batch_size: int | None = None,
    ) -> None:
        self._system, self._u, (self._begin, self._end) = system, u, interval
        self._span, self._limits = abs(self._end - self._begin), tolerance
        self._stages, self._tableau = Stages(system, tableau, kernels, u), tableau
        self._solution = Solution.empty(u, system.columns)
        self._batch = max(1, min(batch_size or len(u), len(u)))
        # A look costs a GPU its queue, and a small batch as much as a large one; on a CPU a look is
        # free, and an empty place costs more than newcomers that begin alone.
        on_cpu = u.device.type == "cpu"
        self._steps_between_looks = 1 if on_cpu else 4
        self._fewest_newcomers = 1 if on_cpu else max(1, self._batch // 8)
        self._waiting = torch.arange(len(u), device=u.device)

    def solve(self, progress: bool = False) -> Solution:
        """Every sample to the end of the interval, or to `max_nfe`.

        Raises: ValueError with the system's message where slopes are not finite however small the
        step.
        """
        if len(self._u) == 0:
            return self._solution
        pool = self._newcomers(self._batch)
        with tqdm(
            total=len(self._u), unit="sample", disable=not progress, dynamic_ncols=True
        ) as bar:
            while len(pool.samples):
                for _ in range(self._steps_between_looks):
                    self._step(pool)
                pool = self._renew(pool, bar.update)
        return self._solution

    def _newcomers(self, count: int) -> Pool:
        samples, self._waiting = self._waiting[:count], self._waiting[count:]
        h = FIRST_STEP * (self._end - self._begin)
        pool = Pool.of(self._system, self._u, samples, self._begin, h, self._tableau.stages)
        self._system.select(samples)
        self._stages.begin(pool)
        pool.nfe.add_(1)
        bad = torch.nonzero(~_finite(pool.registers[1], pool.first)).flatten()
        if len(bad):  # no smaller step helps
            message = self._system.not_finite(pool.samples[bad], pool.t[bad], pool.nfe[bad])
            raise ValueError(message)
        if 1 + self._stages.evaluations > self._limits.max_nfe:
            pool.active.fill_(False)
        return pool

    def _step(self, pool: Pool) -> None:
        p, limits = pool, self._limits
        left = self._end - p.t
        last_step = p.h.abs() >= left.abs()
        # Who is done stands still, and keeps the h that says whether he was lost.
        h = torch.where(p.active, torch.where(last_step, left, p.h), 0.0)
        growth = self._stages.step(p, h)
        error = self._error(p, h, growth)
        accepted = p.active & (error <= 1)

        wide = per_sample(accepted, p.u)
        p.registers[0].copy_(torch.where(wide, p.u, p.registers[0]))
        p.registers[1].copy_(torch.where(wide, p.registers[-1], p.registers[1]))
        p.first.copy_(torch.where(accepted, growth.last, p.first))
        p.integrals.add_(torch.where(accepted, growth.integrals, 0.0))
        p.t.copy_(torch.where(accepted, torch.where(last_step, self._end, p.t + h), p.t))
        p.nfe.add_(p.active * self._stages.evaluations)

        spent = p.nfe + self._stages.evaluations > limits.max_nfe
        lost = p.active & ~torch.isfinite(error) & (h.abs() <= LOST * self._span)
        following = torch.where(p.active, h * self._factor(error, p.error, accepted), p.h)
        p.h.copy_(torch.where(lost, torch.nan, following))
        p.error.copy_(torch.where(accepted, error.clamp_min(1e-4), p.error))
        p.active.logical_and_(~(accepted & last_step) & ~spent & ~lost)

    def _error(self, pool: Pool, h: Tensor, growth: Growth) -> Tensor:
        """The error norm of a step, float64 [B]; not finite where the step can't be used.

        The root mean square over the components of u and, where there are integrals, one more: the
        error of what steers for them over atol + rtol d, because integrals are sums over the d
        components.
        """
        limits, d = self._limits, math.prod(pool.u.shape[1:])
        error = self._stages.error_norm(pool, h, limits.atol, limits.rtol)
        if self._system.columns == 0:
            return error
        along = growth.error / (limits.atol + limits.rtol * d)
        error = torch.sqrt((d * error**2 + along**2) / (d + 1))
        return torch.where(torch.isfinite(growth.integrals).all(0), error, torch.inf)

    def _factor(self, error: Tensor, before: Tensor, accepted: Tensor) -> Tensor:
        p = self._tableau.order
        log_e = torch.log(error.clamp(1e-10, 1e10))
        proportional = SAFETY * torch.exp(-0.7 / p * log_e + 0.4 / p * torch.log(before))
        rejected = (SAFETY * torch.exp(-1 / p * log_e)).clamp_max(1.0)
        factor = torch.where(accepted, proportional, rejected).nan_to_num(SHRINK)
        # On a coarse grid, so that another rounding of exp in another batch leaves no trace.
        return (factor.clamp(SHRINK, GROW) * 1024).round() / 1024

    def _renew(self, pool: Pool, report: Callable[[int], Any]) -> Pool:
        """Hands over what is done; others take its places."""
        done = torch.nonzero(~pool.active).flatten()
        waiting = len(self._waiting)
        if len(done) < (self._fewest_newcomers if waiting else 1):
            return pool
        lost = done[pool.h[done].isnan()]
        if len(lost):
            message = self._system.not_finite(pool.samples[lost], pool.t[lost], pool.nfe[lost])
            raise ValueError(message)
        self._solution.put(pool, done, pool.t == self._end)
        report(len(done))
        if waiting:
            new = self._newcomers(len(done))
            pool.put(done[: len(new.samples)], new)
            done = done[len(new.samples) :]
        if len(done):
            stays = torch.ones_like(pool.active)
            stays[done] = False
            pool = pool.keep(torch.nonzero(stays).flatten())
        if len(pool.samples):
            self._system.select(pool.samples)
        return pool


class _Slope:
    """The slopes of a batch as torchdiffeq asks for them."""

    def __init__(
        self, system: System, samples: Tensor, interval: tuple[float, float], max_nfe: int
    ) -> None:
        self._system, self._samples, self._max_nfe = system, samples, max_nfe
        # It looks beyond the end, in search of its first step as far as it likes.
        span = abs(interval[1] - interval[0])
        self._reach = min(interval) - span, max(interval) + span
        self._t = torch.empty(0)
        self.calls = 0

    def __call__(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.calls == self._max_nfe:
            raise ValueError(
                f"max_nfe: torchdiffeq needs more than {self._max_nfe} evaluations, and has no "
                "state to give before the end"
            )
        self.calls += 1
        now, out = y[0], torch.empty_like(y[0])
        self._t = t.double().clamp(*self._reach).expand(len(now))
        at = self._system.at(self._t)
        inputs = (per_sample(at.c_in, now) * now).to(self._system.net_dtype)
        growth = self._system.slope(at, now, inputs, out, self._system.columns > 0)
        integrands = torch.zeros_like(y[1]) if growth is None else growth.to(now.dtype)
        self.check(out, integrands)  # no step of torchdiffeq comes back from what is not finite
        return out, integrands

    def check(self, state: Tensor, integrals: Tensor) -> None:
        """ValueError with the system's message unless both are finite."""
        bad = torch.nonzero(~_finite(state, integrals)).flatten()
        if len(bad):
            nfe = torch.full_like(bad, self.calls)
            raise ValueError(self._system.not_finite(self._samples[bad], self._t[bad], nfe))


def solve_torchdiffeq(
    system: System,
    u: Tensor,
    interval: tuple[float, float],
    *,
    method: str,
    tolerance: Tolerance,
    batch_size: int | None = None,
) -> Solution:
    """torchdiffeq's solver of that name: one step size and one error norm (integrals included) for
    the samples of a batch, state and integrals in the state's dtype. For cross-checks.

    Raises: ModuleNotFoundError without torchdiffeq; ValueError naming `solver` for an unknown
    method or a step that underflows, naming `max_nfe` where it is not enough (nothing partial is to
    be had), and with the system's message where the result is not finite.
    """
    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "solver: torchdiffeq is not installed here: pip install torchdiffeq"
        ) from error
    solution = Solution.empty(u, system.columns)
    if len(u) == 0:
        return solution
    times = torch.tensor(interval, dtype=torch.float64, device=u.device)
    for samples in torch.arange(len(u), device=u.device).split(max(1, batch_size or len(u))):
        system.select(samples)
        slope = _Slope(system, samples, interval, tolerance.max_nfe)
        start = (u[samples], u.new_zeros(system.columns, len(samples)))
        try:
            end, growth = odeint(
                slope, start, times, method=method, rtol=tolerance.rtol, atol=tolerance.atol
            )
        except (ValueError, AssertionError) as error:
            if isinstance(error, ValueError) and "Invalid method" not in str(error):
                raise
            raise ValueError(f"solver: torchdiffeq says: {error}") from error
        slope.check(end[-1], growth[-1])
        solution.u[samples], solution.integrals[:, samples] = end[-1], growth[-1].double()
        solution.nfe[samples], solution.finished[samples] = slope.calls, True
    return solution
