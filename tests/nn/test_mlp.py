"""The network of vectors: its formula, what it carries, time tables, files, sampling, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

import sbm_fast
from sbm_fast.nn import MLP, Network, UNet, checkpoint
from sbm_fast.training.losses import dsm


def awake(**config: Any) -> MLP:
    """One whose every layer shows in the output."""
    torch.manual_seed(0)
    net = MLP(3, width=8, depth=2, **config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


def test_the_formula() -> None:
    net = awake(out_features=5)
    x, label = torch.randn(4, 3), 999 * torch.rand(4)
    emb = net.embed(label)
    h = net.first(x)
    for layer in net.layers:
        h = h + layer.linear2(silu(layer.linear1(silu(h)) + layer.time(emb)))
    want = net.last(silu(h))
    assert want.shape == (4, 5) and want.std() > 0
    torch.testing.assert_close(net(x, label), want)


def test_a_new_network_returns_zero_and_knows_its_shape() -> None:
    net = MLP(7)
    assert not net(torch.randn(2, 7), torch.rand(2)).any()
    assert net.sample_shape == (7,)
    assert net.num_parameters() == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_prepare(embedding: str) -> None:
    net = awake(embedding=embedding)
    labels, row = torch.tensor([0.0, 400.0, 999.0]), torch.tensor([2, 0, 2, 1])
    x = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(net.prepare(labels)(x, row), net(x, labels[row]))


def test_save_and_load(tmp_path: Path) -> None:
    net = awake(sde=sbm_fast.VPSDE(), embedding_width=12, predicts="v")
    path = tmp_path / "net.safetensors"
    net.save(path)
    for kind in (MLP, Network):
        back = kind.load(path).eval()
        assert type(back) is MLP and back.config == net.config
        assert (back.predicts, back.sample_shape) == ("v", (3,))
        x, label = torch.randn(2, 3), torch.rand(2)
        assert torch.equal(back(x, label), net(x, label))
    with pytest.raises(ValueError, match="'MLP', not a 'UNet'"):
        UNet.load(path)
    config = {**net.config, "width": 10**6}
    with pytest.raises(ValueError, match="width 1000000: a tensor of 1000000000000 elements"):
        checkpoint.bound(MLP, config, net.state_dict())


def test_it_learns_and_samples() -> None:
    """Two points at ±1: after some training samples lie at them, half of them at each."""
    torch.manual_seed(0)
    sde = sbm_fast.VPSDE()
    net = MLP(1, width=32, depth=2, predicts="eps", sde=sde)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(300):
        x = torch.randint(2, (256, 1)) * 2.0 - 1
        loss = dsm(net, sde, x, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    samples = sbm_fast.sample(net, sde, (400, 1), method="ode", solver="heun", steps=40, seed=1)
    assert samples.shape == (400, 1)
    near = (samples.abs() - 1).abs() < 0.25
    assert near.float().mean() > 0.9
    assert abs(float((samples > 0).float().mean()) - 0.5) < 0.125  # five standard deviations


@pytest.mark.parametrize(
    ("config", "kind", "named"),
    [
        ({"features": 0}, ValueError, "features"),
        ({"features": 2.0}, TypeError, "features"),
        ({"depth": 0}, ValueError, "depth"),
        ({"width": "8"}, TypeError, "width"),
        ({"embedding": "learned"}, ValueError, "embedding must be one of positional, fourier"),
        ({"embedding": ["fourier"]}, ValueError, "embedding must be one of"),
        ({"embedding_scale": -1.0}, ValueError, "embedding_scale"),
        ({"sample_shape": (3,)}, ValueError, r"sample_shape must be \(2,\)"),
        ({"predicts": "noise"}, ValueError, "predicts"),
    ],
)
def test_wrong_arguments(config: dict[str, Any], kind: type[Exception], named: str) -> None:
    with pytest.raises(kind, match=named):
        MLP(**{"features": 2, **config})


def test_wrong_inputs() -> None:
    net = awake()
    for x in (torch.randn(2, 4), torch.randn(3), torch.randn(2, 3, 1)):
        with pytest.raises(ValueError, match=r"x must be \[B, 3\]"):
            net(x, torch.rand(len(x)))
    with pytest.raises(ValueError, match="label must be"):
        net(torch.randn(2, 3), torch.rand(3))
    with pytest.raises(TypeError, match="MLP takes no conditioning, got goal"):
        net(torch.randn(2, 3), torch.rand(2), goal=torch.rand(2))
