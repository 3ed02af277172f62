"""Denoising score matching against closed forms, and its noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.model import ScoreModel
from sbm_fast.nn import UNet
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, NCSNLadder, SubVPSDE
from sbm_fast.training.losses import dsm

SDES = [VESDE(), VPSDE(), SubVPSDE(), EDMSDE()]


def moments(sde: SDE, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """m(t) and σ(t) as columns."""
    column = (-1, *(1,) * (like.ndim - 1))
    m = torch.as_tensor(sde.mean_scale(t.double().numpy()), dtype=like.dtype)
    sigma = torch.as_tensor(sde.std(t.double().numpy()), dtype=like.dtype)
    return m.reshape(column), sigma.reshape(column)


def gaussian_score(sde: SDE, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Score of the perturbed data N(mean, std²): (m·mean − x) / (m² std² + σ²)."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        m, sigma = moments(sde, t, x)
        return (m * mean - x) / (m**2 * std**2 + sigma**2)

    return score


@pytest.mark.parametrize("weighting", ["variance", "likelihood", "edm", np.square])
@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_exact_conditional_score_has_no_loss(sde: SDE, weighting: Any) -> None:
    # All data are one point, so the conditional score is the score of a Gaussian of std 0.
    x = torch.full((64, 3), 0.7, dtype=torch.float64)
    exact = dsm(gaussian_score(sde, 0.7, 0.0), sde, x, weighting=weighting)
    zero = dsm(lambda x, t: torch.zeros_like(x), sde, x, weighting=weighting)
    # The label reaches the model in the data's float64; what is left is rounding of z / σ.
    assert exact < 1e-12 * zero


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_a_zero_score_costs_the_noise(sde: SDE) -> None:
    x = torch.randn(32, 2, 4, 4, dtype=torch.float64)
    loss = dsm(lambda x, t: torch.zeros_like(x), sde, x, seed=3, step=9, reduction="none")
    z = noise.normal(3, x.shape, draw=9, stream=noise.TRAINING, dtype=torch.float64)
    torch.testing.assert_close(loss, z.flatten(1).square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("sde", [VESDE(0.01, 5.0), VPSDE(), SubVPSDE()], ids=str)
def test_the_true_score_of_gaussian_data_has_the_known_loss(sde: SDE, t: float) -> None:
    # σ s + z = z (1 − σ²/v) − σ m x/v with v = m² std² + σ²: its variance is m² std² / v.
    std, n, d = 0.5, 4000, 32
    x = std * torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = dsm(gaussian_score(sde, 0.0, std), sde, x, t_min=t, t_max=t + 1e-9, reduction="none")
    m, sigma = float(sde.mean_scale(t)), float(sde.std(t))
    expected = d * (m * std) ** 2 / ((m * std) ** 2 + sigma**2)
    error = float(losses.std()) / n**0.5
    assert abs(float(losses.mean()) - expected) < 4 * error
    assert error < 0.02 * expected


def test_the_true_score_is_the_best_of_its_family() -> None:
    sde, x = VPSDE(), 0.5 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    true = gaussian_score(sde, 0.0, 0.5)
    losses = [float(dsm(lambda x, t, k=k: k * true(x, t), sde, x)) for k in (0.9, 1.0, 1.1)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_weightings_are_those_of_the_formula(sde: SDE) -> None:
    t = 0.5 * (sde.t_min + sde.t_max)
    x = torch.randn(16, 5, dtype=torch.float64)

    def loss(weighting: Any) -> float:
        model = ScoreModel(lambda x, t: torch.zeros_like(x), sigma_data=0.8)
        options = {"t_min": t, "t_max": t * (1 + 1e-12), "weighting": weighting}
        return float(dsm(model, sde, x, **options))

    one = loss(np.ones_like)
    sigma, nsr, g = (float(f(t)) for f in (sde.std, sde.nsr, sde.diffusion))
    assert loss("variance") == pytest.approx(sigma**2 * one, rel=1e-9)
    assert loss("likelihood") == pytest.approx(g**2 * one, rel=1e-9)
    assert loss("edm") == pytest.approx(sigma**2 * (1 + (nsr / 0.8) ** 2) * one, rel=1e-9)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "edm"])
@pytest.mark.parametrize("sde", [VESDE(), VPSDE()], ids=str)
def test_every_prediction_of_one_score_has_one_loss(sde: SDE, predicts: str) -> None:
    score, data = gaussian_score(sde, 0.2, 0.5), 0.75
    x = torch.randn(64, 6, dtype=torch.float64)

    def net(scaled: Tensor, label: Tensor) -> Tensor:
        m, sigma = moments(sde, label, scaled)
        nsr = sigma / m
        x = scaled * m * (data**2 + nsr**2).sqrt() if predicts == "edm" else scaled
        eps = -sigma * score(x, label)
        x0 = (x - sigma * eps) / m
        alpha, tilde = m / (m**2 + sigma**2).sqrt(), sigma / (m**2 + sigma**2).sqrt()
        skip = data**2 / (data**2 + nsr**2)
        out = nsr * data / (data**2 + nsr**2).sqrt()
        outputs = {"eps": eps, "x0": x0, "v": alpha * eps - tilde * x0}
        return outputs[predicts] if predicts != "edm" else (x0 - skip * x / m) / out

    model = ScoreModel(net, predicts=predicts, time="t", sigma_data=data)
    loss, expected = dsm(model, sde, x), dsm(score, sde, x)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


def test_a_network_trained_under_another_sde_is_matched() -> None:
    x = torch.randn(16, 4, dtype=torch.float64)
    model = ScoreModel(gaussian_score(VPSDE(), 0.2, 0.5), sde=VPSDE())
    loss = dsm(model, VESDE(0.01, 50.0), x)
    expected = dsm(gaussian_score(VESDE(0.01, 50.0), 0.2, 0.5), VESDE(0.01, 50.0), x)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


def test_on_a_ladder_the_times_are_its_levels() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    dsm(model, NCSNLadder.geometric(10.0, 0.01, 7), torch.zeros(500, 1))
    assert seen[0].unique().tolist() == list(range(7))


def test_the_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    sde, x = VPSDE(), torch.randn(10, 3, dtype=torch.float64)
    model = gaussian_score(sde, 0.0, 1.0)

    def loss(part: Tensor, **keys: Any) -> Tensor:
        return dsm(model, sde, part, step=7, reduction="none", **keys)

    whole = loss(x, seed=5)
    split = torch.cat([loss(x[:4], seed=5), loss(x[4:], seed=5, first_sample=4)])
    assert torch.equal(whole, split)
    order = torch.randperm(10)
    keys = noise.keys(5, 10)
    assert torch.equal(loss(x[order], keys=keys[order]), whole[order])
    assert float(dsm(model, sde, x, seed=5, step=7)) == pytest.approx(float(whole.mean()))


def test_seed_and_step_choose_the_noise() -> None:
    sde, x = VPSDE(), torch.randn(4, 3)
    model = gaussian_score(sde, 0.0, 1.0)
    losses = {(seed, step): float(dsm(model, sde, x, seed=seed, step=step))
              for seed in (0, 1) for step in (0, 1)}  # fmt: skip
    assert len(set(losses.values())) == 4
    assert losses[0, 1] == float(dsm(model, sde, x, seed=0, step=1))


def test_times_fill_the_range() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    dsm(model, VPSDE(), torch.zeros(2000, 1), t_min=0.2, t_max=0.6)
    t = seen[0]
    assert 0.2 <= t.min() < 0.205 and 0.595 < t.max() <= 0.6
    assert abs(float(t.mean()) - 0.4) < 4 * 0.4 / (12 * 2000) ** 0.5


def test_gradients_flow_and_conditions_arrive() -> None:
    net = UNet(channels=4, channel_mult=(1,), predicts="edm", time="edm")
    dsm(net, VPSDE(), torch.randn(4, 1, 4, 4)).backward()
    gradient = net.last.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0

    def conditional(x: Tensor, t: Tensor, shift: float) -> Tensor:
        return torch.full_like(x, shift)

    losses = {
        float(dsm(conditional, VPSDE(), torch.zeros(2, 3), cond={"shift": s})) for s in (0, 1)
    }
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be a floating"),
        ({"x": np.zeros((2, 3))}, TypeError, "ndarray"),
        ({"x": torch.zeros(3)}, ValueError, r"x must be \[B"),
        ({"x": torch.zeros(0, 3)}, ValueError, "B >= 1"),
        ({"weighting": "snr"}, ValueError, "weighting.*'snr'"),
        ({"reduction": "sum"}, ValueError, "reduction"),
        ({"t_min": 0.5, "t_max": 0.5}, ValueError, "t_min"),
        ({"t_min": -0.1}, ValueError, "t_min"),
        ({"sde": "VP"}, TypeError, "sde"),
        ({"model": 3}, TypeError, "model"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, ValueError, "keys"),
    ],
)
def test_a_wrong_argument_is_named(
    change: dict[str, Any], error: type[Exception], named: str
) -> None:
    arguments = {"model": lambda x, t: x, "sde": VPSDE(), "x": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=named):
        dsm(**arguments)
