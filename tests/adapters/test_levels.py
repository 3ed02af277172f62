"""One network per noise level: each sample goes to its own, and samplers see one network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbm_fast import ScoreModel, sample
from sbm_fast.adapters import levels
from sbm_fast.sde import DDPMSchedule, NCSNLadder

LADDER = NCSNLadder.geometric(10.0, 0.1, 6)


class Score(nn.Module):
    """∇ log p of N(0, s²) data at one σ, with s a parameter."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.s = nn.Parameter(torch.tensor(0.5))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return -x / (self.s**2 + self.sigma**2)


def per_level() -> list[Score]:
    return [Score(float(sigma)) for sigma in LADDER.sigmas]


def whole(x: Tensor, index: Tensor) -> Tensor:
    """All levels in one network."""
    sigma = torch.tensor(LADDER.sigmas.tolist(), dtype=x.dtype)[index.long()]
    return -x / (0.5**2 + sigma**2)[:, None]


@pytest.mark.parametrize("method", ["ald", "pc", "ancestral"])
@torch.no_grad()
def test_samplers_see_one_network(method: str) -> None:
    networks = per_level()
    model = levels(networks, LADDER, sample_shape=(3,))
    one = ScoreModel(whole, time="index", sde=LADDER, sample_shape=(3,))
    ours, theirs = (
        sample(m, LADDER, (5, 3), method=method, seed=1, device="cpu") for m in (model, one)
    )
    torch.testing.assert_close(ours, theirs)
    assert all(set(net.batches) == {5} for net in networks)


@torch.no_grad()
def test_mixed_levels_are_grouped() -> None:
    networks = per_level()
    net = levels(networks, LADDER).net
    x, index = torch.randn(7, 3), torch.tensor([5.0, 0, 3, 3, 0, 5, 3])
    torch.testing.assert_close(net(x, index), whole(x, index))
    assert [net.batches for net in networks] == [[2], [], [], [3], [], [2]]
    assert net(x[:0], index[:0]).shape == (0, 3)


def test_gradients_reach_every_network() -> None:
    networks = per_level()
    net = levels(networks, LADDER).net
    x = torch.randn(6, 3, requires_grad=True)
    net(x, torch.arange(6.0)).square().sum().backward()
    assert all(network.s.grad is not None for network in networks)
    assert x.grad is not None and (x.grad != 0).all()
    assert len(list(net.parameters())) == 6


def test_sigmas_in_the_order_of_the_networks() -> None:
    sigmas = [10.0, 1.0, 0.1]
    model = levels([Score(sigma) for sigma in sigmas], sigmas)
    assert isinstance(model.sde, NCSNLadder)
    np.testing.assert_allclose(model.sde.sigmas, [0.1, 1.0, 10.0])
    assert [net.sigma for net in model.net.networks] == [0.1, 1.0, 10.0]


def test_conditioning_and_labels() -> None:
    seen = []

    def network(x: Tensor, label: Tensor, *, y: Tensor, w: float) -> Tensor:
        seen.append((label.tolist(), y.tolist(), w))
        return x

    net = levels([network] * 3, DDPMSchedule.linear(3), predicts="eps", label=True).net
    y = torch.tensor([1, 2, 3])
    net(torch.zeros(3, 2), torch.tensor([2, 1, 2]), y=y, w=0.5)
    net(torch.zeros(3, 2), torch.tensor([1, 1, 1]), y=y, w=0.5)
    assert seen == [([1], [2], 0.5), ([2, 2], [1, 3], 0.5), ([1, 1, 1], [1, 2, 3], 0.5)]


def test_errors() -> None:
    networks = per_level()
    with pytest.raises(ValueError, match="networks: expected one for each of 6 levels, got 5"):
        levels(networks[:5], LADDER)
    with pytest.raises(TypeError, match="networks: expected a list of callables, got Score"):
        levels(networks[0], LADDER)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="networks"):
        levels([1, 2], [1.0, 2.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="all different"):
        levels(networks[:2], [1.0, 1.0])
    net: Callable[..., Tensor] = levels(networks, LADDER).net
    for label in (0.5, -1.0, 6.0, float("nan")):
        with pytest.raises(ValueError, match="label: expected a level, 0 … 5, got"):
            net(torch.zeros(2, 3), torch.tensor([1.0, label]))
    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        net(torch.zeros(2, 3, device="meta"), torch.zeros(2, device="meta"))
