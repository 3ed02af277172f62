"""DDPM's sampler (Ho et al. 2020, Algorithm 2) on variance-preserving chains, respaced and with
learned variance (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sbm_fast.methods.chain import chain_steps, posterior_mean
from sbm_fast.methods.compat import DDPM_PEER, ddpm_steps
from sbm_fast.methods.setup import Setup, choice
from sbm_fast.sde import VPSDE, DDPMSchedule

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.model import ScoreModel
    from sbm_fast.plan import Plan

VARIANCES = ("beta", "beta_tilde", "learned")
_ALIASES = {"fixedlarge": "beta", "fixedsmall": "beta_tilde"}


def ddpm(
    run: Setup,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    variance: str | None = None,
) -> Plan:
    """DDPM: x' = (√ᾱ' β D + √α (1 − ᾱ') x) / (1 − ᾱ) + ς z, ending at x' = D without noise.

    ᾱ → ᾱ' are neighbouring levels of the run, α = ᾱ/ᾱ' and β = 1 − α: on every level of a
    `DDPMSchedule` its own β, on a sub-sequence that of the respaced chain (Nichol & Dhariwal 2021,
    eq. 19), on the continuous VP SDE that of its time grid. The mean is the posterior's (Ho et al.
    2020, eq. 7), and with D = (x − √(1−ᾱ) ε)/√ᾱ line 4 of Algorithm 2. With z ~ N(0, 1),

        "beta"        ς² = β, the upper bound (data N(0, 1))
        "beta_tilde"  ς² = β̃ = β (1 − ᾱ') / (1 − ᾱ), the lower bound (a single datum)
        "learned"     ln ς² = v' ln β + (1 − v') ln β̃, v' = (v + 1)/2 for each element, v from the
                      network's second half of channels (Nichol & Dhariwal 2021, eq. 15)

    The paper finds the first two alike over 1000 steps; its code samples CIFAR-10 with "beta". With
    few steps β is far too large: take "beta_tilde" there.

    Args:
        run: the run.
        steps: number of evaluations, default every level of the schedule, 1000 for the VP SDE.
        schedule: kind of time grid, or the sub-sequence of times itself, descending.
        variance: default "learned" for a ``ScoreModel(…, variance="learned_range")``, else "beta".
            "fixedlarge" and "fixedsmall", the names in the paper's code, mean the first two.

    ``denoise``: "mean" only; the last step draws no noise, so that β̃ = 0 there (whose logarithm
    the papers' code clips) is never read.
    ``clip_denoised`` clamps D; the paper's code takes 1.0.
    ``compat="ddpm"``: a `DDPMSchedule` and every one of its levels, β, ᾱ and the posterior's
    coefficients by the paper's products, "beta" or "beta_tilde". A network of that code takes the
    integer level: ``predicts="eps", time="index"``.

    Raises:
        ValueError: for an SDE that is not variance preserving; for "learned" with a network that
            learned none; for options that the peer does not have under compat.
    """
    run.check_compat(DDPM_PEER)
    if not isinstance(run.sde, (VPSDE, DDPMSchedule)):
        raise ValueError(
            f"sde: method {run.method!r} needs a variance-preserving chain (DDPMSchedule or VPSDE),"
            f" got {run.sde!r}; use ancestral there"
        )
    variance = chosen_variance(run.model, variance, run.compat)
    run.denoise_mode("mean", "mean", because="its last step draws no noise")
    if run.compat:
        path = ddpm_steps(run, steps, schedule)
    else:
        times = run.times(steps, schedule, default=1000)
        path = chain_steps(times, run.builder(float(times[0])).level, ends=False)
    b = run.builder(path[0].t)
    b.start()
    for step in path:
        e = b.evaluate(step.t)
        if step.clean:
            b.row(e.D)
            continue
        m_next, sigma_next = b.level(step.t_next)
        of_data, of_state = posterior_mean(step, e.sigma, m_next, sigma_next)
        mean = of_data * e.D + of_state * e.x
        if variance == "learned":
            if step.posterior_std <= 0:
                raise ValueError(
                    f"schedule: expected times that lie further apart, {step.t!r} and "
                    f"{step.t_next!r} have the same σ/m in float64 (β = 0 has no logarithm)"
                )
            b.row(mean + e.z, log_std=(math.log(step.posterior_std), 0.5 * math.log(step.beta)))
        else:
            std = math.sqrt(step.beta) if variance == "beta" else step.posterior_std
            b.row(mean + std * e.z)
    return b.build(steps=len(path), variance=variance, compat=run.compat or "none")


def chosen_variance(model: ScoreModel, variance: str | None, compat: str | None = None) -> str:
    """One of `VARIANCES`: that of the name, or for None the network's own, else "beta"."""
    learned = model.variance is not None
    if variance is None:
        return "learned" if learned and not compat else "beta"
    variance = choice("variance", variance, (*VARIANCES, *_ALIASES))
    variance = _ALIASES.get(variance, variance)
    if variance == "learned" and compat:
        raise ValueError(f"variance: compat={DDPM_PEER!r} has none that is learned")
    if variance == "learned" and not learned:
        raise ValueError(
            "variance: 'learned' needs a network with twice the channels, "
            "ScoreModel(…, variance='learned_range'); this one has none"
        )
    return variance
