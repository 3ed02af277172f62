"""The ODE solvers on systems with known solutions: orders, tolerances, independence of samples."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import ode_cases as cases
import pytest
import torch
from ode_cases import (
    NoHostReads,
    Rates,
    Slope,
    adaptive,
    decay,
    exact,
    fixed,
    forced,
    logistic,
    rates,
    states,
)
from torch import Tensor

from sbm_fast.backend import Kernels, kernels_of
from sbm_fast.ode import LOST, Adaptive, Solution, Tolerance, solve_torchdiffeq
from sbm_fast.runge_kutta import DOPRI5, TABLEAUS
from sbm_fast.stages import Pool

NAN, INF = float("nan"), float("inf")
every_slope = pytest.mark.parametrize("f", [decay, logistic, forced], ids=lambda f: f.__name__)


def error(f: Slope, u: Tensor, rate: Tensor, solution: Solution, begin: float, end: float) -> float:
    return float((solution.u - exact(f, u, rate, begin, end)).abs().max())


def same(a: Solution, b: Solution) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Solution))


def taken(a: Solution, samples: Tensor) -> Solution:
    """The solution of these samples alone."""
    integrals = a.integrals[:, samples]
    return Solution(a.u[samples], integrals, a.nfe[samples], a.finished[samples])


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


def test_samples_and_batches_of_a_grid_are_independent() -> None:
    u, rate = states(11, 5, dtype=torch.float32), rates(11)
    whole = fixed(Rates(logistic, rate, net_dtype=torch.float32), u, 2.0, 7, "rk4")
    for batch_size in (1, 3, 4, 20):
        system = Rates(logistic, rate, net_dtype=torch.float32)
        assert same(fixed(system, u, 2.0, 7, "rk4", batch_size=batch_size), whole)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    system = Rates(logistic, rate[order], net_dtype=torch.float32)
    assert same(fixed(system, u[order], 2.0, 7, "rk4"), taken(whole, order))


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


DTYPES = [torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
WORK: dict[str, Any] = {"integrands": (lambda t, u, rate: (u * u).sum(1),)}


def hard(n: int = 13, dtype: torch.dtype = torch.float32) -> tuple[Rates, Tensor]:
    """Samples whose numbers of steps differ by far; every operation is exactly rounded."""
    rate = (rates(n, 0.1, 4.0) ** 2)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    return Rates(logistic, rate, net_dtype=dtype, **WORK), states(n, 5, dtype=dtype)


def part(system: Rates, samples: Tensor) -> Rates:
    return Rates(system.f, system.rate[samples], system.integrands, system.net_dtype)


SINGLE, DOUBLE = DTYPES
SPLITS = [(1, 1, SINGLE), (2, 4, DOUBLE), (5, 1, DOUBLE), (8, 4, SINGLE), (9, 1, SINGLE)]
SPLITS += [(12, 4, SINGLE), (13, 4, DOUBLE), (100, 4, SINGLE)]


@pytest.mark.parametrize(("batch_size", "looks", "dtype"), SPLITS)
def test_results_do_not_depend_on_the_batch(
    batch_size: int, looks: int, dtype: torch.dtype
) -> None:
    """Refilling places and closing up leave no trace, to the bit; nor does looking seldom."""
    system, u = hard(dtype=dtype)
    whole = adaptive(system, u, 2.0)
    assert int(whole.nfe.max()) > 3 * int(whole.nfe.min())
    system, _ = hard(dtype=dtype)
    assert same(adaptive(system, u, 2.0, batch_size=batch_size, looks=looks), whole)


@every_dtype
def test_results_do_not_depend_on_order_and_neighbours(dtype: torch.dtype) -> None:
    system, u = hard(dtype=dtype)
    whole = adaptive(system, u, 2.0)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    assert same(adaptive(part(system, order), u[order], 2.0, batch_size=7), taken(whole, order))
    for piece in torch.arange(13).split(4):
        assert same(adaptive(part(system, piece), u[piece], 2.0), taken(whole, piece))


def test_one_slow_sample_costs_itself_only() -> None:
    rate = torch.full((12,), 0.5, dtype=torch.float64)
    rate[4] = 200.0
    u = states(12, 3)
    system = Rates(decay, rate)
    solution = adaptive(system, u, 1.0)
    quick = solution.nfe[torch.arange(12) != 4]
    assert int(solution.nfe[4]) > 5 * int(quick.max())
    for i in (3, 4, 11):
        alone = adaptive(Rates(decay, rate[[i]]), u[[i]], 1.0)
        assert int(alone.nfe) == int(solution.nfe[i])
    # The network itself is not asked for those that are done.
    assert torch.equal(system.counts, solution.nfe)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_places_are_refilled(batch_size: int) -> None:
    """While samples wait the batch stays full, but for the eighth part that is waited for."""
    system, u = hard(48)
    solution = adaptive(system, u, 2.0, 1e-4, batch_size=batch_size)
    sizes = [len(times) for times, _ in system.calls]
    assert max(sizes) == batch_size
    wasted = int((system.counts - solution.nfe).sum())
    assert wasted <= 0.1 * int(solution.nfe.sum())
    assert len(sizes) < 1.35 * int(solution.nfe.sum()) / batch_size + int(solution.nfe.max())


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


def test_max_nfe_leaves_samples_where_they_are() -> None:
    rate = torch.tensor([0.5, 100.0, 0.5, 200.0], dtype=torch.float64)
    u, work = states(4, 3), WORK["integrands"]
    free = adaptive(Rates(decay, rate, work), u, 1.0)
    assert int(free.nfe[0]) <= 70 and int(free.nfe[1]) > 100
    for max_nfe, batch_size, looks in ((70, None, 1), (76, 2, 1), (82, None, 3), (88, 1, 5)):
        system = Rates(decay, rate, work)
        solution = adaptive(system, u, 1.0, max_nfe=max_nfe, batch_size=batch_size, looks=looks)
        assert same(solution, adaptive(Rates(decay, rate, work), u, 1.0, max_nfe=max_nfe))
        assert solution.finished.tolist() == [True, False, True, False]
        assert same(taken(solution, torch.tensor([0, 2])), taken(free, torch.tensor([0, 2])))
        assert (solution.nfe <= max_nfe).all() and (solution.nfe[[1, 3]] > max_nfe - 6).all()
        # On the way: the state of some t in (0, 1), and the integral up to that t.
        for i in (1, 3):
            shrunk = solution.u[i] / u[i]
            assert float(shrunk.std()) < 1e-3 and 0 < float(shrunk.mean()) < 1
            grown = float((u[i] ** 2 - solution.u[i] ** 2).sum() / (2 * rate[i]))
            assert float(solution.integrals[0, i]) == pytest.approx(grown, rel=1e-3)


@pytest.mark.parametrize("max_nfe", [1, 6, 7, 12, 13])
def test_max_nfe_of_few_evaluations(max_nfe: int) -> None:
    u = states(5, 2)
    solution = adaptive(Rates(decay, rates(5)), u, 1.0, max_nfe=max_nfe, batch_size=2)
    expected = 1 + 6 * ((max_nfe - 1) // 6)
    assert solution.nfe.tolist() == [expected] * 5 and not solution.finished.any()
    assert max_nfe >= 7 or torch.equal(solution.u, u)
    # The last step of the stiff ones is not accepted, and stays so while they wait to be seen.
    stiff = adaptive(Rates(decay, rates(5, 1e3, 5e3)), u, 1.0, max_nfe=max_nfe, looks=4)
    assert torch.equal(stiff.u, u) and stiff.nfe.tolist() == [expected] * 5


def poisoned(sample: int, after: float, value: float = NAN) -> tuple[Rates, Tensor]:
    """A system whose slope is not finite for one sample after some time."""
    rate = rates(6)

    def f(t: Tensor, u: Tensor, r: Tensor) -> Tensor:
        return torch.where((t > after) & (r == rate[sample]), value, decay(t, u, r))

    return Rates(f, rate), states(6, 3)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("batch_size", [None, 2, 1])
def test_slopes_that_are_not_finite_are_reported(value: float, batch_size: int | None) -> None:
    system, u = poisoned(3, 0.37, value)
    with pytest.raises(ValueError, match=r"^lost: sample 3 at 0\.37 after \d+$"):
        adaptive(system, u, 1.0, batch_size=batch_size)
    system, u = poisoned(3, -1.0, value)
    with pytest.raises(ValueError, match=r"^lost: sample 3 at 0 after \d+$") as caught:
        adaptive(system, u, 1.0, batch_size=batch_size, looks=5)
    times = torch.tensor([t for call, _ in system.calls for t in call])
    assert torch.isfinite(times).all()  # also of the steps that it waited to be looked at
    tried = math.ceil(math.log(LOST / 0.01) / math.log(0.2)) + 2
    assert int(str(caught.value).split()[-1]) <= 1 + 6 * tried


@pytest.mark.parametrize("steer", [True, False])
@pytest.mark.parametrize("value", [NAN, INF])
def test_integrands_that_are_not_finite_are_reported(value: float, steer: bool) -> None:
    def integrand(t: Tensor, u: Tensor, r: Tensor) -> Tensor:
        return torch.where((t > 0.5) & (r == 0.5), value, u).sum(1)

    system = Rates(decay, rates(3), (integrand,), integrals_steer=steer)
    with pytest.raises(ValueError, match=r"^lost: sample 0 at 0\.5 after \d+$"):
        adaptive(system, states(3, 2), 1.0)


@pytest.mark.parametrize("name", TABLEAUS)
def test_what_is_not_finite_on_a_grid_is_reported_where_it_was(name: str) -> None:
    system, u = poisoned(4, 0.55)
    stages = {"euler": 1, "heun": 2, "rk4": 4, "dopri5": 6}[name]
    # Euler first looks behind 0.55 at the beginning of the next step.
    step = 6 if name == "euler" else 5
    nfe = (step + 1) * stages + (name == "dopri5")
    with pytest.raises(ValueError, match=rf"^lost: sample 4 at 0\.{step} after {nfe}$"):
        fixed(system, u, 1.0, 10, name, batch_size=4)
    system = Rates(decay, rates(3), (lambda t, u, r: torch.where(r == 0.5, INF, u).sum(1),))
    with pytest.raises(ValueError, match=r"^lost: sample 0 at 0 after \d$"):
        fixed(system, states(3, 2), 1.0, 4, name)


def test_a_step_too_large_is_survived() -> None:
    """Slopes that are not finite only off the solution's path: √u below 0."""

    def f(t: Tensor, u: Tensor, rate: Tensor) -> Tensor:
        return -rate * torch.sqrt(u)  # u = (√u₀ − rate t/2)²

    rate, u = rates(4, 10.0, 30.0), states(4, 2)
    u[:] = u[:, :1]
    end = 1.9 * u[:, 0].sqrt() / rate  # a twentieth of the way before the end of the path
    for i in range(4):
        system = Rates(f, rate[[i]], (lambda t, u, r: u.sqrt().sum(1),))
        solver = Adaptive(
            system, u[[i]], (0.0, float(end[i])), tableau=DOPRI5,
            tolerance=Tolerance(1e-3, 1e-3, 1000), kernels=cases.KERNELS,
        )  # fmt: skip
        pool = solver._newcomers(1)
        pool.h.fill_(float(end[i]) * 1.2)
        pool.t.fill_(0.0)
        solver._step(pool)
        assert int(pool.nfe) == 7 and pool.registers.isnan().any() and float(pool.t) == 0
        while pool.active.any():
            solver._step(pool)
        truth = (u[[i]].sqrt() - rate[i] * end[i] / 2) ** 2
        assert float(pool.t) == float(end[i]) and torch.isfinite(pool.integrals).all()
        assert float((pool.registers[0] - truth).abs().max()) < 0.01


