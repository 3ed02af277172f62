"""DDPM's variational bound: the papers' formulas, closed forms, the digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, ndtr
from torch import Tensor
from variational_cases import F64, LADDER, Array, digits_like, model, network, wavy

from sbm_fast import DDPMSchedule, ScoreModel, noise
from sbm_fast.nn import shipped
from sbm_fast.variational import BoundResult, ddpm_chain, variational_bound

PREDICTIONS = ("score", "eps", "x0", "v", "edm")


def log_mass(x0: Any, k: Any, levels: int, mean: Array, std: Any) -> Array:
    """log of a normal's mass in the bin of level k, from the side on which Φ is small."""
    half = 1 / (levels - 1)
    lower = np.where(k == 0, -np.inf, (x0 - half - mean) / std)
    upper = np.where(k == levels - 1, np.inf, (x0 + half - mean) / std)
    right = lower + upper > 0
    return np.log(ndtr(np.where(right, -lower, upper)) - ndtr(np.where(right, -upper, lower)))


class Peer:
    """The papers' code, written from it in float64: tables, KL of two normals by their means and
    log-variances, discretised decoder with Φ."""

    def __init__(self, betas: Array) -> None:
        self.betas, alphas = betas, 1 - betas
        self.bar = np.cumprod(alphas)
        below = np.append(1.0, self.bar[:-1])
        posterior = betas * (1 - below) / (1 - self.bar)
        self.log_clipped = np.log(np.append(posterior[1], posterior[1:]))
        self.coef_x0 = betas * np.sqrt(below) / (1 - self.bar)
        self.coef_x = (1 - below) * np.sqrt(alphas) / (1 - self.bar)
        # "for fixedlarge, we set the initial (log-)variance like so to get a better decoder
        # log likelihood" (hojonathanho/diffusion)
        self.log_large = np.log(np.append(posterior[1], betas[1:]))

    @staticmethod
    def kl(mean1: Array, log1: Any, mean2: Array, log2: Any) -> Array:
        squares = np.exp(log1 - log2) + (mean1 - mean2) ** 2 * np.exp(-log2)
        return 0.5 * (-1.0 + log2 - log1 + squares)

    def log_variance(self, variance: str, i: int, v: Array) -> Any:
        if variance == "learned":
            share = (v + 1) / 2
            return share * np.log(self.betas[i]) + (1 - share) * self.log_clipped[i]
        return {"beta": self.log_large, "beta_tilde": self.log_clipped}[variance][i]

    def terms(
        self,
        x0: Array,
        k: Array,
        levels: int,
        denoised: Callable[..., Any],
        eps: Callable[..., Any],
        variance: str,
        clip: float | None,
    ) -> tuple[Array, Array]:
        """(prior [N], terms [T, N]) in nats."""
        rows, each = tuple(range(1, x0.ndim)), []
        for i in range(len(self.betas)):
            m, sigma = np.sqrt(self.bar[i]), np.sqrt(1 - self.bar[i])
            x_t = m * x0 + sigma * eps(i)
            d, v = denoised(x_t, m, sigma)
            d = d if clip is None else np.clip(d, -clip, clip)
            log_variance = self.log_variance(variance, i, v)
            mean = self.coef_x0[i] * d + self.coef_x[i] * x_t
            if i > 0:
                true_mean = self.coef_x0[i] * x0 + self.coef_x[i] * x_t
                nats = self.kl(true_mean, self.log_clipped[i], mean, log_variance)
            else:
                nats = -log_mass(x0, k, levels, mean, np.exp(0.5 * log_variance))
            each.append(nats.sum(rows))
        last = np.sqrt(self.bar[-1]) * x0
        prior = self.kl(last, np.log(1 - self.bar[-1]), np.zeros_like(x0), 0.0).sum(rows)
        return prior, np.stack(each)


