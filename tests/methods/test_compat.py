"""compat="score_sde" against score_sde's own loop (sampling.py, sde_lib.py), float64.

The reference below follows get_pc_sampler: float32 times and floor indices, tables of N entries,
corrector then predictor at the same time, and what it returns with and without denoising.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from plan_reference import (
    MIXTURE,
    WORLDS,
    Array,
    Network,
    Noise,
    World,
    interpret,
    noises,
    score_model,
)
from textbook import Denoiser

from sbm_fast.methods import make_plan
from sbm_fast.sde import DDPMSchedule, NCSNLadder


def float32_times(eps: float, n: int) -> tuple[Array, Array]:
    """The peer's own calls: linspace(1, eps, n) in float32, and floor(t (n − 1) / T)."""
    times = torch.linspace(1, eps, n)
    return times.double().numpy(), (times * (n - 1) / 1).long().numpy()


class Peer:
    """score_sde's VPSDE, subVPSDE or VESDE with N steps: ``discretize``, ``sde`` and tables."""

    def __init__(self, world: World, n: int) -> None:
        self.world, self.n = world, n
        self.kind = type(world.sde).__name__
        self.ve = self.kind in ("VESDE", "NCSNLadder")
        self.eps = 1e-5 if self.ve else 1e-3
        self.times, self.index = float32_times(self.eps, n)
        if self.ve:
            low, high = world.sde.std(world.sde.t_min), world.sde.std(world.sde.t_max)
            if self.kind == "VESDE":
                low, high = 0.01, 50.0
            self.sigmas = np.exp(np.linspace(np.log(low), np.log(high), n))
        elif self.kind == "DDPMSchedule":
            self.betas = np.asarray(world.sde.betas)
        else:
            self.betas = np.linspace(0.1 / n, 20.0 / n, n)
        if world.f is None:
            self.times = self.index.astype(np.float64)

    def predict(self, name: str, x: Array, i: int, score: Any, z: Noise, noisy: bool) -> Array:
        t, k = self.times[i], self.index[i]
        if name == "reverse_diffusion" and self.kind == "SubVPSDE":
            name = "euler_maruyama"
        if name == "euler_maruyama":
            dt = -1.0 / self.n
            g2 = self.world.g2(t)
            mean = x + (self.world.f(t) * x - g2 * score(x, t)) * dt
            return mean + np.sqrt(g2) * np.sqrt(-dt) * z() if noisy else mean
        if self.ve:
            adjacent = 0.0 if k == 0 else self.sigmas[k - 1]
            g2 = self.sigmas[k] ** 2 - adjacent**2
            mean = x + g2 * score(x, t)
            std = np.sqrt(g2)
            if name == "ancestral":
                std = np.sqrt(adjacent**2 * g2 / self.sigmas[k] ** 2)
        else:
            beta = self.betas[k]
            if name == "reverse_diffusion":
                mean = x - (np.sqrt(1 - beta) * x - x) + beta * score(x, t)
            else:
                mean = (x + beta * score(x, t)) / np.sqrt(1 - beta)
            std = np.sqrt(beta)
        return mean + std * z() if noisy and std > 0 else mean

    def correct(
        self, name: str, x: Array, i: int, score: Any, z: Noise, snr: float, n_steps: int
    ) -> Array:
        t = self.times[i]
        alpha = 1.0 if self.ve else 1.0 - self.betas[self.index[i]]
        for _ in range(n_steps):
            grad, noise = score(x, t), z()
            if name == "langevin":
                grad_norm = np.linalg.norm(grad, axis=-1).mean()
                noise_norm = np.linalg.norm(noise, axis=-1).mean()
                step = (snr * noise_norm / grad_norm) ** 2 * 2 * alpha
            else:
                step = (snr * self.world.sigma(t)) ** 2 * 2 * alpha
            x = x + step * grad + np.sqrt(step * 2) * noise
        return x

    def sample(
        self,
        predictor: str,
        corrector: str,
        score: Any,
        z: Noise,
        *,
        denoise: bool,
        snr: float = 0.16,
        n_steps: int = 1,
    ) -> Array:
        x = self.world.sde.prior_std * z()
        for i in range(self.n):
            if corrector != "none":
                x = self.correct(corrector, x, i, score, z, snr, n_steps)
            if predictor != "none":
                x = self.predict(predictor, x, i, score, z, not (denoise and i == self.n - 1))
        return x


SMALL = [
    (name, predictor, corrector, n)
    for name, predictor, corrector, n in product(
        ("ve", "vp"),
        ("reverse_diffusion", "euler_maruyama", "ancestral", "none"),
        ("langevin", "ald", "none"),
        (1, 21, 50),
    )
    if (predictor, corrector) != ("none", "none") and (name, n) != ("vp", 1)
]
LONG = [
    ("vp", "reverse_diffusion", "langevin", 2000),
    ("vp", "ancestral", "none", 2000),
    ("ve", "reverse_diffusion", "ald", 1000),
]
LADDERS = [
    (name, predictor, corrector, None)
    for name, predictor, corrector in product(
        ("ncsn", "ddpm"), ("reverse_diffusion", "ancestral"), ("langevin", "ald", "none")
    )
]
OTHERS = [
    ("vp", "euler_maruyama", "none", 1),
    ("subvp", "reverse_diffusion", "none", 30),
    ("subvp", "euler_maruyama", "none", 30),
]


EVERY = [(*case, denoise) for case in SMALL + LADDERS + OTHERS for denoise in (True, False)]


