"""What the plan tests compare with: exact data, perfect networks, a row interpreter, worlds.

Nothing here uses the builder, the linear forms or the parameterisations of the package: levels
(m, σ), drift and diffusion are written out, and networks answer from the exact posterior mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sbm_fast.model import ScoreModel
from sbm_fast.plan import Plan
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule, NCSNLadder, SubVPSDE

Array = np.ndarray
PREDICTIONS = ("score", "eps", "x0", "v", "edm")
SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture with one std; posterior_mean(x, m, σ) = E[x_0 | m x_0 + σ ε = x]."""

    means: Array  # [components, d]
    std: float

    def posterior_mean(self, x: Array, m: float, sigma: float) -> Array:
        variance = (m * self.std) ** 2 + sigma**2
        offset = x[:, None, :] - m * self.means
        log_weight = -0.5 * (offset**2).sum(-1) / variance
        weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        each = self.means + m * self.std**2 / variance * offset
        return (weight[:, :, None] * each).sum(axis=1)


GAUSSIAN = Mixture(np.array([[0.3]]), 0.5)
MIXTURE = Mixture(np.array([[-0.8, 0.4], [0.6, -0.7], [0.9, 0.8]]), 0.15)


@dataclass(frozen=True)
class World:
    """An SDE and its textbook functions of t."""

    sde: SDE
    m: Callable[[float], float]
    sigma: Callable[[float], float]
    f: Callable[[float], float] | None = None
    g2: Callable[[float], float] | None = None
    vp: bool = False

    def level(self, t: float) -> tuple[float, float]:
        return self.m(t), self.sigma(t)

    def nsr(self, t: float) -> float:
        return self.sigma(t) / self.m(t)


def _beta(t: float) -> float:
    return 0.1 + t * 19.9


def _log_m(t: float) -> float:
    return -0.25 * t**2 * 19.9 - 0.5 * t * 0.1


def _vp_m(t: float) -> float:
    return float(np.exp(_log_m(t)))


_SIGMAS = np.exp(np.linspace(np.log(0.05), np.log(10.0), 14))
_BETAS = np.linspace(1e-3, 0.3, 24)
_ALPHAS_CUMPROD = np.cumprod(1 - _BETAS)

WORLDS = {
    "ve": World(
        VESDE(0.01, 50.0),
        m=lambda t: 1.0,
        sigma=lambda t: 0.01 * 5000.0**t,
        f=lambda t: 0.0,
        g2=lambda t: (0.01 * 5000.0**t) ** 2 * 2 * float(np.log(5000.0)),
    ),
    "vp": World(
        VPSDE(),
        m=_vp_m,
        sigma=lambda t: float(np.sqrt(-np.expm1(2 * _log_m(t)))),
        f=lambda t: -0.5 * _beta(t),
        g2=_beta,
        vp=True,
    ),
    "subvp": World(
        SubVPSDE(),
        m=_vp_m,
        sigma=lambda t: float(-np.expm1(2 * _log_m(t))),
        f=lambda t: -0.5 * _beta(t),
        g2=lambda t: _beta(t) * float(-np.expm1(4 * _log_m(t))),
    ),
    "edm": World(EDMSDE(), m=lambda t: 1.0, sigma=lambda t: t, f=lambda t: 0.0, g2=lambda t: 2 * t),
    "ncsn": World(NCSNLadder(_SIGMAS), m=lambda t: 1.0, sigma=lambda t: float(_SIGMAS[int(t)])),
    "ddpm": World(
        DDPMSchedule(_BETAS),
        m=lambda t: float(np.sqrt(_ALPHAS_CUMPROD[int(t)])),
        sigma=lambda t: float(np.sqrt(1 - _ALPHAS_CUMPROD[int(t)])),
        vp=True,
    ),
}
CONTINUOUS = ("ve", "vp", "subvp", "edm")


def prediction(predicts: str, x: Array, denoised: Array, m: float, sigma: float) -> Array:
    """What a network of each kind answers at x = m x_0 + σ ε, from D."""
    if predicts == "x0":
        return denoised
    if predicts == "score":
        return (m * denoised - x) / sigma**2
    eps = (x - m * denoised) / sigma
    if predicts == "eps":
        return eps
    if predicts == "v":
        return (m * eps - sigma * denoised) / np.hypot(m, sigma)
    y, nsr = x / m, sigma / m
    total = nsr**2 + SIGMA_DATA**2
    return (denoised - SIGMA_DATA**2 / total * y) / (nsr * SIGMA_DATA / np.sqrt(total))


