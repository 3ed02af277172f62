"""Systems with known solutions for the ODE solvers: du/dt = f(t, u) and integrals along the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sbm_fast.backend import choose_backend
from sbm_fast.ode import Adaptive, Solution, Tolerance, solve_fixed, solve_torchdiffeq
from sbm_fast.runge_kutta import DOPRI5, TABLEAUS
from sbm_fast.stages import Instant

KERNELS = choose_backend("auto", torch.device("cpu"))


def wide(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)


Slope = Callable[[Tensor, Tensor, Tensor], Tensor]  # (t [B, 1, …], u [B, …], rate [B, 1, …])
Integrand = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same -> [B]


@dataclass(eq=False)
class Rates:
    """A system whose samples differ by a rate [N]; `integrands` are integrated along the way."""

    f: Slope
    rate: Tensor
    integrands: tuple[Integrand, ...] = ()
    net_dtype: torch.dtype = torch.float64
    unscaled: bool = True
    c_in: float = 1.0
    integrals_steer: bool = True
    steering: Callable[[Tensor], Tensor] = torch.zeros_like
    calls: list[tuple[list[float], bool]] = field(default_factory=list)
    """(times, whether the integrands were asked for) of every call."""
    counts: Tensor = field(init=False)
    """How often each sample was part of a call."""

    def __post_init__(self) -> None:
        self.columns = len(self.integrands)
        self._now = torch.arange(len(self.rate))
        self.counts = torch.zeros(len(self.rate), dtype=torch.int64)

    def select(self, samples: Tensor) -> None:
        self._now = samples

    def at(self, t: Tensor) -> Instant:
        return Instant(t.new_zeros(*t.shape, 3), torch.full_like(t, self.c_in), t, self.steering(t))

    def slope(
        self, at: Instant, u: Tensor, inputs: Tensor, out: Tensor, integrals: bool
    ) -> Tensor | None:
        self.calls.append((at.label.tolist(), integrals))
        self.counts[self._now] += 1
        assert inputs.dtype == self.net_dtype
        t, rate = wide(at.label, u), wide(self.rate[self._now], u)
        given = inputs.to(u.dtype) / self.c_in
        out.copy_(self.f(t, given, rate))
        if not integrals:
            return None
        return torch.stack([g(t, given, rate) for g in self.integrands]).double()

    def not_finite(self, samples: Tensor, t: Tensor, nfe: Tensor) -> str:
        lost = zip(samples.tolist(), t.tolist(), nfe.tolist(), strict=True)
        return "lost: " + ", ".join(f"sample {s} at {at:.6g} after {n}" for s, at, n in lost)


def decay(t: Tensor, u: Tensor, rate: Tensor) -> Tensor:
    """u₀ e^(−rate t)."""
    return -rate * u


def logistic(t: Tensor, u: Tensor, rate: Tensor) -> Tensor:
    """u₀ / (u₀ + (1 − u₀) e^(−rate t)). Exactly rounded operations only."""
    return rate * u * (1 - u)


def forced(t: Tensor, u: Tensor, rate: Tensor) -> Tensor:
    """u₀ e^(rate t − t²/2): depends on time, so that wrong nodes are seen."""
    return (rate - t) * u


def exact(f: Slope, u: Tensor, rate: Tensor, begin: float, end: float) -> Tensor:
    """The solution at `end`, float64."""
    u, r, h = u.double(), wide(rate, u).double(), end - begin
    if f is decay:
        return u * torch.exp(-r * h)
    if f is logistic:
        return u / (u + (1 - u) * torch.exp(-r * h))
    assert f is forced
    return u * torch.exp(r * h - (end**2 - begin**2) / 2)


def states(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """In (0.1, 0.9)."""
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + 0.8 * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def rates(n: int, low: float = 0.5, high: float = 3.0) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def fixed(system: Any, u: Tensor, end: float, steps: int, name: str, **more: Any) -> Solution:
    begin = more.pop("begin", 0.0)
    grid = torch.linspace(begin, end, steps + 1, dtype=torch.float64).tolist()
    return solve_fixed(system, u, grid, tableau=TABLEAUS[name], kernels=KERNELS, **more)


def adaptive(system: Any, u: Tensor, end: float, tol: float = 1e-6, **more: Any) -> Solution:
    begin, looks = more.pop("begin", 0.0), more.pop("looks", None)
    limits = Tolerance(tol, more.pop("atol", tol), more.pop("max_nfe", 10_000))
    solver = Adaptive(
        system, u, (begin, end), tableau=DOPRI5, tolerance=limits, kernels=KERNELS, **more
    )
    if looks is not None:
        solver._steps_between_looks = looks
    return solver.solve()


def order(errors: list[float]) -> float:
    """The order that errors at h, h/2, h/4, … show."""
    return math.log2(errors[-2] / errors[-1])


class NoHostReads(TorchDispatchMode):
    """Fails where the host reads a value from the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
        if any(read in name for read in reads) or name == "aten::equal":
            raise AssertionError(f"{name} is a read by the host")
        return func(*args, **(kwargs or {}))


def error(f: Slope, u: Tensor, rate: Tensor, solution: Solution, begin: float, end: float) -> float:
    return float((solution.u - exact(f, u, rate, begin, end)).abs().max())


def same(a: Solution, b: Solution) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Solution))


def taken(a: Solution, samples: Tensor) -> Solution:
    """The solution of these samples alone."""
    integrals = a.integrals[:, samples]
    return Solution(a.u[samples], integrals, a.nfe[samples], a.finished[samples])


WORK: dict[str, Any] = {"integrands": (lambda t, u, rate: (u * u).sum(1),)}


def hard(n: int = 13, dtype: torch.dtype = torch.float32) -> tuple[Rates, Tensor]:
    """Samples whose numbers of steps differ by far; every operation is exactly rounded."""
    rate = (rates(n, 0.1, 4.0) ** 2)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    return Rates(logistic, rate, net_dtype=dtype, **WORK), states(n, 5, dtype=dtype)


def peer(system: Rates, u: Tensor, end: float, tol: float = 1e-6, **more: Any) -> Solution:
    pytest.importorskip("torchdiffeq")
    limits = Tolerance(tol, tol, more.pop("max_nfe", 10_000))
    method = more.pop("method", "dopri5")
    return solve_torchdiffeq(system, u, (0.0, end), method=method, tolerance=limits, **more)
