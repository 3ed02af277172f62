"""Data whose score and log-density are known at every t, as models of every prediction.

x_0 ~ Σ_k w_k N(μ_k, V_k diag(λ_k) V_kᵀ) gives x_t = m x_0 + σ ε ~ Σ_k w_k N(m μ_k,
V_k diag(m² λ_k + σ²) V_kᵀ). Everything is computed in float64 and given in the dtype that was asked
with, so that what a test sees is the error of the code under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sbm_fast import EDMSDE, VESDE, VPSDE, ScoreModel, SubVPSDE
from sbm_fast.sde import SDE

SDES: dict[str, SDE] = {
    "VE": VESDE(0.01, 50.0),
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "EDM": EDMSDE(),
}


def first_time(sde: SDE) -> float:
    """The t_min of likelihoods."""
    return sde.sigma_min if isinstance(sde, EDMSDE) else 1e-5


@dataclass(frozen=True, eq=False)
class Marginal:
    """The law of m x_0 + σ ε, with m and σ float64 [] (one for all) or [B] (one each)."""

    data: Mixture
    m: Tensor
    sigma: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of x [B, ...], float64 [B]."""
        return torch.logsumexp(self._components(x)[0], dim=1)

    def score(self, x: Tensor) -> Tensor:
        """∇ log p(x), float64 like x."""
        log_joint, y, variances = self._components(x)
        towards = torch.einsum("kde,bke->bkd", self.data.axes, y / variances)
        return -torch.einsum("bk,bkd->bd", log_joint.softmax(dim=1), towards).reshape(x.shape)

    def sample(self, n: int, seed: int) -> Tensor:
        """n samples, float64 [n, d]."""
        clean, generator = self.data.sample(n, seed)
        z = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        return self.m.reshape(-1, 1) * clean + self.sigma.reshape(-1, 1) * z

    def _components(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log(w_k N_k(x)) [B, K]; along the axes of k the distance to its mean and the variances,
        both [B, K, d]."""
        m, sigma = self.m.reshape(-1, 1, 1), self.sigma.reshape(-1, 1, 1)
        away = x.flatten(1).double()[:, None] - m * self.data.means
        y = torch.einsum("kde,bkd->bke", self.data.axes, away)
        variances = m**2 * self.data.variances + sigma**2
        normal = -0.5 * (y**2 / variances + torch.log(2 * math.pi * variances)).sum(dim=2)
        return self.data.weights.log() + normal, y, variances


@dataclass(frozen=True, eq=False)
class Mixture:
    """Weights [K], means [K, d], axes V [K, d, d] and variances λ [K, d] along them, float64."""

    weights: Tensor
    means: Tensor
    axes: Tensor
    variances: Tensor

    def at(self, sde: SDE, t: float | Tensor) -> Marginal:
        """The law of the state of ``sde`` at t, a number or one for each sample [B]."""
        times = np.asarray(t, dtype=np.float64)
        m, sigma = (torch.as_tensor(of(times)) for of in (sde.mean_scale, sde.std))
        return Marginal(self, m.double(), sigma.double())

    def sample(self, n: int, seed: int) -> tuple[Tensor, torch.Generator]:
        """n data, float64 [n, d], and the generator that made them."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        spread = self.variances[which].sqrt() * z
        return self.means[which] + torch.einsum("bde,be->bd", self.axes[which], spread), generator

    def model(self, sde: SDE, predicts: str = "score", sigma_data: float = 0.5) -> ScoreModel:
        """The exact network of that prediction for ``sde``, labelled by σ/m."""

        def net(x: Tensor, label: Tensor) -> Tensor:
            r = label.double()
            m = mean_scale(sde, r)
            law = Marginal(self, m, m * r)
            m = m.reshape(-1, *[1] * (x.dim() - 1))
            sigma = m * r.reshape(m.shape)
            h = torch.hypot(sigma, m * sigma_data)
            state = x.double() * h if predicts == "edm" else x.double()
            return output(predicts, state, law.score(state), m, sigma, h, sigma_data).to(x.dtype)

        shape = (self.means.shape[1],)
        return ScoreModel(net, predicts, "sigma", sde, shape, sigma_data)


def mean_scale(sde: SDE, r: Tensor) -> Tensor:
    """m where σ/m is r. Tensors only: the label of a network may be traced by torch.func."""
    if isinstance(sde, VPSDE):
        return (1 + r * r).rsqrt()
    if isinstance(sde, SubVPSDE):
        return torch.exp(-torch.asinh(r / 2))
    return torch.ones_like(r)


def output(
    predicts: str, x: Tensor, s: Tensor, m: Tensor, sigma: Tensor, h: Tensor, sigma_data: float
) -> Tensor:
    """What a network gives whose score at x is s: the table of `sbm_fast.parameterization`."""
    if predicts == "score":
        return s
    if predicts == "eps":
        return -sigma * s
    if predicts == "x0":
        return (x + sigma * sigma * s) / m
    if predicts == "v":
        n = torch.hypot(m, sigma)
        return -n * sigma / m * (s + x / n / n)
    return h * sigma / (m * sigma_data) * (s + x / h / h)


def rotations(count: int, d: int, seed: int) -> Tensor:
    """Random orthogonal matrices [count, d, d]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, d, d, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal).Q


def mixture(weights: list[float], means: Tensor, stds: Tensor, seed: int) -> Mixture:
    """A `Mixture` with random axes; stds [d] or [K, d]."""
    k, d = means.shape
    variances = (stds**2).double().expand(k, d)
    return Mixture(
        torch.tensor(weights, dtype=torch.float64), means.double(), rotations(k, d, seed), variances
    )


def _waves() -> Tensor:
    """Three 8×8 pictures, flat: means [3, 64]."""
    line = torch.linspace(-1, 1, 8, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.cos(3 * x), torch.cos(2 * y) * x, x * y - 0.3]).flatten(1)


_PLANE_MEANS = torch.tensor([[1.0, 0.6], [-1.0, 0.4], [0.1, -1.2]])
_PLANE_STDS = torch.tensor([[0.3, 0.15], [0.2, 0.4], [0.25, 0.25]])
# As in images: a few directions hold most of the variance.
_WIDE_STDS = torch.logspace(-1.3, 0, 64, dtype=torch.float64)

CASES: dict[str, Mixture] = {
    "2-D Gaussian": mixture([1.0], torch.tensor([[0.3, -0.2]]), torch.tensor([0.9, 0.2]), 0),
    "2-D mixture": mixture([0.5, 0.3, 0.2], _PLANE_MEANS, _PLANE_STDS, 1),
    "64-D Gaussian": mixture([1.0], _waves()[:1], _WIDE_STDS, 2),
    "64-D mixture": mixture([0.5, 0.3, 0.2], _waves(), _WIDE_STDS, 3),
}
