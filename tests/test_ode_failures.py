"""ODE solvers that give up: max_nfe, slopes and integrands that are not finite."""

from __future__ import annotations

import math

import ode_cases as cases
import pytest
import torch
from ode_cases import WORK, Rates, adaptive, decay, fixed, peer, rates, same, states, taken
from torch import Tensor

from sbm_fast.ode import LOST, Adaptive, Tolerance
from sbm_fast.runge_kutta import DOPRI5, TABLEAUS

NAN, INF = float("nan"), float("inf")


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
