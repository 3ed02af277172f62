"""compat="edm": Algorithm 2 of Karras et al. 2022 step by step, in float64 and with given noise.

The loop below is the paper's Algorithm 2 with the authors' grid and round_sigma. Its noise ε_i is
there for every step, used or not, as the authors draw it; `sample` asks for what it uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from plan_reference import MIXTURE, PREDICTIONS, WORLDS, Array, Network, World
from torch import Tensor

from sbm_fast import EDMSDE, Sampler
from sbm_fast.methods import make_plan
from sbm_fast.model import ScoreModel
from sbm_fast.sde import SDE

SHAPE = (5, 2)
WIDE = World(EDMSDE(0.002, 120.0), m=lambda t: 1.0, sigma=lambda t: t)


def denoiser(x: Array, sigma: float) -> Array:
    return MIXTURE.posterior_mean(x, 1.0, sigma)


@dataclass
class Peer:
    """The authors' sampler for a network that denoises at any σ, or only at ``levels``."""

    n: int
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = np.inf
    s_noise: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    levels: Array | None = None
    churned: list[int] = field(default_factory=list)

    def round_sigma(self, sigma: float) -> float:
        if self.levels is None:
            return sigma
        return float(self.levels[np.argmin(np.abs(sigma - self.levels))])

    def grid(self) -> list[float]:
        low, high = self.sigma_min, self.sigma_max
        if self.levels is not None:
            low, high = max(low, self.levels.min()), min(high, self.levels.max())
        i, inverse = np.arange(self.n), 1 / self.rho
        first, last = high**inverse, low**inverse
        steps = (first + i / (self.n - 1) * (last - first)) ** self.rho
        return [self.round_sigma(float(t)) for t in steps] + [0.0]

    def sample(self, latents: Array, eps: Array) -> list[Array]:
        """Every state that the network is evaluated at, and the sample."""
        t = self.grid()
        x, states = t[0] * latents, []
        for i in range(self.n):
            gamma = 0.0
            if self.s_min <= t[i] <= self.s_max:
                gamma = min(self.s_churn / self.n, np.sqrt(2) - 1)
            t_hat = self.round_sigma(t[i] + gamma * t[i])
            if t_hat > t[i]:
                self.churned.append(i)
            x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * self.s_noise * eps[i]
            states.append(x_hat)
            d = (x_hat - denoiser(x_hat, t_hat)) / t_hat
            x = x_hat + (t[i + 1] - t_hat) * d
            if t[i + 1] != 0:
                states.append(x)
                d_next = (x - denoiser(x, t[i + 1])) / t[i + 1]
                x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_next)
        return [*states, x]


def torch_model(world: World, predicts: str, time: Any = "t", time_of: Any = None) -> ScoreModel:
    network = Network(world, MIXTURE, predicts, time_of or (lambda label: label))

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(network(x.numpy(), float(t[0])))

    return ScoreModel(net, predicts=predicts, time=time, sde=world.sde)


def states_of(
    model: ScoreModel, sde: SDE, steps: int, eps: Array, **options: Any
) -> tuple[list[Array], list[int]]:
    """As Peer.sample, from our rows; and the steps that asked for noise, numbered as `edm` says."""
    latents, asked = eps[-1], []
    churned = "S_churn" in options and options.get("S_max", np.inf) >= 80.0

    def noise(draw: int, stream: int) -> Tensor:
        if stream == 0:
            assert draw == 0
            return torch.from_numpy(latents)
        step, rest = divmod(draw - churned, 2)
        assert (stream, rest) == (1, 0)
        asked.append(step)
        return torch.from_numpy(eps[step])

    options = {"compat": "edm", "method": "edm", "dtype": torch.float64} | options
    run = Sampler(model, sde, SHAPE, steps=steps, **options).start(seed=0, noise=noise)
    states = []
    while run.row < run.plan.rows:
        if run.plan.evaluates[run.row]:
            states.append(run.x.numpy())
        run.advance(1)
    return [*states, run.result().numpy()], asked


def check(run: tuple[list[Array], list[int]], peer: Peer, eps: Array, bound: float = 1e-12) -> None:
    states, asked = run
    expected = peer.sample(eps[-1], eps)
    assert len(states) == len(expected) == 2 * peer.n
    assert asked == peer.churned
    for state, theirs in zip(states, expected, strict=True):
        np.testing.assert_allclose(state, theirs, rtol=0, atol=bound * max(1, np.abs(theirs).max()))


def noise_for(steps: int) -> Array:
    return np.random.default_rng(0).standard_normal((steps + 1, *SHAPE))


