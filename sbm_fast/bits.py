"""Bits per dimension of quantised data: log-likelihood of what is uniform in each level's bin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.arguments import warn_caller
from sbm_fast.dequantisation import Range, bin_width, check_levels, dequantise
from sbm_fast.likelihood import LikelihoodResult, log_likelihood
from sbm_fast.process import count


@dataclass(frozen=True, eq=False)
class BitsResult:
    """Bits per dimension of N samples; float64.

    Attributes:
        bits_per_dim: [N]; NaN where a sample did not finish.
        stderr: [N] standard error: over the draws where there are two or more (dequantisation and
            probes), else of the probes alone (NaN for one probe, 0 for the exact trace).
        mean, mean_stderr: over the samples, with the standard error of that mean (from the spread
            between samples, which holds the other errors; NaN for one sample).
        log_prob: [R, N] log-density of each dequantised draw, nats.
        nfe: int64 [N] network evaluations, all draws together.
        result: `LikelihoodResult` of the last draw.
        seed: the seed of keys; None when `keys` were given.
        seconds: wall time of the solves.
    """

    bits_per_dim: Tensor
    stderr: Tensor
    mean: float
    mean_stderr: float
    log_prob: Tensor
    nfe: Tensor
    result: LikelihoodResult
    seed: int | None
    seconds: float


def bits_per_dim(
    model: object,
    sde: object,
    x: Tensor,
    *,
    data_range: Range = (-1, 1),
    levels: int = 256,
    draws: int = 1,
    importance: bool = False,
    seed: int | None = None,
    keys: Tensor | None = None,
    first_sample: int = 0,
    first_probe: int = 0,
    probes: int = 1,
    **options: Any,
) -> BitsResult:
    """Bits per dimension of quantised data, by uniform dequantisation (Theis et al. 2016).

        −log₂ P(x)/d ≤ −(E_u log p(x + (u − ½) Δ) + d ln Δ)/(d ln 2)

    with Δ = (high − low)/(levels − 1) and u uniform on (0, 1]^d; P is the probability of the whole
    bin. The declared range and number of levels are all that enters, so data in [0, 1] and the
    same data in [−1, 1], with the model to match, have the same bits.

    Args:
        model, sde: as in `log_likelihood`.
        x: data [N, …] on the levels low, low + Δ, …, high.
        data_range: (low, high).
        levels: number of levels, 256 for 8-bit images.
        draws: dequantisations of every sample, each with probes of its own.
        importance: −log₂ of the mean of the bins' estimates, not the mean of −log₂: the tighter
            bound of importance weighting (Burda et al. 2016). It holds for the exact trace; an
            estimate of the trace enters an exponential, which inflates it (a warning says so).
        seed, keys, first_sample, first_probe, probes: as in `log_likelihood`.
        options: the other arguments of `log_likelihood`.

    Raises:
        ValueError, TypeError: naming the argument; x outside the range, or between its levels.
    """
    check_levels(x, data_range, levels)
    if x.dim() == 0:
        raise ValueError("x: expected shape (samples, …), got ()")
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision cannot hold the bins
    draws = count("draws", draws)
    if not isinstance(importance, bool):
        raise TypeError(f"importance: expected True or False, got {importance!r}")
    if importance and draws < 2:
        raise ValueError(f"importance: expected two draws or more, got draws={draws}")
    count("probes", probes)
    count("first_probe", first_probe, least=0)
    if keys is None:
        seed = noise.fresh_seed() if seed is None else seed
        keys = noise.keys(seed, len(x), first_sample, x.device)
    else:
        noise.check_keys(keys, len(x), seed, first_sample)
    results = [
        log_likelihood(
            model,
            sde,
            dequantise(x, keys, draw, data_range, levels),
            keys=keys,
            probes=probes,
            first_probe=first_probe + draw * probes,
            **options,
        )
        for draw in range(draws)
    ]
    if importance and results[0].trace != "exact":
        warn_caller(
            "importance: the trace is estimated, and half the variance of its estimate is added to "
            "the log of the mean; exact=True gives a bound"
        )
    log_prob = torch.stack([result.log_prob for result in results])
    per_bit = math.prod(x.shape[1:]) * math.log(2)
    volume = math.log2(bin_width(data_range, levels))
    bits, error = _combined(log_prob, importance)
    bits, error = -bits / per_bit - volume, error / per_bit
    if draws == 1:
        error = results[0].stderr / per_bit
    mean, mean_stderr = mean_and_error(bits)
    return BitsResult(
        bits_per_dim=bits,
        stderr=error,
        mean=mean,
        mean_stderr=mean_stderr,
        log_prob=log_prob,
        nfe=torch.stack([result.nfe for result in results]).sum(0),
        result=results[-1],
        seed=seed,
        seconds=sum(result.seconds for result in results),
    )


def mean_and_error(bits: Tensor) -> tuple[float, float]:
    """Mean over samples [N] and its standard error from their spread."""
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return float(bits.mean()), error


def _combined(log_prob: Tensor, importance: bool) -> tuple[Tensor, Tensor]:
    """The log-probability of R draws and its standard error over them (jackknife), [N] each."""
    draws = len(log_prob)
    if draws == 1:
        return log_prob[0], torch.full_like(log_prob[0], math.nan)
    if not importance:
        spread = log_prob.std(0) if log_prob.numel() else log_prob[0]
        return log_prob.mean(0), spread / math.sqrt(draws)
    total = torch.logsumexp(log_prob, dim=0) - math.log(draws)
    others = ~torch.eye(draws, dtype=torch.bool, device=log_prob.device)
    left_out = torch.stack(
        [torch.logsumexp(log_prob[other], dim=0) - math.log(draws - 1) for other in others]
    )
    spread = ((left_out - left_out.mean(0)) ** 2).sum(0) * (draws - 1) / draws
    return total, spread.sqrt()
