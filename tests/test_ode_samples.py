"""The ODE solvers' samples: independent of batch and order, of any shape, dtype and backend."""

from __future__ import annotations

from typing import Any

import ode_cases as cases
import pytest
import torch
from ode_cases import (
    WORK,
    NoHostReads,
    Rates,
    adaptive,
    decay,
    error,
    exact,
    fixed,
    hard,
    logistic,
    rates,
    same,
    states,
    taken,
)
from torch import Tensor

from sbm_fast.backend import Kernels, kernels_of
from sbm_fast.ode import Adaptive, Tolerance
from sbm_fast.runge_kutta import DOPRI5
from sbm_fast.stages import Pool


def test_samples_and_batches_of_a_grid_are_independent() -> None:
    u, rate = states(11, 5, dtype=torch.float32), rates(11)
    whole = fixed(Rates(logistic, rate, net_dtype=torch.float32), u, 2.0, 7, "rk4")
    for batch_size in (1, 3, 4, 20):
        system = Rates(logistic, rate, net_dtype=torch.float32)
        assert same(fixed(system, u, 2.0, 7, "rk4", batch_size=batch_size), whole)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    system = Rates(logistic, rate[order], net_dtype=torch.float32)
    assert same(fixed(system, u[order], 2.0, 7, "rk4"), taken(whole, order))


DTYPES = [torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


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