CIFAR = {"S_churn": 30.0, "S_min": 0.01, "S_max": 1.0, "S_noise": 1.007}
IMAGENET = {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
LARGEST = {"S_churn": 1000.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}  # γ = √2 − 1


def peers(options: dict[str, float]) -> dict[str, float]:
    return {name.lower(): value for name, value in options.items()}


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("churn", [{}, CIFAR, IMAGENET, LARGEST], ids=str)
@pytest.mark.parametrize("steps", [2, 18, 256])
def test_step_by_step(steps: int, churn: dict[str, float], predicts: str) -> None:
    eps = noise_for(steps)
    world = WORLDS["edm"]
    run = states_of(torch_model(world, predicts), world.sde, steps, eps, **churn)
    check(run, Peer(steps, **peers(churn)), eps)


@pytest.mark.parametrize("predicts", ["edm", "x0", "eps"])
def test_churn_above_sigma_max(predicts: str) -> None:
    """With the default S_max = ∞ step 0 is churned, beyond 80; the network's SDE reaches there."""
    eps, churn = noise_for(18), {"S_churn": 40.0, "S_noise": 1.003}
    model = torch_model(WIDE, predicts)
    run = states_of(model, WIDE.sde, 18, eps, sigma_max=80.0, **churn)
    check(run, Peer(18, **peers(churn)), eps)


def test_own_range_and_rho() -> None:
    eps, options = noise_for(12), {"rho": 5.0, "sigma_min": 0.01, "sigma_max": 60.0}
    world = WORLDS["edm"]
    run = states_of(torch_model(world, "x0"), world.sde, 12, eps, **CIFAR, **options)
    check(run, Peer(12, **peers(CIFAR), **options), eps)


def test_a_vp_network_under_the_edm_sde() -> None:
    """The paper's VP column: the same σ, the network fed x/√(1 + σ²) at the time of σ."""
    eps, world = noise_for(18), WORLDS["edm"]
    run = states_of(torch_model(WORLDS["vp"], "eps"), world.sde, 18, eps, **CIFAR)
    check(run, Peer(18, **peers(CIFAR)), eps)


@pytest.mark.parametrize("steps", [5, 18, 40])
@pytest.mark.parametrize("churn", [{}, {"S_churn": 9.0, "S_min": 0.05, "S_max": 5.0}], ids=str)
@pytest.mark.parametrize("name", ["ncsn", "ddpm"])
def test_levels_of_a_ladder_are_rounded(name: str, churn: dict[str, float], steps: int) -> None:
    """Also where two σ meet in one level, and from a run under the ladder or the EDM SDE."""
    world, eps = WORLDS[name], noise_for(steps)
    levels = np.array([world.nsr(t) for t in range(world.sde.levels)])
    for sde in (world.sde, WORLDS["edm"].sde):
        peer = Peer(steps, **peers(churn), levels=levels)
        run = states_of(torch_model(world, "eps"), sde, steps, eps, **churn)
        check(run, peer, eps, bound=1e-11)


def test_eighteen_steps_also_on_a_ladder() -> None:
    for name in ("edm", "ncsn"):
        plan = make_plan("edm", torch_model(WORLDS[name], "eps"), WORLDS[name].sde, compat="edm")
        assert plan.nfe == 35
        assert not plan.coef[-1, 0, 2:].any()  # t_N = 0: D, no correction


def test_a_wrong_noise_number_or_churn_is_seen() -> None:
    world, eps = WORLDS["edm"], noise_for(18)
    churn = CIFAR | {"S_churn": 5.0}
    run = states_of(torch_model(world, "x0"), world.sde, 18, eps, **churn)
    check(run, Peer(18, **peers(churn)), eps)
    for change in ({"S_churn": 5.0 + 1e-8}, {"S_noise": 1.0}, {"S_max": 0.3}, {"S_min": 0.1}):
        with pytest.raises(AssertionError):
            check(run, Peer(18, **peers(churn | change)), eps)
    eps[:-1] = np.roll(eps[:-1], 1, axis=0)
    with pytest.raises(AssertionError):
        check(run, Peer(18, **peers(churn)), eps)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"S_churn": 40.0}, "noise-to-signal ratios"),
        ({"compat": "score_sde"}, "compat: method 'edm' reproduces 'edm', got 'score_sde'"),
        ({"steps": 0}, "steps: expected an integer ≥ 1, got 0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    world = WORLDS["edm"]
    with pytest.raises(ValueError, match=match):
        make_plan("edm", torch_model(world, "x0"), world.sde, **({"compat": "edm"} | options))
