"""compat="score_sde": grids, tables and indices of yang-song/score_sde_pytorch (sampling.py).

Its times are t_i = linspace(T, eps, N) in float32 with eps = 1e-3 (VP, sub-VP) or 1e-5 (VE); its
discrete tables have N entries and are indexed by floor(t (N − 1)), a float32 product. For N = 2000
and eps = 1e-3 that floor slips: one index repeats and index 0 is never reached. All this is kept;
the tables themselves are float64 here.

compat="ddpm": the chain of hojonathanho/diffusion, every level with its own β.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from sbm_fast.methods.chain import Step
from sbm_fast.methods.setup import Setup
from sbm_fast.process import count
from sbm_fast.schedule import time_range
from sbm_fast.sde import SDE, VESDE, VPSDE, DDPMSchedule, Ladder, NCSNLadder, SubVPSDE

PEER = "score_sde"
DDPM_PEER = "ddpm"


def score_sde_steps(
    run: Setup, steps: int | None, schedule: object, *, tables: bool = True
) -> list[Step]:
    """The N steps of score_sde's ``get_pc_sampler``, descending.

    ``tables`` says that the method reads the discrete tables; Euler–Maruyama alone does not.

    A ladder keeps its own N and tables; its network is evaluated at the integer index.
    ``t_min`` stands for score_sde's argument ``eps``.

    Raises:
        ValueError: for an SDE that score_sde does not have, for a schedule or t_max of one's own,
            for another number of steps than the ladder's, and for so few steps that the table of
            β_i = β(t)/N leaves (0, 1) (score_sde gives NaN there).
    """
    if schedule is not None:
        raise ValueError(f"schedule: compat={PEER!r} has its own grid, got {schedule!r}")
    if run.t_max is not None:
        raise ValueError(f"t_max: compat={PEER!r} starts at T = 1, got {run.t_max!r}")
    sde = run.sde
    if not isinstance(sde, (VPSDE, SubVPSDE, VESDE, Ladder)):
        raise ValueError(f"compat: {PEER!r} has no {type(sde).__name__}")
    if isinstance(sde, Ladder):
        if steps is not None and count("steps", steps) != sde.levels:
            raise ValueError(
                f"steps: compat={PEER!r} keeps the ladder's {sde.levels} levels, got {steps!r}"
            )
        if run.t_min is not None:
            raise ValueError(f"t_min: a ladder under compat={PEER!r} takes none, got {run.t_min!r}")
        n = sde.levels
    else:
        n = count("steps", 1000 if steps is None else steps)
    variance_exploding = isinstance(sde, (VESDE, NCSNLadder))
    eps = 1e-5 if variance_exploding else 1e-3
    if run.t_min is not None:
        eps = time_range(sde, None, run.t_min, strict=True)[1]
    times = torch.linspace(1.0, eps, n)
    index = (times * (n - 1) / 1).long().tolist()
    at = [float(i) for i in index] if isinstance(sde, Ladder) else times.double().tolist()
    if variance_exploding:
        sigmas = _sigmas(sde, n)
        return [_ve_step(t, i, sigmas, n) for t, i in zip(at, index, strict=True)]
    betas = _betas(sde, n)
    if tables and not betas.max() < 1:
        raise ValueError(
            f"steps: the table of compat={PEER!r} needs more than beta_max = {betas.max() * n:g} "
            f"steps, got {n}"
        )
    return [_vp_step(t, float(betas[i]), n) for t, i in zip(at, index, strict=True)]


def _ve_step(t: float, i: int, sigmas: np.ndarray, n: int) -> Step:
    sigma = float(sigmas[i])
    adjacent = float(sigmas[i - 1]) if i > 0 else 0.0
    beta = sigma**2 - adjacent**2
    return Step(t, 1.0, beta, adjacent * math.sqrt(beta) / sigma, 1.0, dt=-1.0 / n)


def _vp_step(t: float, beta: float, n: int) -> Step:
    alpha = 1.0 - beta
    k = math.sqrt(alpha) if alpha > 0 else math.nan
    return Step(t, k, beta, math.nan, alpha, dt=-1.0 / n)


def _sigmas(sde: SDE, n: int) -> np.ndarray:
    if isinstance(sde, VESDE):
        return np.exp(np.linspace(math.log(sde.sigma_min), math.log(sde.sigma_max), n))
    return np.array([float(sde.std(i)) for i in range(n)])


def _betas(sde: SDE, n: int) -> np.ndarray:
    if isinstance(sde, DDPMSchedule):
        return np.asarray(sde.betas, dtype=np.float64)
    if isinstance(sde, (VPSDE, SubVPSDE)):
        return np.linspace(sde.beta_min / n, sde.beta_max / n, n)
    raise ValueError(f"compat: {PEER!r} has no ladder {type(sde).__name__}")


def ddpm_steps(run: Setup, steps: int | None, schedule: object) -> list[Step]:
    """The N steps of Ho et al. 2020, Algorithm 2, descending to level 0 (the paper's t = 1).

    Raises:
        ValueError: for an SDE that is no `DDPMSchedule`, and for a grid of one's own: the peer
            visits every level.
    """
    if not isinstance(run.sde, DDPMSchedule):
        raise ValueError(
            f"sde: compat={DDPM_PEER!r} needs a DDPMSchedule (the paper's is "
            f"DDPMSchedule.linear()), got {run.sde!r}"
        )
    own = {"schedule": schedule, "t_max": run.t_max, "t_min": run.t_min}
    for name, value in own.items():
        if value is not None:
            raise ValueError(f"{name}: compat={DDPM_PEER!r} visits every level, got {value!r}")
    betas = run.sde.betas
    n = len(betas)
    if steps is not None and count("steps", steps) != n:
        raise ValueError(f"steps: compat={DDPM_PEER!r} keeps the schedule's {n}, got {steps!r}")
    return [ddpm_step(run.sde, i) for i in range(n - 1, -1, -1)]


def ddpm_step(sde: DDPMSchedule, i: int) -> Step:
    """The chain's step down from level i, with the schedule's own β_i."""
    beta = float(sde.betas[i])
    below = float(sde.std(i - 1)) if i > 0 else 0.0
    posterior_std = math.sqrt(beta) * below / float(sde.std(i))
    k = math.sqrt(1.0 - beta)
    return Step(float(i), k, beta, posterior_std, 1.0 - beta, -1.0, i - 1.0, clean=i == 0)
