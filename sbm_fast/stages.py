"""What an ODE solver works on: the system, the samples under way, and a step's stages as rows.

A stage is a row of `affine_step_`, u_j = H_0 + h Σ a_ji H_i over the registers H_0 = u_0 and
H_i = k_i, with coefficients that are made on the device from each sample's own step size h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sbm_fast.backend import Kernels
from sbm_fast.ops._row import per_sample
from sbm_fast.plan import FIELD_LANES, H0, TAIL_LANES
from sbm_fast.runge_kutta import Tableau


@dataclass(frozen=True)
class Instant:
    """What depends on time alone, at times t [..., B]: all float64.

    coef [..., B, 3]: (p, q, r) of `hutchinson_`. c_in, label [..., B]: the network is fed c_in·u
    and the label. steering [..., B]: see `System.integrals_steer`.
    """

    coef: Tensor
    c_in: Tensor
    label: Tensor
    steering: Tensor

    def __getitem__(self, index: int) -> Instant:
        return Instant(self.coef[index], self.c_in[index], self.label[index], self.steering[index])


class System(Protocol):
    """An ODE over N samples, and Q integrals along each trajectory."""

    columns: int
    """Q."""
    net_dtype: torch.dtype
    """Of `inputs`."""
    unscaled: bool
    """Whether c_in is 1 throughout, so that `inputs` may be u itself."""
    integrals_steer: bool
    """Whether the integral is one more component of the error norm. One that depends on chance
    must not be, or u would depend on it too; then `Instant.steering` stands in: for each component
    of u an integrand of the same size and smoothness that is known."""

    def select(self, samples: Tensor) -> None:
        """The samples, int64 [B] numbers among the N, that the next slopes are for."""

    def at(self, t: Tensor) -> Instant:
        """What the slopes at times t, float64 [..., B], need."""

    def slope(
        self, at: Instant, u: Tensor, inputs: Tensor, out: Tensor, integrals: bool
    ) -> Tensor | None:
        """Writes f(t, u) to `out` [B, …]; the integrands float64 [Q, B] where they are wanted."""

    def not_finite(self, samples: Tensor, t: Tensor, nfe: Tensor) -> str:
        """The message for samples whose slope is not finite at t after nfe evaluations."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The B samples under way.

    u [B, …]: the state of a stage; registers [1 + s, B, …]: u_0, k_1 … k_s; inputs: what the
    network reads, u itself where it takes that. t, h, error float64 [B]; first, integrals float64
    [Q, B] with first the integrands at t; active bool [B].
    """

    samples: Tensor
    u: Tensor
    inputs: Tensor | None
    registers: Tensor
    t: Tensor
    h: Tensor
    error: Tensor
    first: Tensor
    integrals: Tensor
    nfe: Tensor
    active: Tensor

    @classmethod
    def of(cls, system: System, u: Tensor, samples: Tensor, t: float, h: float, s: int) -> Pool:
        """Samples at the beginning; `Stages.begin` makes their k_1."""
        state = u[samples]
        batch, device = len(samples), u.device
        direct = system.unscaled and system.net_dtype == u.dtype
        registers = u.new_zeros((1 + s, *state.shape))
        registers[0] = state

        def each(value: float) -> Tensor:
            return torch.full((batch,), value, dtype=torch.float64, device=device)

        def integral() -> Tensor:
            return torch.zeros((system.columns, batch), dtype=torch.float64, device=device)

        return cls(
            samples=samples,
            u=state,
            inputs=None if direct else torch.empty_like(state, dtype=system.net_dtype),
            registers=registers,
            t=each(t),
            h=each(h),
            error=each(1.0),
            first=integral(),
            integrals=integral(),
            nfe=torch.zeros(batch, dtype=torch.int64, device=device),
            active=torch.ones(batch, dtype=torch.bool, device=device),
        )

    def keep(self, which: Tensor) -> Pool:
        """The samples at these places alone."""
        kept = {name: v.index_select(axis, which) for name, v, axis in self._held()}
        return replace(self, **kept)

    def put(self, which: Tensor, other: Pool) -> None:
        """Another pool's samples at these places."""
        for (_, mine, axis), (_, theirs, _) in zip(self._held(), other._held(), strict=True):
            mine.index_copy_(axis, which, theirs)

    def _held(self) -> list[tuple[str, Tensor, int]]:
        wide = ("registers", "first", "integrals")
        held = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, v, int(name in wide)) for name, v in held if v is not None]


@dataclass(frozen=True)
class Growth:
    """What the integrals grow by in a step [Q, B], the error of that [B] where there are any, and
    the integrands of the last stage [Q, B]."""

    integrals: Tensor
    error: Tensor
    last: Tensor


