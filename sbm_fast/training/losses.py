"""Losses that train a score model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.ladder import Ladder
from sbm_fast.model import Match, ScoreModel, as_score_model
from sbm_fast.sde import SDE, as_sde

Weighting = str | Callable[[np.ndarray], np.ndarray]


def dsm(
    model: Any,
    sde: SDE,
    x: Tensor,
    *,
    seed: int = 0,
    step: int = 0,
    keys: Tensor | None = None,
    first_sample: int = 0,
    weighting: Weighting = "variance",
    t_min: float | None = None,
    t_max: float | None = None,
    cond: dict[str, Any] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Denoising score matching (Vincent 2011; Song et al. 2021, eq. 7).

        E_t λ(t) ‖s(x_t, t) + z/σ(t)‖² ,   x_t = m(t) x + σ(t) z ,   t ~ U(t_min, t_max]

    (on a ladder: t uniform over its levels t_min, ..., t_max).
    The norm is the sum over the coordinates of a sample. λ(t) by ``weighting``:

    - "variance": σ², every time counts alike for a network that predicts ε (Song & Ermon 2019);
    - "likelihood": g², a bound of the negative log-likelihood (Song et al. 2021, maximum likelihood
      training, thm. 1);
    - "edm": σ² (1 + nsr²/σ_data²), nsr = σ/m, every time counts alike for the network's F in the
      parameterisation "edm" (Karras et al. 2022, sec. 5);
    - a function of t: float64 [B] -> float64 [B].

    z is the noise of stream TRAINING and t of stream TRAINING_TIME at draw ``step``, so the loss of
    a sample depends on its key and the step, not on the batch it stands in.

    Args:
        model: whatever `as_score_model` takes.
        sde: the SDE that perturbs the data.
        x: data [B, ...], floating.
        seed, keys, first_sample: which noise the samples get, as in `sbm_fast.noise.normal`.
        step: the global training step.
        t_min, t_max: range of the times; None: the SDE's own.
        cond: keyword arguments for the network.
        reduction: "mean" over the samples, or "none": [B].

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """
    sde = as_sde(sde)
    score_model = as_score_model(model, sde)
    _check(x, reduction)
    if keys is None:
        keys = noise.keys(seed, len(x), first_sample, device=x.device)
    t = _times(sde, keys, step, t_min, t_max)
    z = _noise(x, keys, step)

    m, sigma = sde.mean_scale(t), sde.std(t)
    x_t = _column(m, x) * x + _column(sigma, x) * z
    residual = _score(score_model, sde, x_t, t, cond or {}) + z / _column(sigma, x)
    scale = np.sqrt(_weights(weighting, score_model, sde, t))
    loss = (_column(scale, x) * residual).flatten(1).square().sum(dim=1)
    return loss.mean() if reduction == "mean" else loss


def _score(model: ScoreModel, sde: SDE, x_t: Tensor, t: np.ndarray, cond: dict[str, Any]) -> Tensor:
    """s = p x_t + q F(c_in x_t, label), with (p, q, c_in, label) of each sample's own time."""
    matches = _matches(model, sde, t)
    c_in = np.array([match.c_in for match in matches])
    label = torch.tensor([match.label for match in matches], dtype=x_t.dtype, device=x_t.device)
    output = model(_column(c_in, x_t) * x_t, label, **cond)
    p = np.array([match.score.x for match in matches])
    q = np.array([match.score.F for match in matches])
    return _column(p, x_t) * x_t + _column(q, x_t) * output


def _matches(model: ScoreModel, sde: SDE, t: np.ndarray) -> list[Match]:
    """`ScoreModel.match` at every time; the SDE's functions are called once for all of them."""
    if model.sde not in (None, sde):
        return [model.match(sde, time) for time in t.tolist()]
    levels = (t, sde.nsr(t), sde.mean_scale(t), sde.std(t))
    return [
        model._match(sde, time, nsr, (m, sigma), (m, sigma))
        for time, nsr, m, sigma in zip(*(level.tolist() for level in levels), strict=True)
    ]


def _weights(weighting: Weighting, model: ScoreModel, sde: SDE, t: np.ndarray) -> np.ndarray:
    if callable(weighting):
        return np.asarray(weighting(t), dtype=np.float64)
    if weighting == "variance":
        return sde.std(t) ** 2
    if weighting == "likelihood":
        return sde.diffusion(t) ** 2
    if weighting == "edm":
        return sde.std(t) ** 2 * (1 + (sde.nsr(t) / model.sigma_data) ** 2)
    raise ValueError(
        f'weighting must be "variance", "likelihood", "edm" or a function of t, got {weighting!r}'
    )


def _times(
    sde: SDE, keys: Tensor, step: int, t_min: float | None, t_max: float | None
) -> np.ndarray:
    low = sde.t_min if t_min is None else t_min
    high = sde.t_max if t_max is None else t_max
    if not 0 <= low < high:
        raise ValueError(f"t_min and t_max must be 0 <= t_min < t_max, got {low} and {high}")
    draws = noise.uniform(
        None, (len(keys),), draw=step, stream=noise.TRAINING_TIME, keys=keys.cpu()
    )
    u: np.ndarray = draws.double().numpy()
    if isinstance(sde, Ladder):
        return low + np.ceil(u * (high - low + 1)) - 1
    return low + (high - low) * u


def _noise(x: Tensor, keys: Tensor, step: int) -> Tensor:
    return noise.normal(
        None,
        x.shape,
        draw=step,
        stream=noise.TRAINING,
        keys=keys,
        dtype=x.dtype,
        device=x.device,
    )


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """float64 [B] -> [B, 1, ...], in the type and on the device of ``like``."""
    column = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return column.reshape(-1, *(1,) * (like.ndim - 1))


def _check(x: Tensor, reduction: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating tensor [B, ...], got {got}")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x must be [B, ...] with B >= 1, got {list(x.shape)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
