"""The sampler gives networks that can be prepared their time by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sbm_fast
from sbm_fast.nn import SongUNet, UNet
from sbm_fast.nn.network import CHUNK, can_be_prepared


def small(**options: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(1, channels=8, sample_shape=(1, 8, 8), sde=sbm_fast.VPSDE(), **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def calls(net: torch.nn.Module) -> list[str]:
    """Which of `forward` and `body` ran, as they are called from now on."""
    seen: list[str] = []
    cls = type(net)

    class Watched(cls):  # type: ignore[misc, valid-type]
        def body(self, *args: Any) -> Tensor:
            seen.append("body")
            return super().body(*args)

        def time_part(self, label: Tensor) -> Tensor:
            seen.append(f"time of {len(label)}")
            return super().time_part(label)

    net.__class__ = Watched
    return seen


def test_the_sampler_makes_the_time_once() -> None:
    net = small()
    seen = calls(net)
    _, info = sbm_fast.sample(net, sbm_fast.VPSDE(), num_samples=2, steps=40, return_info=True)
    assert seen.count("body") == info.nfe == 80
    assert seen.count(f"time of {CHUNK}") == len(seen) - 80 <= 1 + 80 // CHUNK + 1


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("method", ["pc", "ddim", "edm"])
def test_samples_are_those_of_the_loop(method: str, film: bool) -> None:
    net = small(film=film)
    arguments: dict[str, Any] = {"num_samples": 2, "method": method, "steps": 20, "seed": 3}
    own = sbm_fast.sample(net, sbm_fast.VPSDE(), **arguments)
    net.register_forward_hook(lambda *_: None)  # what a table would pass by
    looped = sbm_fast.sample(net, sbm_fast.VPSDE(), **arguments)
    torch.testing.assert_close(own, looped, rtol=1e-4, atol=1e-4)


def test_pieces_of_a_run_agree_to_the_bit() -> None:
    sampler = sbm_fast.Sampler(small(), sbm_fast.VPSDE(), (2, 1, 8, 8), method="pc", steps=50)
    run = sampler.start(seed=1)
    for rows in (1, 2, 30, 33):
        run.advance(rows)
        run = sampler.resume(run.state())
    assert torch.equal(run.advance().result(), sampler(seed=1))


def test_new_weights_are_seen_by_the_next_advance() -> None:
    net = small()
    sampler = sbm_fast.Sampler(net, sbm_fast.VPSDE(), (2, 1, 8, 8), method="ddim", steps=5)
    sampler(seed=1)
    for parameter in net.parameters():
        parameter.data.mul_(1.1)  # unseen by version counters
    fresh = sbm_fast.Sampler(net, sbm_fast.VPSDE(), (2, 1, 8, 8), method="ddim", steps=5)
    assert torch.equal(sampler(seed=1), fresh(seed=1))


def test_refresh_keeps_the_memory() -> None:
    net = small()
    table = net.prepare(torch.linspace(1, 999, 5))
    x, row = torch.randn(3, 1, 8, 8), torch.tensor([4, 0, 2])
    places = {name: value.data_ptr() for name, value in table._held.items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
        table.refresh()
        other = net.prepare(torch.linspace(1, 999, 5))
        assert torch.equal(table(x, row), other(x, row))
    assert {name: value.data_ptr() for name, value in table._held.items()} == places


def test_classes_end_the_table() -> None:
    """The label embedding joins before a nonlinearity."""
    torch.manual_seed(0)
    net = SongUNet(image_size=8, in_channels=1, channels=16, channel_mult=(1, 2), num_blocks=1,
                   attention_resolutions=(), label_dim=3).eval()  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, labels = torch.randn(4, 1, 8, 8), torch.linspace(-1, 1, 7)
    row, classes = torch.tensor([0, 6, 3, 3]), torch.eye(3)[[0, 1, 2, 0]]
    with torch.no_grad():
        own = net.prepare(labels)(x, row, class_labels=classes)
        torch.testing.assert_close(own, net(x, labels[row], class_labels=classes))


@pytest.mark.parametrize("reason", ["hook", "forward", "subclass", "projection", "compiled"])
def test_what_a_table_would_pass_by_is_called(reason: str) -> None:
    net = small()
    if reason == "hook":
        net.register_forward_pre_hook(lambda *_: None)
    elif reason == "forward":
        net.forward = net.forward  # type: ignore[method-assign]
    elif reason == "subclass":

        class Own(UNet):
            def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
                return super().forward(x, label, **cond)

        net.__class__ = Own
    elif reason == "compiled":
        net.compile(backend="eager")
    else:
        net.projections()[0].register_forward_hook(lambda *_: None)
    assert not can_be_prepared(net)
    assert not can_be_prepared(lambda x, t: x)
