"""The ODE solvers' orders, tolerances and integrals on systems with known solutions."""

from __future__ import annotations

import math

import ode_cases as cases
import pytest
import torch
from ode_cases import (
    WORK,
    Rates,
    Slope,
    adaptive,
    decay,
    error,
    fixed,
    forced,
    logistic,
    peer,
    rates,
    states,
)
from torch import Tensor

from sbm_fast.ode import Adaptive, Solution, Tolerance
from sbm_fast.runge_kutta import DOPRI5, TABLEAUS

every_slope = pytest.mark.parametrize("f", [decay, logistic, forced], ids=lambda f: f.__name__)


@every_slope
@pytest.mark.parametrize("name", TABLEAUS)
def test_order_on_a_grid(f: Slope, name: str) -> None:
    u, rate = states(4, 3), rates(4)
    steps = {"euler": 100, "heun": 50, "rk4": 20, "dopri5": 24}[name]
    errors = []
    for n in (steps, 2 * steps):
        solution = fixed(Rates(f, rate), u, 1.5, n, name)
        errors.append(error(f, u, rate, solution, 0.0, 1.5))
    assert cases.order(errors) == pytest.approx(TABLEAUS[name].order, abs=0.35)
    stages = {"euler": 1, "heun": 2, "rk4": 4, "dopri5": 6}[name]
    assert solution.nfe.tolist() == [2 * steps * stages + (name == "dopri5")] * 4
    assert solution.finished.all()


@pytest.mark.parametrize("name", TABLEAUS)
def test_what_a_step_is(name: str) -> None:
    """Two steps against the formula of the module's docstring, in plain numbers."""
    tableau, u, rate = TABLEAUS[name], states(3, 2), rates(3)
    t, state = 0.2, u.clone()
    for h in (0.3, 0.5):
        k: list[Tensor] = []
        for c, row in zip(tableau.c, ((), *tableau.a), strict=True):
            inner = state + h * sum((a * v for a, v in zip(row, k, strict=True)), 0 * state)
            now = torch.tensor(t + c * h, dtype=torch.float64)
            k.append(forced(now, inner, rate[:, None]))
        state = state + h * sum((b * v for b, v in zip(tableau.b, k, strict=True)), 0 * state)
        t += h
    solution = cases.solve_fixed(
        Rates(forced, rate), u, [0.2, 0.5, 1.0], tableau=tableau, kernels=cases.KERNELS
    )
    torch.testing.assert_close(solution.u, state, rtol=1e-14, atol=0)


def test_coefficients_have_more_digits_than_the_state() -> None:
    """One step of h = 1/3, which float32 has to 3e-8: no common error remains in the mean."""
    u = 1 + torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    system = Rates(lambda t, u, rate: 1024 * u, rates(1), net_dtype=torch.float32)
    ends = cases.solve_fixed(
        system, u, [0.0, 1 / 3], tableau=TABLEAUS["euler"], kernels=cases.KERNELS
    )
    relative = ends.u.double() / (u.double() * (1 + 1024 / 3)) - 1
    assert abs(float(relative.mean())) < 1e-9


@every_slope
def test_error_falls_with_the_tolerance(f: Slope) -> None:
    u, rate = states(6, 4), rates(6)
    errors, nfe = [], []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
        solution = adaptive(Rates(f, rate), u, 2.0, tol)
        errors.append(error(f, u, rate, solution, 0.0, 2.0))
        nfe.append(int(solution.nfe.sum()))
        assert solution.finished.all() and errors[-1] < 20 * tol
    assert errors == sorted(errors, reverse=True) and nfe == sorted(nfe)
    # an order of 5: a step costs a tenth of the error to the power 1/5
    assert nfe[-1] < 12 * nfe[1]


def test_error_of_a_step_is_the_embedded_one() -> None:
    """A step is accepted where the norm of docs and design is at most 1, computed here by hand."""
    u, rate = states(5, 3), rates(5, 0.2, 3.0)
    system = Rates(decay, rate)
    solver = Adaptive(
        system, u, (0.0, 100.0), tableau=DOPRI5, tolerance=Tolerance(1e-4, 1e-6, 1000),
        kernels=cases.KERNELS,
    )  # fmt: skip
    pool = solver._newcomers(5)
    k = [-rate[:, None] * u]
    for row in DOPRI5.a:
        inner = u + sum((a * v for a, v in zip(row, k, strict=True)), 0 * u)
        k.append(-rate[:, None] * inner)
    assert DOPRI5.error is not None
    e = sum((w * v for w, v in zip(DOPRI5.error, k, strict=True)), 0 * u)
    norm = (e / (1e-6 + 1e-4 * torch.maximum(u.abs(), inner.abs()))).square().mean(1).sqrt()
    assert (norm < 1).any() and (norm > 1).any()
    solver._step(pool)  # the first step is one hundredth of the interval, h = 1
    torch.testing.assert_close(pool.error, torch.where(norm <= 1, norm, 1.0), rtol=1e-10, atol=0)
    assert pool.t.tolist() == (norm <= 1).double().tolist()
    assert pool.nfe.tolist() == [7] * 5
    p = 5
    grown = 0.9 * norm ** (-0.7 / p)
    shrunk = (0.9 * norm ** (-1 / p)).clamp(max=1)
    factor = torch.where(norm <= 1, grown, shrunk).clamp(0.2, 10)
    torch.testing.assert_close(pool.h, factor, rtol=0, atol=0.51 / 1024)