@pytest.mark.parametrize(
    ("name", "predictor", "corrector", "n", "denoise"), EVERY + [(*case, True) for case in LONG]
)
def test_step_by_step(
    name: str, predictor: str, corrector: str, n: int | None, denoise: bool
) -> None:
    world = WORLDS[name]
    options: dict[str, Any] = {"denoise": "mean" if denoise else False}
    if predictor == "none":
        options = {}
    plan = make_plan(
        "pc",
        score_model(world),
        world.sde,
        steps=n,
        predictor=predictor,
        corrector=corrector,
        compat="score_sde",
        **options,
    )
    peer = Peer(world, n or world.sde.levels)
    assert plan.nfe == peer.n * ((predictor != "none") + (corrector != "none"))
    noise = Noise.normal(noises(plan), (4, 2))
    trace = interpret(plan, Network(world, MIXTURE, "score"), noise.again())
    den = Denoiser(world, MIXTURE)
    other = noise.again()
    out = peer.sample(predictor, corrector, den.score, other, denoise=denoise)
    assert other.used == len(noise.arrays)
    np.testing.assert_allclose(trace.states[-1], out, rtol=1e-12, atol=1e-12 * np.abs(out).max())


def test_several_corrector_steps_and_snr() -> None:
    world, options = WORLDS["vp"], {"snr": 0.3, "corrector_steps": 3}
    plan = make_plan("pc", score_model(world), world.sde, steps=30, compat="score_sde", **options)
    noise = Noise.normal(noises(plan), (4, 2))
    trace = interpret(plan, Network(world, MIXTURE, "score"), noise.again())
    score = Denoiser(world, MIXTURE).score
    out = Peer(world, 30).sample(
        "reverse_diffusion", "langevin", score, noise.again(), denoise=True, snr=0.3, n_steps=3
    )
    np.testing.assert_allclose(trace.states[-1], out, rtol=1e-12, atol=1e-12)


def test_the_floor_slips_where_the_peers_does() -> None:
    """N = 2000, eps = 1e-3: half of the indices are one low, one repeats, 0 is never reached."""
    from sbm_fast.methods.compat import score_sde_steps
    from sbm_fast.methods.setup import Setup

    world = WORLDS["vp"]
    steps = score_sde_steps(Setup(score_model(world), world.sde, "pc"), 2000, None)
    betas = np.linspace(0.1 / 2000, 20.0 / 2000, 2000)
    index = np.array([int(np.argmin(np.abs(betas - step.beta))) for step in steps])
    assert index[-1] == 1
    assert len(set(index.tolist())) == 1999
    assert int((index != np.arange(1999, -1, -1)).sum()) == 1000
    exact = score_sde_steps(Setup(score_model(world), world.sde, "pc"), 1000, None)
    assert exact[-1].beta == pytest.approx(0.1 / 1000)


def test_own_eps() -> None:
    world = WORLDS["ve"]
    plan = make_plan("pc", score_model(world), world.sde, steps=5, t_min=1e-2, compat="score_sde")
    expected = float32_times(1e-2, 5)[0]
    np.testing.assert_array_equal(plan.time[plan.evaluates][::2], expected)


def test_the_peers_own_sde_brings_its_number_of_steps() -> None:
    theirs = type("VPSDE", (), {"beta_0": 0.1, "beta_1": 20.0, "N": 40})()
    model = score_model(WORLDS["vp"])
    plan = make_plan("pc", model, theirs, compat="score_sde")
    expected = make_plan("pc", model, WORLDS["vp"].sde, steps=40, compat="score_sde")
    assert plan.difference(expected) == ""


def test_ladders_keep_their_tables() -> None:
    sigmas = np.array([0.1, 0.3, 2.0, 9.0])
    world = World(NCSNLadder(sigmas), m=lambda t: 1.0, sigma=lambda t: sigmas[int(t)])
    plan = make_plan(
        "reverse_diffusion", score_model(world), world.sde, compat="score_sde", denoise=False
    )
    drops = sigmas**2 - np.array([0, *sigmas[:-1]]) ** 2
    np.testing.assert_allclose(plan.coef[1:, 0, 3], np.sqrt(drops)[::-1], rtol=1e-14)
    betas = np.array([0.01, 0.2, 0.3])
    ladder = DDPMSchedule(betas)
    model = score_model(World(ladder, m=lambda t: 1.0, sigma=lambda t: 1.0))
    plan = make_plan("ancestral", model, ladder, compat="score_sde", denoise=False)
    np.testing.assert_allclose(plan.coef[1:, 0, 3], np.sqrt(betas)[::-1], rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("edm", {}, "compat: 'score_sde' has no EDMSDE"),
        ("vp", {"schedule": "karras"}, "schedule: compat"),
        ("vp", {"steps": 20}, "steps: .* needs more than beta_max = 20 steps, got 20"),
        ("vp", {"t_max": 0.9}, "t_max: compat"),
        ("ddpm", {"steps": 7}, "steps: compat='score_sde' keeps the ladder's 24"),
        ("ddpm", {"t_min": 1}, "t_min: a ladder"),
        ("subvp", {}, "corrector: 'score_sde' has no corrector for the sub-VP"),
        ("subvp", {"predictor": "ancestral", "corrector": "none"}, "predictor: 'score_sde'"),
        ("vp", {"predictor": "ancestral", "variance": "posterior"}, "variance: compat"),
        ("ve", {"predictor": "ancestral", "variance": "large"}, "variance: compat"),
        ("vp", {"predictor": "none", "denoise": "mean"}, "denoise: method 'pc'"),
        ("vp", {"denoise": "tweedie"}, "denoise: method 'pc'"),
        ("vp", {"compat": "edm"}, "compat: method 'pc' reproduces 'score_sde', got 'edm'"),
    ],
)
def test_what_the_peer_does_not_have(name: str, options: dict[str, Any], match: str) -> None:
    world = WORLDS[name]
    with pytest.raises(ValueError, match=match):
        make_plan("pc", score_model(world), world.sde, **({"compat": "score_sde"} | options))