def test_those_who_wait_for_their_place_are_not_taken_for_lost() -> None:
    """A sample left by max_nfe in a step that is not finite waits among others that go on."""
    rate = rates(16, 50.0, 60.0)

    def f(t: Tensor, u: Tensor, r: Tensor) -> Tensor:
        return torch.where((t > 1e-3) & (r == 50.0), NAN, decay(t, u, r))

    system = Rates(f, torch.cat([rate, rate[1:]]))
    u = states(31, 2)
    solution = adaptive(system, u, 1.0, 1e-10, max_nfe=13, batch_size=16, looks=4)
    assert solution.nfe.tolist() == [13] * 31 and not solution.finished.any()
    assert torch.equal(solution.u[0], u[0])


def test_who_is_done_stands_still_at_a_time_of_his_own() -> None:
    """Labels of samples that wait for their places stay finite and inside the interval."""
    system, u = hard(40)
    adaptive(system, u, 2.0, batch_size=24, looks=4)
    times = torch.tensor([t for call, _ in system.calls for t in call])
    assert torch.isfinite(times).all() and times.min() >= 0 and times.max() <= 2.0 * (1 + 1e-15)


@pytest.mark.parametrize("shape", [(0, 3), (0,), (1,), (7,), (1, 1), (3, 0), (2, 3, 4, 5), (1, 9)])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "adaptive"])
def test_any_shape(shape: tuple[int, ...], name: str) -> None:
    u, rate = states(*shape), rates(shape[0])
    integrand = (lambda t, u, r: torch.ones(len(u)),)
    system = Rates(decay, rate, integrand)
    if name == "adaptive":
        solution = adaptive(system, u, 1.0, 1e-9)
    else:
        solution = fixed(system, u, 1.0, 40, name)
    assert solution.u.shape == shape and solution.nfe.shape == (shape[0],)
    torch.testing.assert_close(solution.u, exact(decay, u, rate, 0.0, 1.0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(solution.integrals, torch.ones(1, shape[0]).double())


def test_an_interval_of_no_length() -> None:
    u = states(3, 2)
    solution = adaptive(Rates(decay, rates(3)), u, 0.4, begin=0.4)
    assert torch.equal(solution.u, u) and solution.finished.all() and (solution.nfe <= 7).all()


def test_any_memory_format() -> None:
    """A state in another order of strides: the same, to the bit."""
    u = states(6, 4, 3, 3, dtype=torch.float32)
    system, rate = hard(6)[0], rates(6)
    system = Rates(logistic, rate, net_dtype=torch.float32)
    plain = adaptive(system, u, 2.0)
    for other in (u.contiguous(memory_format=torch.channels_last), u.mT.contiguous().mT):
        system = Rates(logistic, rate, net_dtype=torch.float32)
        assert not other.is_contiguous()
        assert same(adaptive(system, other, 2.0, batch_size=4), plain)
        assert torch.equal(
            fixed(Rates(logistic, rate, net_dtype=torch.float32), other, 2.0, 5, "rk4").u,
            fixed(Rates(logistic, rate, net_dtype=torch.float32), u, 2.0, 5, "rk4").u,
        )


def test_float64_is_carried_through() -> None:
    u, rate = states(3, 2), rates(3)
    solution = adaptive(Rates(decay, rate), u, 1.0, 1e-13)
    assert solution.u.dtype == torch.float64
    assert error(decay, u, rate, solution, 0.0, 1.0) < 1e-12
    single = adaptive(Rates(decay, rate, net_dtype=torch.float32), u.float(), 1.0, 1e-6)
    assert single.u.dtype == torch.float32
    assert error(decay, u.float(), rate, single, 0.0, 1.0) < 3e-6


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_are_scaled_and_converted(net_dtype: torch.dtype) -> None:
    """The network reads c_in·u in its own dtype, at the first stage and at the others."""
    u, rate = states(5, 4), rates(5)
    kinds: dict[str, Any] = {"net_dtype": net_dtype, "unscaled": False, "c_in": 3.0}
    for solution in (
        adaptive(Rates(decay, rate, **kinds), u, 1.0, 1e-4),
        fixed(Rates(decay, rate, **kinds), u, 1.0, 10, "rk4"),
    ):
        worst = error(decay, u, rate, solution, 0.0, 1.0)
        assert worst < max(1e-3, 4 * torch.finfo(net_dtype).eps)


def test_the_given_state_is_not_changed() -> None:
    u = states(5, 4)
    kept = u.clone()
    adaptive(Rates(decay, rates(5)), u, 1.0, batch_size=2)
    fixed(Rates(decay, rates(5)), u, 1.0, 3, "rk4")
    assert torch.equal(u, kept)


def test_the_host_reads_nothing_within_a_step() -> None:
    class Quiet(Rates):
        def slope(
            self, at: Any, u: Tensor, inputs: Tensor, out: Tensor, integrals: bool
        ) -> Tensor | None:
            out.copy_(-inputs)
            return at.label[None] if integrals else None

    u = states(4, 3)
    system = Quiet(decay, rates(4), WORK["integrands"])
    solver = Adaptive(
        system, u, (0.0, 1.0), tableau=DOPRI5, tolerance=Tolerance(1e-6, 1e-6, 100),
        kernels=cases.KERNELS,
    )  # fmt: skip
    pool = solver._newcomers(4)
    with NoHostReads():
        for _ in range(3):
            solver._step(pool)
    with NoHostReads(), pytest.raises(AssertionError, match="read by the host"):
        solver._renew(pool, lambda n: None)


@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_backends_agree(name: str) -> None:
    kernels: Kernels = kernels_of(name)
    system, u = hard(9, torch.float64)
    whole = adaptive(system, u, 2.0)
    solver = Adaptive(
        part(system, torch.arange(9)), u, (0.0, 2.0), tableau=DOPRI5,
        tolerance=Tolerance(1e-6, 1e-6, 10_000), kernels=kernels,
    )  # fmt: skip
    other = solver.solve()
    torch.testing.assert_close(other.u, whole.u, rtol=1e-12, atol=0)
    assert torch.equal(other.nfe, whole.nfe)


def peer(system: Rates, u: Tensor, end: float, tol: float = 1e-6, **more: Any) -> Solution:
    pytest.importorskip("torchdiffeq")
    limits = Tolerance(tol, tol, more.pop("max_nfe", 10_000))
    method = more.pop("method", "dopri5")
    return solve_torchdiffeq(system, u, (0.0, end), method=method, tolerance=limits, **more)


@every_slope
def test_torchdiffeq_agrees(f: Slope) -> None:
    u, rate = states(3, 2), rates(3)
    ours = adaptive(Rates(f, rate, **WORK), u, 1.5, 1e-9)
    theirs = peer(Rates(f, rate, **WORK), u, 1.5, 1e-8, batch_size=2)
    torch.testing.assert_close(theirs.u, ours.u, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(theirs.integrals, ours.integrals, rtol=1e-6, atol=1e-7)
    assert theirs.finished.all() and theirs.nfe[0] == theirs.nfe[1]


def test_torchdiffeq_where_it_gives_up() -> None:
    for method in ("dopri5", "euler"):
        system, u = poisoned(3, -1.0)
        with pytest.raises(ValueError, match=r"^lost: sample 3 at 0 after \d+$"):
            peer(system, u, 1.0, method=method)
    system, u = poisoned(2, 0.37)
    with pytest.raises(ValueError, match=r"^lost: sample 2 at 0\.3[789]\d* after \d+$"):
        peer(system, u, 1.0)
    with pytest.raises(ValueError, match=r"^max_nfe: torchdiffeq needs more than 20 evaluations"):
        peer(Rates(decay, rates(3)), states(3, 2), 1.0, 1e-10, max_nfe=20)
    with pytest.raises(ValueError, match=r'^solver: torchdiffeq says: Invalid method "rk45"'):
        peer(Rates(decay, rates(3)), states(3, 2), 1.0, method="rk45")


def test_a_progress_bar_counts_samples(capsys: pytest.CaptureFixture[str]) -> None:
    system, u = hard(9)
    solver = Adaptive(
        system, u, (0.0, 1.0), tableau=DOPRI5, tolerance=Tolerance(1e-4, 1e-4, 1000),
        kernels=cases.KERNELS, batch_size=4,
    )  # fmt: skip
    solver.solve(progress=True)
    assert "9/9" in capsys.readouterr().err
    fixed(system, u, 1.0, 2, "heun", progress=True, batch_size=4)
    assert "9/9" in capsys.readouterr().err
    fixed(system, u, 1.0, 2, "heun")
    assert capsys.readouterr().err == ""


def test_a_pool_gives_and_takes_samples() -> None:
    system, u = hard(6)
    whole = Pool.of(system, u, torch.arange(6), 0.0, 0.1, 7)
    rest = whole.keep(torch.tensor([4, 1]))
    assert rest.samples.tolist() == [4, 1] and torch.equal(rest.registers[0], u[[4, 1]])
    rest.put(torch.tensor([1]), Pool.of(system, u, torch.tensor([5]), 0.5, 0.2, 7))
    assert rest.samples.tolist() == [4, 5] and rest.t.tolist() == [0.0, 0.5]
    assert torch.equal(rest.u, u[[4, 5]]) and torch.equal(whole.u, u)