def check_peer(result: BoundResult, prior: Array, terms: Array, dimension: int) -> None:
    bits = 1 / (dimension * math.log(2))
    np.testing.assert_allclose(result.prior.numpy(), bits * prior, rtol=1e-9)
    np.testing.assert_allclose(result.terms.numpy(), bits * terms, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(result.decoder.numpy(), bits * terms[0], rtol=1e-9)
    total = bits * (prior + terms.sum(0))
    np.testing.assert_allclose(result.bits_per_dim.numpy(), total, rtol=1e-10)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_terms_are_the_papers_codes(predicts: str, variance: str, clip: float | None) -> None:
    x, k = digits_like(5, (2, 3), 33)
    peer, t = Peer(LADDER.betas), LADDER.levels

    def denoised(x_t: Array, m: float, sigma: float) -> tuple[Array, None]:
        values = (torch.as_tensor(value, dtype=torch.float64) for value in (x_t, m, sigma))
        return wavy(*values).numpy(), None

    for repetition in range(2):
        result = variational_bound(
            model(predicts, wavy), LADDER, x, levels=33, variance=variance, clip_denoised=clip,
            seed=4, draws=repetition + 1, **F64,
        )  # fmt: skip
    keys = noise.keys(4, 5)
    drawn = []
    for r in range(2):

        def eps(i: int, r: int = r) -> Array:
            z = noise.normal(None, x.shape, draw=r * t + i, stream=noise.TRAINING, keys=keys)
            return z.double().numpy()

        drawn.append(peer.terms(x.numpy(), k, 33, denoised, eps, variance, clip))
    prior, mean = drawn[0][0], (drawn[0][1] + drawn[1][1]) / 2
    check_peer(result, prior, mean, 6)
    columns = np.stack([prior + terms.sum(0) for _, terms in drawn]) / (6 * math.log(2))
    np.testing.assert_allclose(result.columns.numpy(), columns, rtol=1e-10)
    np.testing.assert_allclose(result.stderr.numpy(), columns.std(0, ddof=1) / 2**0.5, rtol=1e-6)
    assert result.nfe == 2 * t and result.seed == 4


def test_learned_variance_is_the_papers_codes() -> None:
    x, k = digits_like(4, (2, 3), 17)

    def net(x: Tensor, label: Tensor) -> Tensor:
        v = torch.sin(3 * x) * 1.2  # the papers let v leave [−1, 1]
        return torch.cat([network("eps", wavy)(x, label), v], dim=1)

    learned = ScoreModel(net, "eps", "sigma", variance="learned_range")
    result = variational_bound(learned, LADDER, x, levels=17, seed=1, **F64)
    keys = noise.keys(1, 4)

    def denoised(x_t: Array, m: float, sigma: float) -> tuple[Array, Array]:
        values = (torch.as_tensor(value, dtype=torch.float64) for value in (x_t, m, sigma))
        return wavy(*values).numpy(), np.sin(3 * x_t) * 1.2

    def eps(i: int) -> Array:
        return noise.normal(None, x.shape, draw=i, stream=4, keys=keys).double().numpy()

    prior, terms = Peer(LADDER.betas).terms(x.numpy(), k, 17, denoised, eps, "learned", None)
    check_peer(result, prior, terms, 6)
    fixed = variational_bound(learned, LADDER, x, levels=17, seed=1, variance="beta_tilde", **F64)
    plain = model("eps", wavy)
    same = variational_bound(plain, LADDER, x, levels=17, seed=1, variance="fixedsmall", **F64)
    assert torch.equal(fixed.terms, same.terms)


class Gaussian:
    """Data N(0, s²) and their exact posterior mean D = κ x_t: the bound's expectation over ε, and
    the probability that the chain gives each level, in closed form."""

    def __init__(self, s: float, variance: str) -> None:
        self.s, self.peer, self.variance = s, Peer(LADDER.betas), variance

    def denoiser(self, x: Tensor, m: Tensor, sigma: Tensor) -> Tensor:
        return m * self.s**2 / (m**2 * self.s**2 + sigma**2) * x

    def _level(self, i: int) -> tuple[float, float, float, float]:
        m2 = self.peer.bar[i]
        kappa = np.sqrt(m2) * self.s**2 / (m2 * self.s**2 + 1 - m2)
        return np.sqrt(m2), np.sqrt(1 - m2), kappa, self.peer.log_variance(self.variance, i, None)

    def expected_terms(self, x0: float, levels: int) -> Array:
        """E L_{t−1} in nats: E (x_0 − D)² = (1 − κ m)² x_0² + κ² σ²; L_0 by quadrature."""
        each = [self._decoder(x0, levels)]
        for i in range(1, LADDER.levels):
            m, sigma, kappa, log_variance = self._level(i)
            error = (1 - kappa * m) ** 2 * x0**2 + (kappa * sigma) ** 2
            ratio = np.exp(self.peer.log_clipped[i] - log_variance)
            error *= self.peer.coef_x0[i] ** 2 * np.exp(-log_variance)
            each.append(0.5 * (ratio - 1 - np.log(ratio) + error))
        return np.array(each)

    def _decoder(self, x0: float, levels: int) -> float:
        m, sigma, kappa, log_variance = self._level(0)
        z, weights = np.polynomial.hermite_e.hermegauss(80)
        mean = kappa * (m * x0 + sigma * z)
        nats = -log_mass(x0, 1, levels, mean, np.exp(0.5 * log_variance))
        return float((weights * nats).sum() / weights.sum())

    def model_nats(self, x0: float, levels: int) -> float:
        """−log P(x_0) under the chain itself, whose states are all Gaussian."""
        variance = 1.0
        for i in reversed(range(LADDER.levels)):
            _, _, kappa, log_variance = self._level(i)
            slope = self.peer.coef_x0[i] * kappa + self.peer.coef_x[i]
            variance = slope**2 * variance + np.exp(log_variance)
        std, half = np.sqrt(2 * variance), 1 / (levels - 1)
        return -math.log(0.5 * (erf((x0 + half) / std) - erf((x0 - half) / std)))


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_gaussian_data_have_the_closed_form(variance: str) -> None:
    """Each term's mean over 20,000 draws within four standard errors of its expectation, and the
    expected bound above −log₂ P of the chain."""
    levels, n = 65, 20_000
    data = Gaussian(0.4, variance)
    exact = model("eps", data.denoiser)
    for x0 in (0.0, -0.25, 0.625):
        x = torch.full((n, 1), x0, dtype=torch.float64)
        result = variational_bound(
            exact, LADDER, x, levels=levels, variance=variance, seed=7, **F64
        )  # fmt: skip
        terms = result.terms.numpy() * math.log(2)
        expected = data.expected_terms(x0, levels)
        away = (terms.mean(1) - expected) / (terms.std(1) / n**0.5)
        assert np.abs(away).max() < 4, (x0, away)
        bound = float(result.prior[0]) * math.log(2) + expected.sum()
        true = data.model_nats(x0, levels)
        assert bound > true
        assert abs(result.mean * math.log(2) - bound) < 4 * result.mean_stderr * math.log(2)
        assert bound - true < {"beta": 0.1, "beta_tilde": 0.7}[variance]  # in 3 to 6 nats


def test_the_bound_of_the_exact_network_is_above_the_entropy() -> None:
    """Discrete data of known masses: E −log₂ P is their entropy at least, and not far above it."""
    points = torch.tensor([[-1.0, 0.5], [0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    masses = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def denoiser(x: Tensor, m: Tensor, sigma: Tensor) -> Tensor:
        away = (x[:, None] - m[..., None] * points) / sigma[..., None]
        weight = torch.softmax(masses.log() - 0.5 * (away**2).sum(-1), dim=1)
        return weight @ points

    entropy = float(-(masses * masses.log2()).sum()) / 2
    schedule = DDPMSchedule.linear(200, 5e-4, 0.1)
    x = points.repeat_interleave(200, 0)
    bound = {}
    for variance in ("beta", "beta_tilde"):
        result = variational_bound(
            model("x0", denoiser), schedule, x, levels=5, variance=variance, seed=2, **F64
        )
        each = result.bits_per_dim.reshape(3, -1).mean(1)
        bound[variance] = float((masses * each).sum())
    assert entropy < bound["beta_tilde"] < entropy + 0.05
    assert bound["beta_tilde"] < bound["beta"]


def test_a_single_point_and_a_network_that_knows_it() -> None:
    """With β̃ nothing is left but the prior and the decoder, both in closed form."""
    x0 = torch.tensor([0.25, -1.0, 1.0], dtype=torch.float64)
    knows = model("x0", lambda x, m, sigma: x0.expand_as(x))
    result = variational_bound(
        knows, LADDER, x0[None], levels=9, variance="beta_tilde", draws=3, **F64
    )
    bar, betas = np.cumprod(1 - LADDER.betas), LADDER.betas
    assert torch.equal(result.terms[1:], torch.zeros_like(result.terms[1:]))
    std = math.sqrt(betas[1] * (1 - bar[0]) / (1 - bar[1]))  # β̃_2
    inner, edge = ndtr(0.125 / std) - ndtr(-0.125 / std), ndtr(0.125 / std)
    expected = -(math.log2(inner) + 2 * math.log2(edge)) / 3
    assert float(result.decoder[0]) == pytest.approx(expected, rel=1e-12)
    squares = bar[-1] * x0.numpy() ** 2 - bar[-1] - np.log1p(-bar[-1])
    assert float(result.prior[0]) == pytest.approx(0.5 * squares.mean() / math.log(2), rel=1e-12)
    assert float(result.stderr[0]) == 0.0  # nothing depends on the noise
    # "beta" costs ½ (ln β/β̃ + β̃/β − 1) at each level
    below = bar[:-1]
    ratio = (1 - below) / (1 - bar[1:])
    other = variational_bound(knows, LADDER, x0[None], levels=9, variance="beta", **F64)
    np.testing.assert_allclose(
        other.terms[1:, 0].numpy(), 0.5 * (ratio - 1 - np.log(ratio)) / math.log(2), rtol=1e-9
    )


def test_one_level_takes_its_own_beta() -> None:
    schedule, x0 = DDPMSchedule([0.04]), torch.zeros(1, 1, dtype=torch.float64)
    knows = model("x0", lambda x, m, sigma: torch.zeros_like(x))
    for variance in ("beta", "beta_tilde"):
        result = variational_bound(knows, schedule, x0, levels=3, variance=variance, **F64)
        expected = -math.log2(ndtr(0.5 / 0.2) - ndtr(-0.5 / 0.2))
        assert float(result.decoder[0]) == pytest.approx(expected, rel=1e-12)
        assert result.nfe == 1


def test_digits() -> None:
    """Two bits a dimension, as by the probability-flow ODE; 17 levels are log₂ 17 = 4.09."""
    data = pytest.importorskip("sbm_fast.data").digits()
    net = shipped.digits()
    result = variational_bound(
        net, ddpm_chain(net.sde, 100), data.held_out[:40], levels=17, variance="beta_tilde",
        clip_denoised=1.0, seed=0,
    )  # fmt: skip
    assert result.bits_per_dim.shape == (40,) and result.terms.shape == (100, 40)
    assert 1.5 < result.mean < 2.7
    assert (result.terms > 0).all() and result.prior.max() < 1e-3
    assert torch.isnan(result.stderr).all()
    assert 0.01 < result.mean_stderr < 0.2