class Stages:
    """The stages of a Runge–Kutta method, as rows of the affine step."""

    def __init__(self, system: System, tableau: Tableau, kernels: Kernels, u: Tensor) -> None:
        self.system, self.tableau, self.kernels = system, tableau, kernels
        device, self._dtype, self._size = u.device, u.dtype, math.prod(u.shape[1:])
        wide: Any = {"dtype": torch.float64, "device": device}
        self._weights = torch.tensor(tableau.combinations, **wide)  # [M, s]
        self._nodes = torch.tensor((0.0, *tableau.nodes), **wide)[:, None]
        self._error = torch.tensor((0.0, *(tableau.error or ())), **wide)
        self._lanes = 2 * (H0 + 1 + tableau.stages) + len(TAIL_LANES)
        self._c_in = 2 * (H0 + 1 + tableau.stages) + TAIL_LANES.index("c_in_next")
        self._e = tableau.error or (0.0,) * tableau.stages
        last = tableau.stages if tableau.first_same_as_last else 0
        # Which integrands count: those with a weight, and what becomes the next step's first.
        weights = zip(tableau.b, self._e, strict=True)
        self._wanted = [any(both) or j == last for j, both in enumerate(weights, start=1)]

    @property
    def evaluations(self) -> int:
        """Network evaluations of a step, k_1 left out where the step before has it."""
        return self.tableau.stages - int(self.tableau.first_same_as_last)

    def begin(self, pool: Pool) -> None:
        """k_1 and the integrands at the pool's states."""
        at = self.system.at(pool.t)
        if pool.inputs is not None:
            pool.inputs.copy_(per_sample(at.c_in, pool.u) * pool.u)
        first = self._slope(pool, at, 1)
        if first is not None:
            pool.first.copy_(first)

    def step(self, pool: Pool, h: Tensor) -> Growth:
        """The stages of a step of h [B] from k_1 on: u becomes u'."""
        at = self.system.at(pool.t + self._nodes * h)
        coef, field = self._table(at.c_in[1:], h)
        batch, b, e = len(h), self.tableau.b, self._e
        total, last = b[0] * pool.first, pool.first
        error = e[0] * self._steering(at[0], pool.first)
        row = torch.arange(batch, dtype=torch.int32, device=h.device)
        for m in range(len(self.tableau.nodes)):
            here = torch.where(pool.active, row + m * batch, -1)
            self.kernels.affine_step_(
                pool.u, None, None, None, pool.registers, pool.samples, here, coef, field, None,
                None, pool.inputs, None, None,
            )  # fmt: skip
            stage = m + 2
            if stage > self.tableau.stages:
                break
            slope = self._slope(pool, at[m + 1], stage)
            if slope is not None:
                total, last = total + b[stage - 1] * slope, slope
                error = error + e[stage - 1] * self._steering(at[m + 1], slope)
        return Growth(h * total, h * error, last)

    def _steering(self, at: Instant, integrands: Tensor) -> Tensor:
        return integrands.mean(0) if self.system.integrals_steer else self._size * at.steering

    def error_norm(self, pool: Pool, h: Tensor, atol: float, rtol: float) -> Tensor:
        """√ mean (e/(atol + rtol max(|u_0|, |u'|)))² of every sample, float64 [B]."""
        out = torch.empty_like(h, dtype=self._dtype)
        weights = h[:, None] * self._error
        self.kernels.error_norm_(out, pool.u, pool.registers, weights, atol, rtol)
        return out.double()

    def _slope(self, pool: Pool, at: Instant, stage: int) -> Tensor | None:
        inputs = pool.u if pool.inputs is None else pool.inputs
        wanted = self.system.columns > 0 and self._wanted[stage - 1]
        return self.system.slope(at, pool.u, inputs, pool.registers[stage], wanted)

    def _table(self, c_in: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of all stages of all samples: [M·B, 2, lanes], fields [M·B, 4]."""
        moments, batch = c_in.shape
        value = h.new_zeros(moments, batch, self._lanes)
        value[:, :, H0] = 1.0
        value[:, :, H0 + 1 : H0 + 1 + self.tableau.stages] = h[:, None] * self._weights[:, None]
        value[:, :, self._c_in] = c_in
        high = value.to(self._dtype)
        coef = torch.stack([high, (value - high.double()).to(self._dtype)], dim=2)
        field = torch.zeros(moments * batch, len(FIELD_LANES), dtype=torch.int32, device=h.device)
        field[:, FIELD_LANES.index("slot")] = -1
        return coef.reshape(moments * batch, 2, self._lanes), field
