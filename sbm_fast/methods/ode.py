"""Fixed-step solvers for the probability-flow ODE (Song et al. 2021, eq. 13)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from sbm_fast.methods.setup import Setup, choice
from sbm_fast.runge_kutta import ADAPTIVE, is_adaptive

if TYPE_CHECKING:
    from sbm_fast.methods.builder import Evaluation, Lin, PlanBuilder
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan

SOLVERS = ("euler", "heun", "rk4")


def ode(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    solver: str = "heun",
) -> Plan:
    """The probability-flow ODE dx/dt = f(t) x − ½ g(t)² s from t_max to t_min.

    Args:
        run: the run.
        steps: number of solver steps N, default 50 (euler N, heun 2N, rk4 4N evaluations).
        schedule: kind of time grid or N + 1 times, default "uniform" ("karras" for the EDM SDE).
        solver: "euler" (order 1), "heun" (2, the trapezoidal one) or "rk4" (4, the classical one).

    ``denoise``: False (default, so that encoding and sampling invert each other), "tweedie" adds
    an evaluation at t_min, x' = D.

    Raises:
        ValueError: for an unknown solver and on a discrete ladder.
    """
    run.check_compat()
    run.continuous()
    if is_adaptive(solver):
        raise ValueError(
            f"solver: {solver!r} makes its own steps, so it has no plan; expected one of {SOLVERS} "
            "here, or sbm_fast.sample(…), which runs it without"
        )
    solver = choice("solver", solver, (*SOLVERS, *ADAPTIVE))
    denoise = run.denoise_mode(False, "tweedie", False)
    times = run.times(steps, schedule, default=50, ends=True).tolist()
    b = run.builder(times[0])
    b.start()
    advance = {"euler": _euler, "heun": _heun, "rk4": _rk4}[solver]
    for t, t_next in pairwise(times):
        advance(b, t, t_next)
    if denoise == "tweedie":
        b.row(b.evaluate(times[-1]).D)
    return b.build(steps=len(times) - 1, solver=solver, denoise=denoise)


def _slope(b: PlanBuilder, e: Evaluation) -> Lin:
    """dx/dt = f x − ½ g² s at an evaluation."""
    f, g = float(b.sde.drift_coef(e.t)), float(b.sde.diffusion(e.t))
    return f * e.x - (0.5 * g**2) * e.s


def _euler(b: PlanBuilder, t: float, t_next: float) -> None:
    """x' = x + h k_1."""
    e = b.evaluate(t)
    b.row(e.x + (t_next - t) * _slope(b, e))


def _heun(b: PlanBuilder, t: float, t_next: float) -> None:
    """x' = x + h/2 (k_1 + k_2), k_2 at x + h k_1; H_0 = x + h/2 k_1."""
    h = t_next - t
    e = b.evaluate(t)
    k1 = _slope(b, e)
    b.row(e.x + h * k1, (0, e.x + h / 2 * k1))
    k2 = _slope(b, b.evaluate(t_next))
    b.row(b.H(0) + h / 2 * k2)


def _rk4(b: PlanBuilder, t: float, t_next: float) -> None:
    """x' = x_0 + h/6 (k_1 + 2 k_2 + 2 k_3 + k_4).

    H_0 = x_0 is kept; k_1 is read off the second state, x = x_0 + h/2 k_1, so that H_1 holds
    x_0 + h/6 k_1 + h/3 k_2 = ⅔ H_0 + ⅓ x + h/3 k_2 and then + h/3 k_3: two registers.
    """
    h, middle = t_next - t, 0.5 * (t + t_next)
    e = b.evaluate(t)
    b.row(e.x + h / 2 * _slope(b, e), (0, e.x))
    e = b.evaluate(middle)
    k2 = _slope(b, e)
    b.row(b.H(0) + h / 2 * k2, (1, 2 / 3 * b.H(0) + 1 / 3 * e.x + h / 3 * k2))
    k3 = _slope(b, b.evaluate(middle))
    b.row(b.H(0) + h * k3, (1, b.H(1) + h / 3 * k3))
    k4 = _slope(b, b.evaluate(t_next))
    b.row(b.H(1) + h / 6 * k4)
