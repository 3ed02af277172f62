"""ddpm: the paper's recursion and laws on every β schedule, respaced chains, the peer, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from plan_reference import (
    GAUSSIAN,
    MIXTURE,
    PREDICTIONS,
    SIGMA_DATA,
    Array,
    Network,
    Noise,
    World,
    interpret,
    moments,
    noises,
    prediction,
    score_model,
)
from torch import Tensor

from sbm_fast import ScoreModel, sample
from sbm_fast.methods import make_plan
from sbm_fast.plan import F, X, Z
from sbm_fast.sde import EDMSDE, VESDE, VPSDE, DDPMSchedule, NCSNLadder, SubVPSDE

Eps = Callable[[Array, int], Array]

BETAS = {
    "linear": np.linspace(1e-4, 0.02, 120),
    "quadratic": np.linspace(1e-4**0.5, 0.02**0.5, 120) ** 2,  # β schedules of the paper's code
    "constant": np.full(120, 0.02),
    "jsd": 1.0 / np.arange(121, 1, -1),
    "cosine": np.asarray(DDPMSchedule.cosine(120).betas),
}
TIMES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every": ({}, []),
    "own": ({"schedule": [100, 60, 7, 6, 0]}, [100, 60, 7, 6, 0]),
    "ends high": ({"schedule": [119, 80, 3]}, [119, 80, 3]),
    "uniform": ({"steps": 18}, np.rint(np.linspace(119, 0, 18)).astype(int).tolist()),
}


def paper(
    alphas_cumprod: Array,
    visited: list[int],
    eps: Eps,
    z: Callable[[], Array],
    *,
    variance: str,
    clip: float | None = None,
) -> list[Array]:
    """Algorithm 2 of Ho et al. 2020 on the chain respaced to `visited`, every state.

    Nichol & Dhariwal 2021, eq. 19: β = 1 − ᾱ_{S_t}/ᾱ_{S_{t−1}}. With `clip` the mean is eq. 7 of
    the clipped x_0. A chain that starts below the last level starts from σ there, as everywhere in
    the package.
    """
    top = visited[0] == len(alphas_cumprod) - 1
    states = [z() if top else np.sqrt(1 - alphas_cumprod[visited[0]]) * z()]
    for i, below in pairwise([*visited, -1]):
        bar = alphas_cumprod[i]
        bar_below = alphas_cumprod[below] if below >= 0 else 1.0
        alpha = bar / bar_below
        beta, x = 1 - alpha, states[-1]
        if clip is None:
            mean = (x - beta / np.sqrt(1 - bar) * eps(x, i)) / np.sqrt(alpha)
        else:
            x0 = np.clip((x - np.sqrt(1 - bar) * eps(x, i)) / np.sqrt(bar), -clip, clip)
            mean = np.sqrt(bar_below) * beta / (1 - bar) * x0
            mean = mean + np.sqrt(alpha) * (1 - bar_below) / (1 - bar) * x
        if below < 0:
            return [*states, mean]
        sigma2 = beta if variance == "beta" else beta * (1 - bar_below) / (1 - bar)
        states.append(mean + np.sqrt(sigma2) * z())
    raise AssertionError


def world_of(betas: Array) -> World:
    bar = np.cumprod(1 - betas)
    return World(
        DDPMSchedule(betas),
        m=lambda t: float(np.sqrt(bar[int(t)])),
        sigma=lambda t: float(np.sqrt(1 - bar[int(t)])),
        vp=True,
    )


def eps_of(world: World, data: Any) -> Eps:
    def eps(x: Array, i: int) -> Array:
        m, sigma = world.level(i)
        return prediction("eps", x, data.posterior_mean(x, m, sigma), m, sigma)

    return eps


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("times", list(TIMES))
@pytest.mark.parametrize("schedule", list(BETAS))
def test_law_for_gaussian_data_is_the_recursions(schedule: str, times: str, variance: str) -> None:
    """Mean and std of every row against the scalar recursion of the chain."""
    betas = BETAS[schedule]
    options, visited = TIMES[times]
    visited = visited or list(range(len(betas) - 1, -1, -1))
    bar = np.cumprod(1 - betas)
    mean, variance_now = 0.0, 1.0 if visited[0] == len(betas) - 1 else 1 - bar[visited[0]]
    expected = [(mean, np.sqrt(variance_now))]
    for i, below in pairwise([*visited, -1]):
        bar_below = bar[below] if below >= 0 else 1.0
        alpha = bar[i] / bar_below
        # D* = A x + B for data N(0.3, 0.5²)
        total = bar[i] * 0.25 + 1 - bar[i]
        a, b = np.sqrt(bar[i]) * 0.25 / total, 0.3 * (1 - bar[i]) / total
        from_data = np.sqrt(bar_below) * (1 - alpha) / (1 - bar[i])
        slope = from_data * a + np.sqrt(alpha) * (1 - bar_below) / (1 - bar[i])
        added = 1 - alpha if variance == "beta" else (1 - alpha) * (1 - bar_below) / (1 - bar[i])
        mean = slope * mean + from_data * b
        variance_now = slope**2 * variance_now + (added if below >= 0 else 0.0)
        expected.append((mean, np.sqrt(variance_now)))
    world = world_of(betas)
    for predicts in PREDICTIONS:
        model = score_model(world, predicts, "index")
        plan = make_plan("ddpm", model, world.sde, variance=variance, **options)
        assert plan.nfe == len(visited)
        np.testing.assert_array_equal(plan.label[1:], visited)
        got = np.stack(plan.gaussian(0.3, 0.5), 1)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10, err_msg=predicts)


@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("visited", [list(range(59, -1, -1)), [59, 40, 12, 3, 0], [45, 30, 2]])
def test_path_for_mixtures_is_the_papers(
    visited: list[int], variance: str, clip: float | None
) -> None:
    world = world_of(np.linspace(1e-4, 0.1, 60))
    bar = np.cumprod(1 - np.linspace(1e-4, 0.1, 60))
    for predicts in PREDICTIONS:
        plan = make_plan(
            "ddpm", score_model(world, predicts), world.sde, schedule=visited,
            variance=variance, clip_denoised=clip,
        )  # fmt: skip
        noise = Noise.normal(noises(plan), (5, 2))
        assert noises(plan) == len(visited)  # the prior, and every step but the last
        trace = interpret(plan, Network(world, MIXTURE, predicts), noise.again())
        options: dict[str, Any] = {"variance": variance, "clip": clip}
        states = paper(bar, visited, eps_of(world, MIXTURE), noise.again(), **options)
        for got, expected in zip(trace.states, states, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11, err_msg=predicts)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_continuous_vp_sde_is_the_chain_of_its_grid(variance: str) -> None:
    """Its own grid gives a chain; DDPM's discretisation of it is met where it has its levels."""
    grid = np.linspace(1.0, 1e-3, 9)
    log_m = -0.25 * grid**2 * 19.9 - 0.5 * grid * 0.1
    bar = np.exp(2 * log_m)[::-1]  # ascending index, as on a ladder
    sde = VPSDE()
    model = ScoreModel(lambda x, t: x, predicts="eps", sde=sde)
    plan = make_plan("ddpm", model, sde, steps=9, variance=variance)
    noise = Noise.one_hot(noises(plan))
    world = World(
        sde, m=lambda t: float(sde.mean_scale(t)), sigma=lambda t: float(sde.std(t)), vp=True
    )
    trace = interpret(plan, Network(world, GAUSSIAN, "eps"), noise.again())
    ladder = World(sde, m=lambda i: np.sqrt(bar[int(i)]), sigma=lambda i: np.sqrt(1 - bar[int(i)]))
    eps = eps_of(ladder, GAUSSIAN)
    states = paper(bar, list(range(8, -1, -1)), eps, noise.again(), variance=variance)
    got = [moments(s) for s in trace.states]
    np.testing.assert_allclose(got, [moments(s) for s in states], rtol=1e-10, atol=1e-12)


