"""Fitted orders of the ODE solvers, against the exact solution for Gaussian data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plan_reference import WORLDS, score_model

from sbm_fast.methods import make_plan

MEAN, STD = 0.3, 0.5


def end_of_the_flow(name: str, t_max: float, t_min: float) -> tuple[float, float]:
    """Mean and std at t_min of the exact probability flow from N(0, prior²) at t_max.

    For N(μ, s²) data the flow keeps (x − m μ) / √(m² s² + σ²).
    """
    world = WORLDS[name]
    (m0, s0), (m1, s1) = world.level(t_max), world.level(t_min)
    v0, v1 = np.hypot(m0 * STD, s0), np.hypot(m1 * STD, s1)
    start = world.sde.prior_std if t_max == world.sde.t_max else s0
    return m1 * MEAN - m0 * MEAN * v1 / v0, start * v1 / v0


def error(name: str, steps: int, t_max: float, t_min: float, **options: Any) -> float:
    world = WORLDS[name]
    model = score_model(world, "eps")
    plan = make_plan("ode", model, world.sde, steps=steps, t_max=t_max, t_min=t_min, **options)
    mean, std = plan.gaussian(MEAN, STD)
    exact = end_of_the_flow(name, t_max, t_min)
    return float(np.hypot(mean[-1] - exact[0], std[-1] - exact[1]))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize(("name", "t_max", "t_min"), [("vp", 1, 0.05), ("ve", 0.9, 0.3)])
def test_order_of_the_ode_solvers(
    solver: str, order: int, name: str, t_max: float, t_min: float
) -> None:
    steps = np.array([40, 80, 160])
    errors = [error(name, n, t_max, t_min, solver=solver) for n in steps.tolist()]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("heun", "order"), [(True, 2), (False, 1)])
def test_order_of_edm(heun: bool, order: int) -> None:
    """The row before the last is at σ_min; there the flow keeps (x − μ) / √(s² + σ²)."""
    world = WORLDS["edm"]
    steps, errors = np.array([40, 80, 160]), []
    for n in steps.tolist():
        plan = make_plan(
            "edm", score_model(world, "x0"), world.sde, steps=n, sigma_min=0.05, heun=heun
        )
        mean, std = plan.gaussian(MEAN, STD)
        shrink = np.hypot(STD, 0.05) / np.hypot(STD, 80.0)
        errors.append(np.hypot(mean[-2] - MEAN * (1 - shrink), std[-2] - 80.0 * shrink))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ["em", "reverse_diffusion", "ancestral", "pc"])
def test_laws_converge_to_the_data(method: str) -> None:
    """Weak order one: the error of the final law halves with the step; it ends near the data."""
    world = WORLDS["vp"]
    errors = []
    for steps in (200, 400, 800):
        plan = make_plan(method, score_model(world), world.sde, steps=steps)
        mean, std = plan.gaussian(MEAN, STD)
        errors.append(abs(std[-1] - STD) + abs(mean[-1] - MEAN))
    assert errors[-1] < 0.01
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]
