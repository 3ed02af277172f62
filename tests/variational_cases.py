"""A chain, networks of every prediction and discrete data for tests of the variational bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbm_fast import DDPMSchedule, ScoreModel

Array = np.ndarray
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""D of (x_t, m, σ), m and σ shaped to broadcast."""

F64 = {"dtype": torch.float64}
LADDER = DDPMSchedule(np.linspace(0.02, 0.4, 12))


def network(predicts: str, denoiser: Denoiser, sigma_data: float = 0.5) -> Callable[..., Tensor]:
    """The network of a prediction, labelled by σ/m on a chain with m² + σ² = 1."""

    def net(x: Tensor, label: Tensor) -> Tensor:
        nsr = label.reshape(-1, *[1] * (x.dim() - 1)).double()
        m = 1 / torch.sqrt(1 + nsr**2)
        sigma = m * nsr
        x = x.double()
        if predicts == "edm":
            x = x * torch.hypot(sigma, m * sigma_data)
        d = denoiser(x, m, sigma)
        eps = (x - m * d) / sigma
        if predicts == "edm":
            total = nsr**2 + sigma_data**2
            return (d - sigma_data**2 / total * x / m) / (nsr * sigma_data / torch.sqrt(total))
        return {"score": -eps / sigma, "eps": eps, "x0": d, "v": m * eps - sigma * d}[predicts]

    return net


def model(predicts: str, denoiser: Denoiser, **more: Any) -> ScoreModel:
    return ScoreModel(network(predicts, denoiser), predicts, "sigma", **more)


def wavy(x: Tensor, m: Tensor, sigma: Tensor) -> Tensor:
    """No exact denoiser of anything, but a smooth one."""
    return torch.tanh(1.3 * x * m + 0.2) - 0.3 * sigma * torch.cos(2 * x)


def digits_like(n: int, shape: tuple[int, ...], levels: int, seed: int = 0) -> tuple[Tensor, Array]:
    """Random data on all levels of [−1, 1], and their numbers."""
    k = np.random.default_rng(seed).integers(0, levels, (n, *shape))
    return torch.from_numpy(-1 + k * (2 / (levels - 1))), k
