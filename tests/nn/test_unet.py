"""The U-Net: shapes, what it starts as, what it carries, named errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sbm_fast.nn import UNet

SMALL: dict[str, Any] = {"channels": 8, "channel_mult": (1, 2)}


def awake(net: UNet) -> UNet:
    """Give the zero-initialised layers random weights, so that every path shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (3, 1, 8, 8)),
        ({"channels": 6, "channel_mult": (1,)}, (1, 1, 5, 7)),
        ({**SMALL, "in_channels": 3}, (2, 3, 6, 10)),
        ({**SMALL, "in_channels": 2, "out_channels": 5}, (5, 2, 4, 2)),
        ({"channels": 4, "channel_mult": (1, 2, 3)}, (7, 1, 8, 12)),
        ({**SMALL, "blocks_per_level": 3, "middle_blocks": 2}, (2, 1, 4, 4)),
        ({**SMALL, "attention_levels": (0, 1), "heads": 2, "middle_blocks": 2}, (3, 1, 8, 8)),
        ({**SMALL, "embedding": "fourier", "embedding_scale": 16.0}, (3, 1, 8, 8)),
        ({**SMALL, "film": True, "resample_conv": False, "embedding_width": 12}, (3, 1, 8, 8)),
        ({"channels": 5, "channel_mult": (1, 3), "group_size": 2}, (3, 1, 8, 8)),
    ],
)
def test_shapes(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = awake(UNet(**config))
    out = net(torch.randn(shape), torch.rand(shape[0]))
    assert out.shape == (shape[0], config.get("out_channels", shape[1]), *shape[2:])
    assert out.isfinite().all() and out.std() > 0


def test_a_new_network_returns_zero() -> None:
    net = UNet(**SMALL)
    assert not net(torch.randn(2, 1, 8, 8), torch.rand(2)).any()


def test_empty_batch() -> None:
    assert UNet(**SMALL)(torch.randn(0, 1, 8, 8), torch.rand(0)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_gradients_reach_every_parameter_and_the_input(film: bool, embedding: str) -> None:
    net = awake(UNet(**SMALL, film=film, embedding=embedding, attention_levels=(1,)))
    x = torch.randn(3, 1, 8, 8, requires_grad=True)
    net(x, torch.rand(3)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    # What stands before a GroupNorm with one channel a group may cancel; weights may not.
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_the_samples_of_a_batch_do_not_mix() -> None:
    net = awake(UNet(**SMALL, attention_levels=(1,))).double()
    x, label = torch.randn(5, 1, 8, 8).double(), torch.rand(5).double()
    alone = torch.cat([net(x[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(net(x, label), alone, rtol=1e-10, atol=1e-12)


def test_the_memory_format_of_the_input_does_not_matter() -> None:
    net = awake(UNet(**SMALL, in_channels=3)).double()
    x, label = torch.randn(2, 3, 8, 8).double(), torch.rand(2)
    nhwc = net(x.to(memory_format=torch.channels_last), label)
    torch.testing.assert_close(nhwc, net(x, label), rtol=1e-10, atol=1e-12)


def test_every_label_of_every_time_is_told_apart() -> None:
    for embedding, labels in (("fourier", (-1.7, -1.6)), ("positional", (998.0, 999.0))):
        net = awake(UNet(**SMALL, embedding=embedding))
        a, b = net(torch.ones(2, 1, 8, 8), torch.tensor(labels))
        assert (a - b).abs().max() > 1e-4


def test_dropout_only_in_training() -> None:
    net = awake(UNet(**SMALL, dropout=0.5))
    x, label = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(net(x, label), net(x, label))
    net.eval()
    assert torch.equal(net(x, label), net(x, label))


def test_half_precision() -> None:
    net = awake(UNet(**SMALL, embedding="fourier")).bfloat16()
    out = net(torch.randn(2, 1, 8, 8).bfloat16(), torch.rand(2))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_it_carries_what_a_score_model_needs() -> None:
    from sbm_fast.sde import VPSDE

    net = UNet(predicts="edm", time="edm", sde=VPSDE(), sample_shape=[1, 8, 8], sigma_data=0.75)
    assert (net.predicts, net.time, net.sigma_data) == ("edm", "edm", 0.75)
    assert net.sde == VPSDE() and net.sample_shape == (1, 8, 8)


def test_number_of_parameters() -> None:
    net = UNet(**SMALL)
    assert net.num_parameters() == sum(p.numel() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        ({"channels": 0}, ValueError, "channels"),
        ({"channels": 2.0}, TypeError, "channels"),
        ({"channels": True}, TypeError, "channels"),
        ({"in_channels": 0}, ValueError, "in_channels"),
        ({"out_channels": 0}, ValueError, "out_channels"),
        ({"channel_mult": ()}, TypeError, "channel_mult"),
        ({"channel_mult": (1, -2)}, ValueError, "channel_mult"),
        ({"channel_mult": 2}, TypeError, "channel_mult"),
        ({"blocks_per_level": 0}, ValueError, "blocks_per_level"),
        ({"middle_blocks": 0}, ValueError, "middle_blocks"),
        ({"attention_levels": (2,)}, ValueError, "attention_levels"),
        ({"attention_levels": 1}, TypeError, "attention_levels"),
        ({"attention_levels": (0,), "heads": 3}, ValueError, "heads"),
        ({"embedding": "rotary"}, ValueError, "embedding"),
        ({"embedding_scale": 0.0}, ValueError, "embedding_scale"),
        ({"embedding_width": 0}, ValueError, "embedding_width"),
        ({"film": 1}, TypeError, "film"),
        ({"resample_conv": "no"}, TypeError, "resample_conv"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"predicts": "epsilon"}, ValueError, "predicts"),
        ({"time": "seconds"}, ValueError, "time"),
        ({"sample_shape": (3, 8, 8)}, ValueError, "sample_shape"),
        ({"sample_shape": 8}, TypeError, "sample_shape"),
        ({"sigma_data": float("nan")}, ValueError, "sigma_data"),
    ],
)
def test_a_wrong_argument_is_named(
    config: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        UNet(**config)


@pytest.mark.parametrize(
    ("x", "label", "named"),
    [
        ((2, 1, 7, 8), (2,), "divisible by 2"),
        ((2, 3, 8, 8), (2,), r"\[B, 1, H, W\]"),
        ((1, 8, 8), (1,), r"\[1, 8, 8\]"),
        ((2, 1, 8, 8), (), "label"),
        ((2, 1, 8, 8), (3,), "label"),
    ],
)
def test_a_wrong_input_is_named(x: tuple[int, ...], label: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        UNet(**SMALL)(torch.randn(x), torch.rand(label))