def test_default_variance_and_names() -> None:
    sde = DDPMSchedule.linear(10)
    plain, learned = (
        ScoreModel(lambda x, t: x, "eps", time="index", sde=sde, variance=variance)
        for variance in (None, "learned_range")
    )
    plan = partial(make_plan, "ddpm", sde=sde)
    assert plan(model=plain).description["variance"] == "beta"
    assert plan(model=learned).description["variance"] == "learned"
    assert not plan(model=learned, variance="beta").log_std.any()
    for name, alias in (("beta", "fixedlarge"), ("beta_tilde", "fixedsmall")):
        assert plan(model=plain, variance=name).difference(plan(model=plain, variance=alias)) == ""
    assert "learned" in str(plan(model=learned)) and "z of std" in str(plan(model=learned))


def test_bounds_of_the_learned_variance_are_those_of_the_respaced_chain() -> None:
    betas, visited = np.linspace(1e-4, 0.02, 200), [199, 120, 60, 20, 0]
    sde = DDPMSchedule(betas)
    model = ScoreModel(lambda x, t: x, "eps", time="index", sde=sde, variance="learned_range")
    plan = make_plan("ddpm", model, sde, schedule=visited)
    bar = np.cumprod(1 - betas)[visited]
    beta = 1 - bar[:-1] / bar[1:]
    tilde = beta * (1 - bar[1:]) / (1 - bar[:-1])
    rows = plan.log_std[1:-1]
    np.testing.assert_allclose(rows, 0.5 * np.log(np.stack([tilde, beta], 1)), rtol=1e-10)
    np.testing.assert_array_equal(plan.coef[1:-1, 0, Z], 1.0)
    # the last step draws nothing, so the logarithm of its β̃ = 0 is not needed
    assert not plan.log_std[0].any() and not plan.log_std[-1].any()
    assert plan.coef[-1, 0, Z] == 0
    with pytest.raises(ValueError, match="log_std: row 1 learns its variance, no affine map"):
        plan.gaussian(0.0, 1.0)
    assert np.isfinite(plan.kappa).all()


