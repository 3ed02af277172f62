"""DDPM's variational bound in bits per dimension (Ho et al. 2020; Nichol & Dhariwal 2021).

A chain of T levels, index i = the paper's t − 1, bounds the probability of discrete data:

    −log P(x_0) ≤ E[L_T + Σ_{t>1} L_{t−1} + L_0]                            (Ho et al. 2020, eq. 5)

    L_T      KL(q(x_T | x_0) ‖ N(0, 1)), the prior's
    L_{t−1}  KL(q(x_{t−1} | x_t, x_0) ‖ N(μ_θ, ς_t²))                                      (eq. 8)
    L_0      −log of the mass of N(μ_θ, ς_1²) in the bin of x_0's level, the decoder's    (eq. 13)

The two Gaussians of L_{t−1} have the mean a·(x_0 or D) + b·x_t of `posterior_mean`, so that, with
the posterior's variance β̃ and ln ς² = ln β̃ + v' ℓ, ℓ = ln(β/β̃), it is per element

    L_{t−1} = ½ [v' ℓ + e^(−v' ℓ) − 1 + a² (x_0 − D)² / ς²].
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sbm_fast import noise
from sbm_fast.arguments import check_dtype, placement
from sbm_fast.bits import mean_and_error
from sbm_fast.dequantisation import (
    Range,
    check_levels,
    discretised_gaussian,
    level_index,
    level_values,
)
from sbm_fast.ladder import DDPMSchedule
from sbm_fast.methods.chain import CLEAN, posterior_mean
from sbm_fast.methods.clipping import split
from sbm_fast.methods.compat import ddpm_step
from sbm_fast.methods.ddpm import chosen_variance
from sbm_fast.model import Match, ScoreModel, as_score_model
from sbm_fast.module_state import eval_mode
from sbm_fast.nn.conv import packed
from sbm_fast.ops.langevin_epsilon import sample_sum
from sbm_fast.process import SDE, count
from sbm_fast.row_step import checked_output

__all__ = ["BoundResult", "ddpm_chain", "variational_bound"]


@dataclass(frozen=True, eq=False)
class BoundResult:
    """The bound of N samples in bits per dimension, float64.

    Attributes:
        bits_per_dim [N]: mean of `columns`; prior + the sum of `terms`.
        stderr [N]: its standard error over the draws, NaN for one draw.
        columns [draws, N]: the bound by each draw of the noise.
        prior [N]: L_T, which needs no draw.
        terms [T, N]: L_{t−1} at index t − 1, mean over the draws; terms[0] is the decoder's.
        nfe: network evaluations for each sample, draws · T.
        seed: that gave the keys; None when `keys` were given.
        seconds: wall time.
    """

    bits_per_dim: Tensor
    stderr: Tensor
    columns: Tensor
    prior: Tensor
    terms: Tensor
    nfe: int
    seed: int | None
    seconds: float

    @property
    def decoder(self) -> Tensor:
        """L_0 [N], the discretised Gaussian's share."""
        return self.terms[0]

    @property
    def mean(self) -> float:
        """Mean over the samples."""
        return mean_and_error(self.bits_per_dim)[0]

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` by the spread between samples, which holds that of the draws;
        NaN for one sample."""
        return mean_and_error(self.bits_per_dim)[1]


def variational_bound(
    model: object,
    schedule: DDPMSchedule,
    x: Tensor,
    *,
    data_range: Range = (-1.0, 1.0),
    levels: int = 256,
    variance: str | None = None,
    clip_denoised: float | None = None,
    draws: int = 1,
    seed: int | None = None,
    keys: Tensor | None = None,
    first_sample: int = 0,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> BoundResult:
    """DDPM's variational bound of −log₂ P(x) in bits per dimension; the formulas head the module.

    A draw visits each of the T levels once, at x_t = m x_0 + σ ε. ε is the noise of stream TRAINING
    (the forward process, as in training) at draw repetition · T + index, so that a sample's bound
    depends on its key and not on its batch.

    The decoder's variance ς_1² cannot be β̃_1 = 0. As in the papers' code β̃_2 stands for it, and
    "beta" too takes β̃_2 at the last step (which gives the better bound, says that code); "learned"
    goes from β̃_2 to β_1. A schedule of one level has no β̃_2 and takes β_1.

    Args:
        model: as in `sbm_fast.sample`; trained under this schedule, or under another SDE that has
            the noise-to-signal ratio of each of its levels.
        schedule: the chain; `ddpm_chain` makes that of an SDE.
        x: data [N, …] on the levels, floating.
        data_range, levels: lowest and highest level of the data, and how many there are.
        variance: ς² as in method "ddpm": "beta" (v' = 1), "beta_tilde" (v' = 0), "learned" (v' =
            (v + 1)/2 of the network); None: "learned" for a network that has it, else "beta".
        clip_denoised: L clamps D to ±L; the papers evaluate with L = 1.
        draws: repetitions of the whole sum.
        seed, keys, first_sample: which noise the samples get, as in `sbm_fast.sample`.
        cond: keyword arguments for the network; tensors of first dimension N belong to the samples.
        batch_size: samples in one evaluation; None: all.
        dtype: of x_t, torch.float32 or torch.float64. The terms are float64 in any case.
        net_dtype, device, progress: as in `sbm_fast.sample`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came: data outside
            the range or between two levels; outputs that are not finite, with step, time and
            sample.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 5, 8 and 13; Nichol & Dhariwal 2021 (2102.09672),
    eq. 4–7 and 15.
    """
    if not isinstance(schedule, DDPMSchedule):
        raise TypeError(
            f"schedule: expected a DDPMSchedule, such as DDPMSchedule.linear(), got {schedule!r}"
        )
    check_levels(x, data_range, levels)
    chain = _Chain.of(as_score_model(model, schedule), schedule, variance, clip_denoised)
    _check_shape(x, chain.model)
    check_dtype("dtype", dtype, (torch.float32, torch.float64))
    place, net_dtype = placement(chain.model, device, net_dtype, dtype)
    if count("draws", draws) * schedule.levels > _DRAWS:
        raise ValueError(f"draws: expected at most {_DRAWS // schedule.levels}, got {draws}")
    size = max(1, len(x)) if batch_size is None else count("batch_size", batch_size)
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"cond: expected a dict of keyword arguments, got {type(cond).__name__}")
    if keys is None:
        seed = noise.fresh_seed() if seed is None else seed
        keys = noise.keys(seed, len(x), first_sample, place)
    else:
        noise.check_keys(keys, len(x), seed, first_sample)
        keys = keys.to(place)

    begin = time.perf_counter()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = [slice(start, start + size) for start in range(0, len(x), size)]
    with (
        torch.no_grad(),
        eval_mode(chain.model.net),
        packed(chain.model.net),
        tqdm(total=len(rows) * draws * len(chain.levels), disable=not progress) as bar,
    ):
        for some in rows:
            own = _own(cond or {}, len(x), some)
            data = _Data.of(x[some].to(place), data_range, levels)
            batch = _Batch(chain, data, keys[some], own, dtype, net_dtype, some.start, bar)
            parts.append(batch.bound(draws))
    return _result(parts, seed, time.perf_counter() - begin)


_DRAWS = 2**32  # of a stream


def ddpm_chain(sde: SDE, levels: int = 1000) -> DDPMSchedule:
    """The chain whose level i has σ/m of the SDE's time t_max (i + 1)/N, and m² + σ² = 1.

    For `VPSDE` these are the SDE's own levels. A network that was trained under the SDE knows them
    all, which it does not with another schedule that ends at more noise.
    """
    n = count("levels", levels)
    nsr2 = np.concatenate([[0.0], sde.nsr(sde.t_max * np.arange(1, n + 1) / n) ** 2])
    return DDPMSchedule(np.diff(nsr2) / (1 + nsr2[1:]))


@dataclass(frozen=True)
class _Level:
    """A level of the chain, in float64.

    Attributes:
        of_data: a, the weight of x_0 in the posterior's mean.
        log_smallest, log_spread: ln ς² = log_smallest + v' log_spread.
        share: v', None where the network gives it.
    """

    match: Match
    of_data: float
    log_smallest: float
    log_spread: float
    share: float | None

    @classmethod
    def of(cls, model: ScoreModel, schedule: DDPMSchedule, i: int, share: float | None) -> _Level:
        step, match = ddpm_step(schedule, i), model.match(schedule, i)
        smallest, below = step.posterior_std, CLEAN
        if i > 0:
            below = float(schedule.mean_scale(i - 1)), float(schedule.std(i - 1))
        else:
            smallest = math.sqrt(step.beta)
            if schedule.levels > 1:
                smallest = ddpm_step(schedule, 1).posterior_std
            share = None if share is None else 0.0
        of_data, _ = posterior_mean(step, match.sigma, *below)
        log_smallest = 2 * math.log(smallest)
        return cls(match, of_data, log_smallest, math.log(step.beta) - log_smallest, share)

    def divergence(self, x0: Tensor, denoised: Tensor, share: Tensor) -> Tensor:
        """L_{t−1} of every element, in nats."""
        wider = share * self.log_spread  # ln(ς²/β̃)
        excess = (self.of_data * (x0 - denoised)) ** 2 * torch.exp(-wider - self.log_smallest)
        return 0.5 * (wider + torch.expm1(-wider) + excess)


@dataclass(frozen=True)
class _Chain:
    """What is the same for all samples."""

    model: ScoreModel
    levels: list[_Level]
    clip: float | None

    @classmethod
    def of(
        cls, model: ScoreModel, schedule: DDPMSchedule, variance: str | None, clip: float | None
    ) -> _Chain:
        static, dynamic = split(clip)
        if dynamic is not None:
            raise TypeError(f"clip_denoised: the bound takes a number or None, got {dynamic!r}")
        share = _SHARES[chosen_variance(model, variance)]
        levels = [_Level.of(model, schedule, i, share) for i in range(schedule.levels)]
        return cls(model, levels, static)


_SHARES = {"beta": 1.0, "beta_tilde": 0.0, "learned": None}


@dataclass(frozen=True, eq=False)
class _Data:
    """Discrete data: which level, int64, and its value, float64."""

    index: Tensor
    value: Tensor
    data_range: Range
    levels: int

    @classmethod
    def of(cls, x: Tensor, data_range: Range, levels: int) -> _Data:
        index = level_index(x, data_range, levels)
        return cls(index, level_values(index, data_range, levels), data_range, levels)

    def log_mass(self, mean: Tensor, std: Tensor) -> Tensor:
        return discretised_gaussian(self.index, mean, std, self.data_range, self.levels)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Samples that go through the network together; `first` is the number of the first."""

    chain: _Chain
    data: _Data
    keys: Tensor
    cond: dict[str, Any]
    dtype: torch.dtype
    net_dtype: torch.dtype
    first: int
    bar: Any

    def bound(self, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """(prior [B], mean terms [T, B], columns [draws, B]) in bits per dimension."""
        bits = 1 / (self.data.value[0].numel() * math.log(2))
        prior = bits * self.prior()
        total, columns = torch.zeros((), device=prior.device), []
        for repetition in range(draws):
            terms = bits * self.terms(repetition)
            total = total + terms
            columns.append(prior + sample_sum(terms.T))
        return prior, total / draws, torch.stack(columns)

    def prior(self) -> Tensor:
        """L_T of each sample, in nats: KL(N(m x_0, σ²) ‖ N(0, 1)), σ² = 1 − m²."""
        signal = self.chain.levels[-1].match.m ** 2
        squares = signal * self.data.value**2
        return sample_sum(0.5 * (squares - signal - math.log1p(-signal)))

    def terms(self, repetition: int) -> Tensor:
        """[T, B] in nats, from one draw of the noise."""
        steps, x0 = len(self.chain.levels), self.data.value
        terms = x0.new_empty(steps, len(x0))
        finite = torch.empty(steps, len(x0), dtype=torch.bool, device=x0.device)
        for i in reversed(range(steps)):
            level, draw = self.chain.levels[i], repetition * steps + i
            z = noise.normal(
                None, x0.shape, draw=draw, stream=noise.TRAINING, keys=self.keys, device=x0.device
            )
            x_t = (level.match.m * x0 + level.match.sigma * z.double()).to(self.dtype)
            f, share = self._outputs(level, x_t)
            denoised = level.match.denoiser.x * x_t.double() + level.match.denoiser.F * f.double()
            if self.chain.clip is not None:
                denoised = denoised.clamp(-self.chain.clip, self.chain.clip)
            if i > 0:
                nats = level.divergence(x0, denoised, share)
            else:
                std = torch.exp(0.5 * (level.log_smallest + share * level.log_spread))
                nats = -self.data.log_mass(denoised, std)
            terms[i] = sample_sum(nats)
            # A clamp hides an infinite output.
            finite[i] = torch.isfinite(f).reshape(len(f), -1).all(1) & torch.isfinite(terms[i])
            self.bar.update()
        if not finite.all():
            raise ValueError(self._not_finite(~finite))
        return terms

    def _outputs(self, level: _Level, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """(F, v') at a level."""
        model = self.chain.model
        inputs = (level.match.c_in * x_t).to(self.net_dtype)
        wide = self.net_dtype == torch.float64
        label_dtype = torch.float64 if wide else torch.float32
        label = torch.full((len(x_t),), level.match.label, dtype=label_dtype, device=x_t.device)
        output = model(inputs, label, **self.cond)
        shape = list(x_t.shape)
        if model.variance is not None:
            shape[1] *= 2
        output = checked_output(output, inputs, tuple(shape))
        f, v = output.chunk(2, dim=1) if model.variance is not None else (output, output)
        if level.share is None:
            return f, 0.5 * (v.double() + 1)
        return f, torch.tensor(level.share, dtype=torch.float64, device=x_t.device)

    def _not_finite(self, bad: Tensor) -> str:
        steps = len(self.chain.levels)
        i = int(bad.any(1).nonzero().max())  # levels are visited from the last down
        sample = self.first + int(bad[i].nonzero().min())
        return (
            "model: its outputs, or what the bound made of them, are not finite for "
            f"{int(bad.any(0).sum())} of {len(self.keys)} samples, first for sample {sample} at "
            f"step {steps - i} of {steps} (t = {i})"
        )


def _result(
    parts: list[tuple[Tensor, Tensor, Tensor]], seed: int | None, seconds: float
) -> BoundResult:
    prior, terms, columns = (torch.cat(values, dim=-1) for values in zip(*parts, strict=True))
    draws = len(columns)
    bits = sample_sum(columns.T) / draws
    squares = sample_sum((columns - bits).T ** 2)
    stderr = torch.sqrt(squares / (draws - 1) / draws) if draws > 1 else bits * math.nan
    return BoundResult(bits, stderr, columns, prior, terms, draws * len(terms), seed, seconds)


def _check_shape(x: Tensor, model: ScoreModel) -> None:
    expected = model.sample_shape
    fits = x.dim() > 0 and (expected is None or tuple(x.shape[1:]) == tuple(expected))
    if not fits or x.numel() == 0 or (model.variance is not None and x.dim() < 2):
        inner = "…" if expected is None else ", ".join(map(str, expected))
        raise ValueError(
            f"x: expected shape (samples, {inner}) with at least one value, got {tuple(x.shape)}"
        )


def _own(cond: Mapping[str, Any], count: int, rows: slice) -> dict[str, Any]:
    return {
        name: value[rows]
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
        else value
        for name, value in cond.items()
    }