@every_slope
@pytest.mark.parametrize("ends", [(0.0, 1.5), (1.5, 0.0), (-1.0, -0.2), (2.0, -1.0)])
def test_intervals_in_both_directions(f: Slope, ends: tuple[float, float]) -> None:
    u, rate = states(4, 3), rates(4, 0.3, 1.0)
    begin, end = ends
    solution = adaptive(Rates(f, rate), u, end, 1e-9, begin=begin)
    assert error(f, u, rate, solution, begin, end) < 1e-7 and solution.finished.all()
    grid = fixed(Rates(f, rate), u, end, 60, "rk4", begin=begin)
    assert error(f, u, rate, grid, begin, end) < 1e-4
    back = adaptive(Rates(f, rate), solution.u, begin, 1e-9, begin=end)
    assert float((back.u - u).abs().max()) < 1e-7


@pytest.mark.parametrize(("begin", "end"), [(-1.0, 0.0137), (0.9, -0.0071)])
def test_the_end_is_met_to_the_bit(begin: float, end: float) -> None:
    """Where t + (end − t) rounds to something else."""
    solution = adaptive(Rates(decay, rates(40)), states(40, 1), end, 1e-4, begin=begin)
    assert solution.finished.all()


def test_no_time_beyond_the_ends_is_asked_for() -> None:
    system = Rates(decay, rates(6, 0.1, 30.0))
    adaptive(system, states(6, 2), 0.7, 1e-4, begin=0.2)
    times = torch.tensor([t for call, _ in system.calls for t in call])
    assert float(times.min()) == pytest.approx(0.2) and float(times.max()) <= 0.7 * (1 + 1e-15)


def integrable(rate: Tensor) -> Rates:
    return Rates(decay, rate, (lambda t, u, r: u.sum(1), lambda t, u, r: torch.cos(3 * t[:, 0])))


def integrals(u: Tensor, rate: Tensor, begin: float, end: float) -> Tensor:
    """Those of `integrable` in closed form."""
    of_u = u.sum(1) * (1 - torch.exp(-rate * (end - begin))) / rate
    return torch.stack([of_u, 0 * of_u + (math.sin(3 * end) - math.sin(3 * begin)) / 3])


@pytest.mark.parametrize("ends", [(0.0, 1.5), (1.5, 0.0)])
def test_integrals(ends: tuple[float, float]) -> None:
    u, rate = states(5, 3), rates(5)
    solution = adaptive(integrable(rate), u, ends[1], 1e-8, begin=ends[0])
    assert solution.integrals.shape == (2, 5) and solution.integrals.dtype == torch.float64
    truth = integrals(u, rate, *ends)
    torch.testing.assert_close(solution.integrals, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TABLEAUS)
def test_order_of_integrals(name: str) -> None:
    u, rate = states(3, 2), rates(3)
    steps, truth = {"euler": 50, "heun": 30, "rk4": 10, "dopri5": 24}[name], []
    for n in (steps, 2 * steps):
        solution = fixed(integrable(rate), u, 1.5, n, name)
        truth.append((solution.integrals - integrals(u, rate, 0.0, 1.5)).abs().amax(1))
    order = torch.log2(truth[0] / truth[1])
    # Without u an integral is a quadrature, and rk4's is Simpson's, of order 4 too.
    assert order.tolist() == pytest.approx([TABLEAUS[name].order] * 2, abs=0.4)


@pytest.mark.parametrize("name", TABLEAUS)
def test_integrands_without_weight_are_not_asked_for(name: str) -> None:
    system = Rates(decay, rates(2), **WORK)
    fixed(system, states(2, 3), 1.0, 3, name)
    asked = [integrals for _, integrals in system.calls]
    once = {"euler": [1], "heun": [1, 1], "rk4": [1, 1, 1, 1], "dopri5": [0, 1, 1, 1, 1, 1]}[name]
    assert asked == [bool(v) for v in ([1] if name == "dopri5" else []) + 3 * once]


