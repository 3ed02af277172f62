"""Langevin dynamics: annealed over noise levels (NCSN), and plain at one level.

Song & Ermon 2019, Algorithm 1; Song & Ermon 2020 (NCSNv2), Algorithm 1 and section 3.
Convention: ε on the score and √(2ε) on the noise; the textbook's step size is δ = 2ε.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sbm_fast.methods.setup import Setup
from sbm_fast.process import TOLERANCE, count, finite

if TYPE_CHECKING:
    from sbm_fast.methods.builder import Evaluation, Lin
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan
    from sbm_fast.process import SDE

RELATIVE_STEP = 0.062
"""ε / σ² of NCSNv2 on CIFAR-10: 6.2e-6 at σ_L = 0.01."""


def langevin_update(e: Evaluation, epsilon: float, *, noise: bool = True) -> Lin:
    """x' = x + ε s + √(2ε) z."""
    x = e.x + epsilon * e.s
    return x + math.sqrt(2 * epsilon) * e.z if noise else x


def ald(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    inner_steps: int = 5,
    step_size: float | None = None,
) -> Plan:
    """Annealed Langevin dynamics: ``inner_steps`` Langevin rows at each noise level, descending.

    x' = x + ε_i s + √(2 ε_i) z with ε_i = step_size · (σ_i / σ_L)², σ_L the smallest level.
    It is a method for x = x_0 + σ ε. Other SDEs run it on the state x/m at their nsr = σ/m, where
    that is what they are; the result is D by default, else x_0 + σ_L ε. The start is the run's
    prior row (the originals start from uniform noise; the first level, σ_1 ≫ data, forgets it).

    Args:
        run: the run.
        steps: number of noise levels, default the ladder's, 232 for a continuous SDE.
        schedule: kind of time grid or the levels' times; default every level of a ladder,
            "log_snr" (geometric σ) for a continuous SDE.
        inner_steps: Langevin steps at each level (NCSN 100, NCSNv2 5).
        step_size: ε at the smallest level, in the units of σ². Default 0.062 σ_L², NCSNv2's
            6.2e-6 at σ_L = 0.01.

    ``denoise``: "tweedie" (default, NCSNv2: one more evaluation at σ_L, x' = D), "mean" drops the
    last noise, False keeps it (NCSN).
    """
    run.check_compat()
    inner_steps = count("inner_steps", inner_steps)
    denoise = run.denoise_mode("tweedie", "tweedie", "mean", False)
    times = run.times(steps, schedule, default=232, kind=None if run.levels else "log_snr")
    nsr = np.asarray(run.sde.nsr(times), dtype=np.float64)
    if nsr[-1] <= 0:
        raise ValueError(f"t_min: the smallest level has no noise, got nsr = {nsr[-1]}")
    if step_size is None:
        step_size = RELATIVE_STEP * float(nsr[-1]) ** 2
    step_size = finite("step_size", step_size, above=0)
    b = run.builder(float(times[0]), coordinate="x/m")
    b.start()
    for t, sigma in zip(times.tolist(), nsr.tolist(), strict=True):
        for j in range(inner_steps):
            last = t == times[-1] and j == inner_steps - 1
            epsilon = step_size * (sigma / float(nsr[-1])) ** 2
            b.row(langevin_update(b.evaluate(t), epsilon, noise=not (last and denoise == "mean")))
    if denoise == "tweedie":
        b.row(b.evaluate(float(times[-1])).D)
    return b.build(steps=len(times), inner_steps=inner_steps, step_size=step_size, denoise=denoise)


def _noisy_time(name: str, t: object, sde: SDE) -> float:
    time = finite(name, t)
    if not 0 <= time <= sde.t_max * (1 + TOLERANCE):
        raise ValueError(f"{name}: expected a time in [0, {sde.t_max:g}], got {t!r}")
    if sde.std(time) == 0:
        raise ValueError(f"{name}: there is no noise at this time (σ = 0), got {t!r}")
    return time


def langevin(
    run: Setup,
    *,
    steps: int | None = None,
    step_size: float | None = None,
    t: float | None = None,
    start_std: float | None = None,
) -> Plan:
    """Plain Langevin dynamics at one noise level: x' = x + (δ/2) s + √δ z.

    δ is the step size. At a small noise level it mixes slowly between modes, which is what annealed
    Langevin dynamics was made for.

    Args:
        run: the run.
        steps: number of Langevin steps, default 1000.
        step_size: δ, in the units of x². Default 0.124 σ(t)².
        t: time of the noise level, default t_min.
        start_std: standard deviation of the start where none is given, default the SDE's prior.

    ``denoise``: False (default), "mean" drops the last noise, "tweedie" adds x' = D.
    """
    run.check_compat()
    if run.t_max is not None:
        raise ValueError(f"t_max: langevin runs at one level t, got t_max={run.t_max!r}")
    if t is not None and run.t_min is not None:
        raise ValueError(f"t_min: langevin runs at t, got both t={t!r} and t_min={run.t_min!r}")
    name = "t" if run.t_min is None else "t_min"
    if t is None:
        t = run.sde.t_min if run.t_min is None else run.t_min
    t = _noisy_time(name, t, run.sde)
    steps = count("steps", 1000 if steps is None else steps)
    denoise = run.denoise_mode(False, "mean", "tweedie", False)
    sigma = float(run.sde.std(t))
    delta = 2 * RELATIVE_STEP * sigma**2 if step_size is None else step_size
    delta = finite("step_size", delta, above=0)
    std = finite("start_std", run.sde.prior_std if start_std is None else start_std, above=0)
    b = run.builder(t)
    b.start(std)
    for i in range(steps):
        drop = denoise == "mean" and i == steps - 1
        b.row(langevin_update(b.evaluate(t), delta / 2, noise=not drop))
    if denoise == "tweedie":
        b.row(b.evaluate(t).D)
    return b.build(steps=steps, step_size=delta, t=t, denoise=denoise)
