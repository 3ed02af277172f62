"""DDPM's variational bound: the papers' formulas, closed forms, invariances, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, ndtr
from torch import Tensor

from sbm_fast import VPSDE, DDPMSchedule, ScoreModel, noise
from sbm_fast.methods import DynamicThreshold
from sbm_fast.nn import shipped
from sbm_fast.sde import VESDE, NCSNLadder
from sbm_fast.variational import BoundResult, ddpm_chain, variational_bound

Array = np.ndarray
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""D of (x_t, m, σ), m and σ shaped to broadcast."""

PREDICTIONS = ("score", "eps", "x0", "v", "edm")
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


def test_float32_is_close_to_float64() -> None:
    x, _ = digits_like(8, (3, 4), 17)
    results = [
        variational_bound(model("eps", wavy), LADDER, x.to(dtype), levels=17, seed=0, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    assert results[0].bits_per_dim.dtype == torch.float64
    torch.testing.assert_close(results[0].terms, results[1].terms, rtol=1e-3, atol=1e-5)


def bound(x: Tensor, net: Any = None, **more: Any) -> BoundResult:
    net = model("eps", wavy) if net is None else net
    return variational_bound(net, LADDER, x, levels=17, draws=2, **more)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, _ = digits_like(7, (40, 50), 17)
    x = x.float()
    whole = bound(x, seed=3)
    names = ("bits_per_dim", "stderr", "columns", "prior", "terms")
    for size in (1, 3, 7, 100):
        parts = bound(x, seed=3, batch_size=size)
        for name in names:
            assert torch.equal(getattr(parts, name), getattr(whole, name)), (size, name)
    order, keys = torch.tensor([4, 0, 6, 1, 5, 2, 3]), noise.keys(3, 7)
    mixed = bound(x[order], keys=keys[order])
    shard = bound(x[2:5], seed=3, first_sample=2)
    for name in names:
        assert torch.equal(getattr(mixed, name), getattr(whole, name)[..., order]), name
        assert torch.equal(getattr(shard, name), getattr(whole, name)[..., 2:5]), name
    assert mixed.seed is None
    assert not torch.equal(bound(x, seed=4).bits_per_dim, whole.bits_per_dim)


def test_the_generator_gives_a_seed_that_is_reported() -> None:
    x, _ = digits_like(2, (3,), 17)
    torch.manual_seed(0)
    first = bound(x)
    assert first.seed is not None
    assert torch.equal(bound(x, seed=first.seed).columns, first.columns)


def test_conditioning_follows_its_samples() -> None:
    x, _ = digits_like(6, (3,), 17)
    shift = torch.linspace(0, 1, 6)

    def net(x: Tensor, label: Tensor, shift: Tensor, scale: float, table: Tensor) -> Tensor:
        assert table.shape == (4,) and x.shape[0] == shift.shape[0]
        return scale * x + shift[:, None]

    conditioned = ScoreModel(net, "eps", "sigma")
    cond = {"shift": shift, "scale": 0.3, "table": torch.zeros(4)}
    whole = bound(x, conditioned, seed=0, cond=cond)
    parts = bound(x, conditioned, seed=0, cond=cond, batch_size=4)
    assert torch.equal(whole.terms, parts.terms)


def test_a_network_of_another_sde_is_matched() -> None:
    """The chain of the VP SDE has the SDE's own levels; a VE network runs on it as well."""
    sde = VPSDE()
    chain = ddpm_chain(sde, 20)
    times = np.arange(1, 21) / 20
    np.testing.assert_allclose(np.sqrt(chain.alphas_cumprod), sde.mean_scale(times), rtol=1e-9)
    np.testing.assert_allclose(chain.nsr(np.arange(20.0)), sde.nsr(times), rtol=1e-9)
    x, _ = digits_like(3, (4,), 17)
    own = variational_bound(model("eps", wavy), chain, x, levels=17, seed=0, **F64)

    def of_ve(x: Tensor, label: Tensor) -> Tensor:
        nsr = label[:, None]
        m = 1 / torch.sqrt(1 + nsr**2)
        return network("eps", wavy)(m * x, label)

    for trained in (VPSDE(), VESDE(0.01, 200.0)):
        net = network("eps", wavy) if isinstance(trained, VPSDE) else of_ve
        other = ScoreModel(net, "eps", "sigma", sde=trained)
        result = variational_bound(other, chain, x, levels=17, seed=0, **F64)
        torch.testing.assert_close(result.terms, own.terms, rtol=1e-7, atol=1e-12)
    with pytest.raises(ValueError, match=r"^t: .*outside the range"):
        variational_bound(ScoreModel(of_ve, "eps", sde=VESDE(0.01, 5.0)), chain, x, levels=17)


def test_a_network_is_put_into_eval_mode_and_sees_no_gradients() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return self.weight * x

    net = Net()
    x, _ = digits_like(2, (3,), 17)
    result = bound(x, ScoreModel(net, "eps", "index", sde=LADDER))
    assert net.training and not result.terms.requires_grad


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_say_where(bad: float, clip: float | None) -> None:
    def net(x: Tensor, label: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        # levels 7 and 3 of sample 5, recognised by its data; level 3 of sample 1
        out[((label <= 7) & (label % 4 == 3) & (x[:, 0] > 500)).nonzero(), 1] = bad
        return out

    broken = ScoreModel(net, "x0", "index", sde=LADDER)
    x = torch.zeros(6, 2)
    x[5] = 1000.0
    for size in (None, 4):
        with pytest.raises(
            ValueError,
            match=r"^model: its outputs.* for 1 of . samples, first for sample 5 at step 5 of 12 "
            r"\(t = 7\)",
        ):
            variational_bound(
                broken, LADDER, x, data_range=(-1000, 1000), levels=3, batch_size=size, seed=0,
                clip_denoised=clip,
            )  # fmt: skip


X = digits_like(3, (2, 4), 17)[0]
EPS = ScoreModel(lambda x, label: x, "eps", "index", sde=LADDER)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": VPSDE()}, TypeError, "schedule: expected a DDPMSchedule"),
        ({"schedule": NCSNLadder([0.1, 1.0])}, TypeError, "schedule: expected a DDPMSchedule"),
        ({"levels": 16}, ValueError, "x: expected one of the levels=16 values"),
        ({"data_range": (0, 1)}, ValueError, r"x: expected values in data_range = \(0, 1\), got -"),
        ({"x": X[:0]}, ValueError, r"x: expected shape \(samples, …\) with at least one value"),
        ({"x": X[:, :0]}, ValueError, "x: expected shape"),
        ({"x": [1.0]}, TypeError, "x: expected a floating tensor"),
        ({"x": X.mul(float("nan"))}, ValueError, "x: .*got nan"),
        ({"variance": "betas"}, ValueError, "variance: unknown value 'betas'"),
        ({"variance": "learned"}, ValueError, "variance: 'learned' needs a network with twice"),
        ({"clip_denoised": 0.0}, ValueError, "clip_denoised: "),
        ({"clip_denoised": DynamicThreshold()}, TypeError, "clip_denoised: the bound takes"),
        ({"draws": 0}, ValueError, "draws: expected an integer ≥ 1"),
        ({"draws": 2**31}, ValueError, "draws: expected at most 357913941"),
        ({"batch_size": 0}, ValueError, "batch_size: "),
        ({"dtype": torch.float16}, TypeError, "dtype: "),
        ({"keys": torch.zeros(2, dtype=torch.int64)}, ValueError, "keys: expected shape"),
        ({"keys": torch.zeros(3).long(), "seed": 1}, ValueError, "keys: excludes seed"),
        ({"cond": [1]}, TypeError, "cond: expected a dict"),
        ({"device": "meta"}, ValueError, "device: "),
        ({"model": 3}, TypeError, "model: "),
        (
            {"model": ScoreModel(lambda x, label: x, "eps", sde=LADDER, sample_shape=(8,))},
            ValueError,
            r"x: expected shape \(samples, 8\) .*got \(3, 2, 4\)",
        ),
        (
            {"model": ScoreModel(lambda x, label: x[:, :1], "eps", sde=LADDER)},
            ValueError,
            r"model: expected a floating tensor of shape \(3, 2, 4\), got .* \(3, 1, 4\)",
        ),
        (
            {"model": ScoreModel(lambda x, label: x, "eps", variance="learned_range")},
            ValueError,
            r"model: expected a floating tensor of shape \(3, 4, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": EPS, "schedule": LADDER, "x": X, "levels": 17, **options}
    with pytest.raises(error, match=f"^{message}"):
        variational_bound(**arguments)