def test_integrals_that_do_not_steer_leave_state_and_steps_alone() -> None:
    """So states and steps do not depend on probes, but on an integrand that stands in."""
    u, rate = states(7, 3), rates(7)

    def run(factor: float, stands_in: float) -> Solution:
        system = Rates(
            logistic,
            rate,
            (lambda t, u, r: factor * u.sum(1), lambda t, u, r: torch.sin(50 * t[:, 0])),
            integrals_steer=False,
            steering=lambda t: stands_in * torch.sin(9 * t),
        )
        return adaptive(system, u, 2.0)

    one, other, strict = run(1.0, 1.0), run(1e6, 1.0), run(1.0, 100.0)
    assert torch.equal(one.u, other.u) and torch.equal(one.nfe, other.nfe)
    torch.testing.assert_close(other.integrals[0], 1e6 * one.integrals[0], rtol=1e-12, atol=0)
    assert (strict.nfe > one.nfe).all()


def test_an_integral_is_one_more_component_of_the_norm() -> None:
    """By hand, as in the docstring: over atol + rtol d, beside the d components of u."""
    u, rate, d = states(4, 3), rates(4, 1.0, 4.0), 3
    integrands = (lambda t, u, r: (9 * u).sum(1), lambda t, u, r: u.prod(1))
    assert DOPRI5.error is not None
    for steers in (True, False):
        system = Rates(decay, rate, integrands, integrals_steer=steers, steering=torch.cos)
        solver = Adaptive(
            system, u, (0.0, 100.0), tableau=DOPRI5, tolerance=Tolerance(1e-3, 1e-5, 1000),
            kernels=cases.KERNELS,
        )  # fmt: skip
        pool = solver._newcomers(4)
        growth = solver._stages.step(pool, pool.h)
        k, values, known = [-rate[:, None] * u], [(9 * u).sum(1) + u.prod(1)], [1.0]
        for row, c in zip(DOPRI5.a, DOPRI5.c[1:], strict=True):
            inner = u + sum((a * v for a, v in zip(row, k, strict=True)), 0 * u)
            k.append(-rate[:, None] * inner)
            values.append((9 * inner).sum(1) + inner.prod(1))
            known.append(math.cos(c))
        e = sum((w * v for w, v in zip(DOPRI5.error, k, strict=True)), 0 * u)
        parts = e / (1e-5 + 1e-3 * torch.maximum(u.abs(), inner.abs()))
        if steers:  # the mean over the columns
            along = sum((w * v / 2 for w, v in zip(DOPRI5.error, values, strict=True)), 0 * u[:, 0])
        else:
            along = sum(w * d * v for w, v in zip(DOPRI5.error, known, strict=True)) + 0 * u[:, 0]
        along = along / (1e-5 + 1e-3 * d)
        norm = ((parts.square().sum(1) + along**2) / (d + 1)).sqrt()
        got = solver._error(pool, pool.h, growth)
        torch.testing.assert_close(got, norm, rtol=1e-9, atol=0)


def test_integrals_of_no_smaller_tolerance_than_the_state() -> None:
    """Where the state is smooth and its integral is not, the steps follow the integral."""
    u, rate = states(3, 2), rates(3, 0.01, 0.02)

    def system() -> Rates:
        return Rates(decay, rate, (lambda t, u, r: torch.sin(20 * t[:, 0]).expand(len(u)),))

    errors = []
    for tol in (1e-4, 1e-6, 1e-8):
        solution = adaptive(system(), u, 3.0, tol)
        errors.append(float((solution.integrals - (1 - math.cos(60.0)) / 20).abs().max()))
        assert errors[-1] < 30 * tol
    assert errors == sorted(errors, reverse=True)


def test_an_interval_of_no_length() -> None:
    u = states(3, 2)
    solution = adaptive(Rates(decay, rates(3)), u, 0.4, begin=0.4)
    assert torch.equal(solution.u, u) and solution.finished.all() and (solution.nfe <= 7).all()


def test_float64_is_carried_through() -> None:
    u, rate = states(3, 2), rates(3)
    solution = adaptive(Rates(decay, rate), u, 1.0, 1e-13)
    assert solution.u.dtype == torch.float64
    assert error(decay, u, rate, solution, 0.0, 1.0) < 1e-12
    single = adaptive(Rates(decay, rate, net_dtype=torch.float32), u.float(), 1.0, 1e-6)
    assert single.u.dtype == torch.float32
    assert error(decay, u.float(), rate, single, 0.0, 1.0) < 3e-6


@every_slope
def test_torchdiffeq_agrees(f: Slope) -> None:
    u, rate = states(3, 2), rates(3)
    ours = adaptive(Rates(f, rate, **WORK), u, 1.5, 1e-9)
    theirs = peer(Rates(f, rate, **WORK), u, 1.5, 1e-8, batch_size=2)
    torch.testing.assert_close(theirs.u, ours.u, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(theirs.integrals, ours.integrals, rtol=1e-6, atol=1e-7)
    assert theirs.finished.all() and theirs.nfe[0] == theirs.nfe[1]