@dataclass(frozen=True)
class Network:
    """A perfect network trained under ``world``: (c_in·x, label) → F."""

    world: World
    data: Mixture
    predicts: str
    time_of: Callable[[float], float] = lambda label: label

    def __call__(self, inputs: Array, label: float) -> Array:
        m, sigma = self.world.level(self.time_of(label))
        x = inputs
        if self.predicts == "edm":
            x = inputs * m * np.hypot(sigma / m, SIGMA_DATA)
        return prediction(self.predicts, x, self.data.posterior_mean(x, m, sigma), m, sigma)


def score_model(
    world: World, predicts: str = "score", time: str | Callable[[Array], Array] = "t"
) -> ScoreModel:
    """The declaration that belongs to :class:`Network`; plans never call the network."""
    return ScoreModel(
        lambda x, t: x, predicts=predicts, time=time, sde=world.sde, sigma_data=SIGMA_DATA
    )


@dataclass
class Noise:
    """Numbered noise: each reader takes the next array, in the order of use."""

    arrays: Array
    used: int = 0

    def __call__(self) -> Array:
        self.used += 1
        return self.arrays[self.used - 1]

    @classmethod
    def normal(cls, count: int, shape: tuple[int, ...], seed: int = 0) -> Noise:
        return cls(np.random.default_rng(seed).standard_normal((count, *shape)))

    @classmethod
    def one_hot(cls, count: int) -> Noise:
        """Sample 0 without noise, sample k + 1 with a one in noise k."""
        arrays = np.zeros((count, count + 1, 1))
        arrays[np.arange(count), np.arange(count) + 1] = 1.0
        return cls(arrays)

    def again(self) -> Noise:
        return Noise(self.arrays)


@dataclass
class Trace:
    """State after each row, and the number of network calls."""

    states: list[Array] = field(default_factory=list)
    calls: int = 0


def noises(plan: Plan) -> int:
    """How many rows of a plan read noise."""
    return int(((plan.coef[:, :, 3] != 0).any(axis=1) | (plan.norm > 0)).sum())


def interpret(
    plan: Plan,
    network: Callable[[Array, float], Array],
    noise: Callable[[], Array],
    x: Array | None = None,
) -> Trace:
    """Run a table row by row, in the words of the contract."""
    trace = Trace()
    state = None if x is None else x * plan.start_scale
    registers: dict[int, Array] = {}
    for r in range(plan.rows):
        out = denoised = z = None
        if plan.evaluates[r]:
            trace.calls += 1
            out = network(plan.c_in[r] * state, float(plan.label[r]))
            p, q, limit = plan.denoiser[r]
            denoised = np.clip(p * state + q * out, -limit, limit)
        if plan.norm[r] or plan.coef[r, :, 3].any():
            z = noise()
        sources = [state, out, denoised, z, *(registers.get(k) for k in range(plan.registers))]
        made = []
        for coefficients in plan.coef[r]:
            terms = [c * v for c, v in zip(coefficients, sources, strict=True) if c != 0]
            made.append(sum(terms[1:], terms[0]) if terms else None)
        if plan.norm[r]:
            scale, p_s, q_s = plan.langevin[r]
            score = p_s * state + q_s * out
            ratio = _norm_ratio(int(plan.norm[r]), z, score)
            made[0] = made[0] + scale * ratio**2 * score + np.sqrt(2 * scale) * ratio * z
        if plan.slot[r] >= 0:
            registers[int(plan.slot[r])] = made[1]
        state = made[0]
        trace.states.append(state)
    return trace


def _norm_ratio(norm: int, z: Array, score: Array) -> Array | float:
    z_norm = np.linalg.norm(z, axis=1, keepdims=True)
    s_norm = np.linalg.norm(score, axis=1, keepdims=True)
    if norm == 1:
        return z_norm.mean() / s_norm.mean()
    return (z_norm if norm == 2 else np.sqrt(z.shape[1])) / s_norm


def moments(states: Array) -> tuple[float, float]:
    """Mean and std from a run on one-hot noise: the map is affine."""
    return float(states[0, 0]), float(np.linalg.norm(states[1:, 0] - states[0, 0]))
