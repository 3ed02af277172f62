"""Euler–Maruyama for the reverse-time SDE (Song et al. 2021, eq. 6; Anderson 1982)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sbm_fast.methods.builder import Evaluation, Lin
from sbm_fast.methods.chain import Step, chain_steps
from sbm_fast.methods.compat import PEER, score_sde_steps
from sbm_fast.methods.setup import Setup

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan
    from sbm_fast.sde import SDE


def euler_maruyama_update(sde: SDE, e: Evaluation, dt: float, *, noise: bool = True) -> Lin:
    """x' = x + [f(t) x − g(t)² s] Δt + g(t) √|Δt| z, with Δt < 0."""
    f, g = float(sde.drift_coef(e.t)), float(sde.diffusion(e.t))
    x = e.x + (f * e.x - g**2 * e.s) * dt
    return x + g * math.sqrt(abs(dt)) * e.z if noise else x


def euler_maruyama_steps(
    run: Setup, steps: int | None, schedule: Schedule | None, *, corrected: bool = False
) -> list[Step]:
    """N steps from t_max to t_min, or score_sde's; ValueError on a ladder."""
    run.continuous()
    if run.compat:
        return score_sde_steps(run, steps, schedule, tables=corrected)
    times = run.times(steps, schedule, default=1000, ends=True)
    return chain_steps(times, run.builder(float(times[0])).level, ends=True)


def em(run: Setup, *, steps: int | None = None, schedule: Schedule | None = None) -> Plan:
    """Euler–Maruyama, ``steps`` steps from t_max to t_min.

    x' = x + [f(t) x − g(t)² s] Δt + g(t) √|Δt| z on the grid t_max = t_0 > … > t_N = t_min;
    the network is evaluated at t_0 … t_{N−1}.

    Args:
        run: the run.
        steps: number of steps N, default 1000.
        schedule: kind of time grid or N + 1 times, default "uniform" ("karras" for the EDM SDE).

    ``denoise``: "mean" (default) drops the last noise; "tweedie" evaluates D at t_min; False.
    ``compat="score_sde"``: evaluation times linspace(T, eps, N) in float32 and Δt = −1/N.

    Raises:
        ValueError: on a discrete ladder, which has no drift and diffusion.
    """
    run.check_compat(PEER)
    ends = ("mean", False) if run.compat else ("mean", "tweedie", False)
    denoise = run.denoise_mode("mean", *ends)
    path = euler_maruyama_steps(run, steps, schedule)
    b = run.builder(run.sde.t_max if run.compat else path[0].t)
    b.start()
    for step in path:
        noise = not (denoise == "mean" and step is path[-1])
        b.row(euler_maruyama_update(run.sde, b.evaluate(step.t), step.dt, noise=noise))
    if denoise == "tweedie":
        b.row(b.evaluate(path[-1].t_next).D)
    return b.build(steps=len(path), denoise=denoise, compat=run.compat or "none")