class Peer:
    """p_sample_loop of the paper's code, from the paper, float64: β linear, level i = t − 1."""

    def __init__(self, n: int = 1000) -> None:
        self.betas = np.linspace(1e-4, 0.02, n, dtype=np.float64)
        alphas = 1.0 - self.betas
        self.bar = np.cumprod(alphas)
        self.bar_below = np.append(1.0, self.bar[:-1])
        self.posterior_variance = self.betas * (1 - self.bar_below) / (1 - self.bar)
        self.coef_x0 = self.betas * np.sqrt(self.bar_below) / (1 - self.bar)
        self.coef_x = (1 - self.bar_below) * np.sqrt(alphas) / (1 - self.bar)
        # index 0 takes the variance of index 1; nothing is drawn there
        self.variances = {
            "fixedlarge": np.append(self.posterior_variance[1], self.betas[1:]),
            "fixedsmall": np.append(self.posterior_variance[1], self.posterior_variance[1:]),
        }

    def __call__(self, eps: Eps, z: Callable[[int], Array], variance: str, clip: bool) -> Array:
        n = len(self.betas)
        x = z(n)
        for i in reversed(range(n)):
            x0 = np.sqrt(1 / self.bar[i]) * x - np.sqrt(1 / self.bar[i] - 1) * eps(x, i)
            x0 = np.clip(x0, -1.0, 1.0) if clip else x0
            mean = self.coef_x0[i] * x0 + self.coef_x[i] * x
            std = np.exp(0.5 * np.log(self.variances[variance][i]))
            x = mean + (i != 0) * std * (z(i) if i else 0.0)
        return x


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
@pytest.mark.parametrize("n", [1000, 37])
def test_compat_is_the_papers_code(n: int, variance: str, clip: bool) -> None:
    """A whole run in float64 under the peer's noise, to 1e-12 of the samples' size."""
    peer, seen = Peer(n), []
    rng = np.random.default_rng(3)
    z = rng.standard_normal((n + 1, 4, 3))
    weight = rng.standard_normal((3, 3)) / 2

    def eps(x: Array, i: int) -> Array:
        return np.tanh(x @ weight + i / n)

    def network(x: Tensor, label: Tensor) -> Tensor:
        assert (label == label.round()).all()
        seen.append(int(label[0]))
        return torch.from_numpy(eps(x.numpy(), seen[-1]))

    sde = DDPMSchedule.linear(n)
    model = ScoreModel(network, "eps", time="index", sde=sde)
    x = sample(
        model, sde, (4, 3), method="ddpm", compat="ddpm", variance=variance,
        clip_denoised=1.0 if clip else None, dtype=torch.float64,
        # row 0 is the prior, row r evaluates level n − r
        noise=lambda draw, stream: torch.from_numpy(z[n - draw] if draw else z[n]),
    )  # fmt: skip
    expected = peer(eps, lambda i: z[i], variance, clip)
    assert seen == list(range(n - 1, -1, -1))
    np.testing.assert_allclose(
        x.numpy(), expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max())
    )


def test_compat_traps() -> None:
    """peers.md §2: ᾱ_999 of the discrete chain, integer labels, float64 products, the last row."""
    sde = DDPMSchedule.linear()
    model = ScoreModel(lambda x, t: x, "eps", time="index", sde=sde)
    plan = make_plan("ddpm", model, sde, compat="ddpm")
    assert (plan.rows, plan.nfe) == (1001, 1000)
    np.testing.assert_array_equal(plan.label[1:], np.arange(999, -1, -1))
    assert sde.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert (plan.coef[0, 0, Z], plan.coef[-1, 0, Z]) == (1.0, 0.0)
    np.testing.assert_allclose(plan.coef[1:-1, 0, Z] ** 2, sde.betas[:0:-1], rtol=1e-13)
    # Algorithm 2, line 4; a cumprod in float32 (diffusers) is off by 1e-7 and more
    bar = np.cumprod(1 - sde.betas)
    on_eps = -sde.betas / np.sqrt(1 - bar) / np.sqrt(1 - sde.betas)
    np.testing.assert_allclose(plan.coef[1:, 0, X], 1 / np.sqrt(1 - sde.betas)[::-1], rtol=1e-12)
    np.testing.assert_allclose(plan.coef[1:, 0, F], on_eps[::-1], rtol=1e-12)
    rounded = np.cumprod((1 - sde.betas).astype(np.float32))
    assert np.abs(np.sqrt(1 - rounded) / np.sqrt(1 - bar) - 1).max() > 1e-7
    # without compat the same chain, to rounding
    other = make_plan("ddpm", model, sde)
    np.testing.assert_allclose(other.coef, plan.coef, rtol=1e-9)


LADDER = DDPMSchedule.linear(12)
EPS = ScoreModel(lambda x, t: x, "eps", sde=LADDER, time="index")
LEARNED = ScoreModel(lambda x, t: x, "eps", sde=LADDER, time="index", variance="learned_range")


@pytest.mark.parametrize("sde", [VESDE(), SubVPSDE(), EDMSDE(), NCSNLadder([0.1, 1.0])])
def test_chains_that_preserve_no_variance_are_refused(sde: Any) -> None:
    model = ScoreModel(lambda x, t: x, "eps", sde=sde, sigma_data=SIGMA_DATA)
    with pytest.raises(ValueError, match="sde: method 'ddpm' needs a variance-preserving chain"):
        make_plan("ddpm", model, sde, steps=2)


@pytest.mark.parametrize(
    ("model", "sde", "options", "match"),
    [
        (EPS, LADDER, {"variance": "betas"}, "variance: unknown value 'betas'; did you mean"),
        (EPS, LADDER, {"variance": "learned"}, "variance: 'learned' needs a network with twice"),
        (LEARNED, LADDER, {"variance": "learned", "compat": "ddpm"}, "variance: compat='ddpm' has"),
        (EPS, LADDER, {"denoise": False}, "denoise: .*its last step draws no noise"),
        (EPS, LADDER, {"denoise": "tweedie"}, "denoise: "),
        (EPS, LADDER, {"compat": "score_sde"}, "compat: method 'ddpm' reproduces 'ddpm'"),
        (EPS, LADDER, {"compat": "ddpm", "steps": 6}, "steps: compat='ddpm' keeps the schedule's"),
        (EPS, LADDER, {"compat": "ddpm", "t_max": 6}, "t_max: compat='ddpm' visits every level"),
        (EPS, LADDER, {"compat": "ddpm", "t_min": 0}, "t_min: compat='ddpm' visits every level"),
        (EPS, LADDER, {"compat": "ddpm", "schedule": "uniform"}, "schedule: compat='ddpm' visits"),
        (EPS, LADDER, {"steps": 13}, "steps: the ladder has 12 levels"),
    ],
)
def test_errors(model: ScoreModel, sde: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_plan("ddpm", model, sde, **options)


def test_compat_needs_a_schedule() -> None:
    model = ScoreModel(lambda x, t: x, "eps", sde=VPSDE())
    with pytest.raises(ValueError, match="sde: compat='ddpm' needs a DDPMSchedule"):
        make_plan("ddpm", model, VPSDE(), compat="ddpm")


def test_learned_variance_of_a_step_without_noise() -> None:
    t = 0.999e-9
    times = [0.9, t, float(np.nextafter(t, 0)), 1e-12]
    model = ScoreModel(lambda x, t: x, "eps", variance="learned_range")
    with pytest.raises(ValueError, match=r"^schedule: .* same σ/m in float64"):
        make_plan("ddpm", model, VPSDE(), schedule=times)
    assert make_plan("ddpm", model, VPSDE(), schedule=times, variance="beta").nfe == 4
