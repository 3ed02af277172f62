"""NCSNpp, DDPM, SongUNet and ADM: the published code's outputs, and what all networks keep."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network_cases import CASES, SMALL, draw
from torch import nn

from sbm_fast.nn import ADM, DDPM, NCSNpp, Network, SongUNet
from sbm_fast.nn.blocks import ResidualBlock, SelfAttention, capped_norm
from sbm_fast.nn.conv import Conv2d, packed

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "networks.npz")
every_case = pytest.mark.parametrize("name", CASES)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@every_case
def test_the_published_codes_output(name: str) -> None:
    """`tests/golden/make_networks.py` made the file; rounding differs, by 1e-5 at most so far."""
    case = CASES[name]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    want = torch.from_numpy(GOLDEN[name])
    with torch.no_grad():
        assert relative(net(x, labels, **case.cond), want) < 1e-4
        wide = net.double()(x.double(), labels, **case.cond)
    assert relative(wide, want.double()) < 1e-4


def test_the_comparison_can_fail() -> None:
    case = CASES["ddpmpp"]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    net.blocks[2].norm1.eps = 1e-3
    with torch.no_grad():
        assert relative(net(x, labels), torch.from_numpy(GOLDEN["ddpmpp"])) > 1e-4


@every_case
def test_channels_last_between_all_convolutions(name: str) -> None:
    case = CASES[name]
    net = case.network()
    seen = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, Conv2d) and module.in_channels > 3:  # the image itself is the user's
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        net(case.image(), torch.tensor(case.labels), **case.cond)
    assert seen and all(seen)


@every_case
def test_packed_weights_give_the_same(name: str) -> None:
    case = CASES[name]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    with torch.no_grad():
        plain = net(x, labels, **case.cond)
        with packed(net):
            assert relative(net(x, labels, **case.cond), plain) < 1e-5


@every_case
def test_gradients_reach_every_parameter_and_the_input(name: str) -> None:
    case = CASES[name]
    net, x = case.network(), case.image().requires_grad_()
    net(x, torch.tensor(case.labels), **case.cond).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@every_case
def test_forward_mode_is_the_transpose_of_backward_mode(name: str) -> None:
    """wᵀ (J v) by forward mode, of the network and of a time table, and (Jᵀ w)ᵀ v."""
    case = CASES[name]
    net, x, labels = case.network().double(), case.image().double(), torch.tensor(case.labels)
    prepared, row = net.prepare(labels), torch.tensor([0, 1])
    v, w = draw("v", tuple(x.shape)).double(), draw("w", tuple(x.shape)).double()
    y, vjp = torch.func.vjp(lambda x: net(x, labels, **case.cond), x)
    want = (vjp(w)[0] * v).sum()
    for f in (lambda x: net(x, labels, **case.cond), lambda x: prepared(x, row, **case.cond)):
        out, tangent = torch.func.jvp(f, (x,), (v,))
        torch.testing.assert_close(out, y, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close((w * tangent).sum(), want, rtol=1e-7, atol=1e-7)


def test_it_compiles_whole() -> None:
    config = {**SMALL, **CASES["ncsnpp"].config, "channel_mult": (1,)}
    net = NCSNpp(image_size=8, **config).eval()
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0])
    prepared, row = net.prepare(labels), torch.tensor([0, 1])
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    with torch.no_grad():
        nn.init.normal_(net.last.conv.weight)
        for f, at in ((net, labels), (prepared, row)):
            torch.testing.assert_close(torch.compile(f, **options)(x, at), f(x, at))


@pytest.mark.parametrize("name", ["ncsnpp_pyramids", "song_ncsnpp", "adm"])
def test_the_samples_of_a_batch_do_not_mix(name: str) -> None:
    case = CASES[name]
    net, x = case.network().double(), case.image().double()
    labels = torch.tensor(case.labels).double()
    alone = [
        net(x[i : i + 1], labels[i : i + 1], **{k: v[i : i + 1] for k, v in case.cond.items()})
        for i in range(2)
    ]
    torch.testing.assert_close(net(x, labels, **case.cond), torch.cat(alone), rtol=1e-9, atol=1e-9)


@every_case
def test_half_precision_keeps_the_phase_of_the_time(name: str) -> None:
    """bf16 has eight bits: a few percent. Rounded frequencies would give another time."""
    case = CASES[name]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    with torch.no_grad():
        want = net(x, labels, **case.cond)
        part = net.time_part(labels)
        half = net.bfloat16()
        assert (half.time_part(labels).float() - part).abs().max() < 0.1 * part.abs().max()
        out = half(x.bfloat16(), labels, **case.cond)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).std() < 0.2 * want.std()


@pytest.mark.parametrize("cls", [NCSNpp, DDPM, SongUNet, ADM])
def test_a_new_network_returns_zero_and_takes_an_empty_batch(cls: type[Network]) -> None:
    config = {**SMALL, "channels": 8 if cls is NCSNpp else 64}
    net = cls(image_size=8, in_channels=2, **config)
    assert not net(torch.randn(2, 2, 8, 8), torch.rand(2)).any()
    assert net(torch.randn(0, 2, 8, 8), torch.rand(0)).shape == (0, 2, 8, 8)


@pytest.mark.parametrize("progressive", ["none", "output_skip", "residual"])
def test_a_network_of_every_output_pyramid_starts_at_zero(progressive: str) -> None:
    net = NCSNpp(image_size=8, progressive=progressive, **SMALL)
    assert not net(torch.randn(1, 3, 8, 8), torch.rand(1)).any()


def test_class_labels_as_numbers_vectors_or_none() -> None:
    case = CASES["adm"]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    numbers = torch.tensor([1, 3])
    vectors = nn.functional.one_hot(numbers, 5).float()
    with torch.no_grad():
        assert torch.equal(
            net(x, labels, class_labels=numbers), net(x, labels, class_labels=vectors)
        )
        assert torch.equal(net(x, labels), net(x, labels, class_labels=torch.zeros(2, 5)))
        assert not torch.equal(net(x, labels), net(x, labels, class_labels=numbers))


def test_networks_with_classes_know_what_stands_for_none() -> None:
    for cls in (SongUNet, ADM):
        small: dict[str, Any] = {"channels": 64, "channel_mult": (1,), "num_blocks": 1}
        assert cls(**small).null_cond is None
        assert cls(label_dim=3, **small).null_cond == {"class_labels": None}
        own = {"class_labels": 2}
        assert cls(label_dim=3, null_cond=own, **small).null_cond == own


def test_time_in_float64() -> None:
    """Labels that float32 can't tell apart, in every embedding."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 8, "channels": 8, "channel_mult": (1,)}
    options |= {"num_blocks": 1, "attention_resolutions": ()}
    nets = (NCSNpp(**options), NCSNpp(embedding="fourier", **options))
    for net in (*nets, SongUNet(embedding="fourier", **options)):
        label = torch.tensor([0.5], dtype=torch.float64)
        a, b = (net.double().time_part(label + d) for d in (0.0, 1e-9))
        assert 0 < (a - b).abs().max() < 1e-6
        assert a.dtype == torch.float64


@every_case
def test_networks_made_on_the_meta_device(name: str) -> None:
    """What is no part of the weights is there again after `to_empty`."""
    case = CASES[name]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    with torch.device("meta"):
        late = type(net)(**net.config, predicts=net.predicts, time=net.time)
    late.to_empty(device="cpu").load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(late.eval()(x, labels), net.eval()(x, labels))


def test_replicas_use_their_own_blocks() -> None:
    """As `nn.DataParallel` makes them: copies of every module's dict, with other weights."""

    def replica(module: nn.Module) -> Any:
        made: Any = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else replica(child)
        for name, weight in module._parameters.items():
            setattr(made, name, None if weight is None else weight.detach() * 2)
        return made

    case = CASES["ddpmpp"]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    with torch.no_grad():
        net(x, labels)
        own = replica(net)(x, labels)
        for parameter in net.parameters():
            parameter.mul_(2)
        assert torch.equal(own, net(x, labels))


@every_case
def test_pickles_give_the_same(name: str) -> None:
    case = CASES[name]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(net))(x, labels), net(x, labels))


def test_label_dropout_in_training_only() -> None:
    config = {**CASES["song_ddpmpp"].config, "label_dropout": 0.5, "dropout": 0.0}
    case = CASES["song_ddpmpp"]
    net = SongUNet(image_size=16, **config)
    net.load_state_dict(case.network().state_dict())
    x, label, one = case.image()[:1].expand(64, -1, -1, -1), torch.ones(64), torch.ones(64).long()
    with torch.no_grad():
        out = net(x, label, class_labels=one)
        with_label = net.eval()(x[:1], label[:1], class_labels=one[:1])
        without = net(x[:1], label[:1])
    dropped = (out - without).flatten(1).norm(dim=1) < (out - with_label).flatten(1).norm(dim=1)
    assert 16 <= int(dropped.sum()) <= 48  # of 64, p = 1/2: four standard deviations


def test_a_block_put_in_later_gets_its_own_time() -> None:
    net, other = CASES["ddpmpp"].network(), CASES["ddpmpp"].network()
    x, label = CASES["ddpmpp"].image(), torch.tensor([3.0, 500.0])
    for parameter in other.middle[0].parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(net.state_dict() | {
        f"middle.0.{name}": value for name, value in other.middle[0].state_dict().items()
    })  # fmt: skip
    with torch.no_grad():
        net(x, label)
        net.middle[0] = other.middle[0]
        assert torch.equal(net(x, label), other(x, label))


def test_the_skip_of_a_block() -> None:
    """1x1, 3x3 or none, and at first nothing else."""
    norm = partial(capped_norm, eps=1e-6)
    x = torch.randn(1, 8, 4, 4)
    for options, kernel in (({}, (1, 1)), ({"skip": "3x3"}, (3, 3))):
        block = ResidualBlock(8, 16, None, norm=norm, gain=0.5, **options)
        assert block.skip.weight.shape[2:] == kernel
        torch.testing.assert_close(block(x, None), 0.5 * block.skip(x))
    same = ResidualBlock(8, 8, None, norm=norm, resampling="down")
    torch.testing.assert_close(same(x, None), nn.functional.avg_pool2d(x, 2))
    assert isinstance(
        ResidualBlock(8, 8, None, norm=norm, resampling="up", skip="project").skip, Conv2d
    )


def test_attention_is_softmax_of_products() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, norm=partial(capped_norm, eps=1e-6), gain=0.7)
    nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 12, 3, 5)
    n = attention.norm(x)
    q, k, v = attention.qkv(n).reshape(2, 3, 3, 4, 15).unbind(1)  # [B, heads, channels, positions]
    weights = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / 2, dim=-1)
    h = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 12, 3, 5)
    torch.testing.assert_close(attention(x), 0.7 * (x + attention.out(h)))


WRONG: list[tuple[type[Network], dict[str, Any], type[Exception], str]] = [
    (NCSNpp, {"channels": 0}, ValueError, "channels"),
    (NCSNpp, {"channel_mult": ()}, TypeError, "channel_mult"),
    (NCSNpp, {"nonlinearity": "elu"}, ValueError, "nonlinearity must be one of swish, got 'elu'"),
    (NCSNpp, {"resblock": "resnet"}, ValueError, "resblock"),
    (NCSNpp, {"progressive": "skip"}, ValueError, "progressive"),
    (NCSNpp, {"progressive_input": "output_skip"}, ValueError, "progressive_input"),
    (NCSNpp, {"progressive_combine": "mean"}, ValueError, "progressive_combine"),
    (NCSNpp, {"fir_kernel": (1,)}, TypeError, "fir_kernel"),
    (NCSNpp, {"fir_kernel": (1, -1)}, ValueError, "fir_kernel"),
    (NCSNpp, {"fir_kernel": (1, "3")}, TypeError, "fir_kernel"),
    (NCSNpp, {"attention_resolutions": 16}, TypeError, "attention_resolutions"),
    (NCSNpp, {"embedding": "fourier", "ascending_labels": True}, ValueError, "ascending_labels"),
    (NCSNpp, {"sigma_max": 0.0}, ValueError, "sigma_max"),
    (NCSNpp, {"num_scales": 0}, ValueError, "num_scales"),
    (NCSNpp, {"dropout": 1}, ValueError, "dropout"),
    (NCSNpp, {"sde": None, "predicts": "epsilon"}, ValueError, "predicts"),
    (NCSNpp, {"null_cond": 3}, TypeError, "null_cond"),
    (NCSNpp, {"variance": "learned"}, ValueError, "variance"),
    (NCSNpp, {"sample_shape": (1, 32, 32)}, ValueError, "sample_shape"),
    (DDPM, {"channels": 16}, ValueError, "channels"),
    (SongUNet, {"label_dim": -1}, ValueError, "label_dim"),
    (SongUNet, {"augment_dim": True}, TypeError, "augment_dim"),
    (SongUNet, {"encoder": "residual_skip"}, ValueError, "encoder"),
    (SongUNet, {"decoder": "residual"}, ValueError, "decoder"),
    (ADM, {"channels_per_head": 0}, ValueError, "channels_per_head"),
    (ADM, {"channels": 16}, ValueError, "^channels .* one head of channels_per_head"),
    (ADM, {"channel_mult": (1,)}, ValueError, "^channels .* one head of .* 64 .*, got 32$"),
    (
        *(ADM, {"channels": 160, "channel_mult": (1,), "channels_per_head": 48}, ValueError),
        "^channels .* 3 heads of channels_per_head 48 .*, got 160$",
    ),
]


@pytest.mark.parametrize(("cls", "config", "error", "named"), WRONG)
def test_a_wrong_argument_is_named(
    cls: type[Network], config: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        cls(**{**SMALL, "channels": 32, **config})


@pytest.mark.parametrize(
    ("cond", "error", "named"),
    [
        ({"class_labels": torch.zeros(2, 4)}, ValueError, r"class_labels must be \[2, 5\]"),
        ({"class_labels": torch.zeros(3).long()}, ValueError, r"class_labels must be \[2, 5\]"),
        ({"augment_labels": torch.zeros(2, 5)}, ValueError, r"augment_labels must be \[2, 9\]"),
        ({"class_labels": torch.tensor([0, 5])}, ValueError, r"class_labels must lie in 0\.\.4"),
        ({"class_labels": torch.tensor([-1, 0])}, ValueError, r"class_labels must lie in 0\.\.4"),
        ({"class_labels": [0, 1]}, TypeError, "class_labels must be a tensor, got list"),
        ({"augment_labels": 1}, TypeError, "augment_labels must be a tensor, got int"),
        ({"text": torch.zeros(2)}, TypeError, "text"),
    ],
)
def test_a_wrong_conditioning_is_named(
    cond: dict[str, Any], error: type[Exception], named: str
) -> None:
    case = CASES["song_ddpmpp"]
    with pytest.raises(error, match=named):
        case.network()(case.image(), torch.tensor(case.labels), **cond)


def test_conditioning_that_a_network_was_not_built_for() -> None:
    case = CASES["song_ncsnpp"]
    net, x, labels = case.network(), case.image(), torch.tensor(case.labels)
    with pytest.raises(ValueError, match=r"class_labels.*label_dim=0"):
        net(x, labels, class_labels=torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"augment_labels.*augment_dim=0"):
        net(x, labels, augment_labels=torch.zeros(2, 9))
    with pytest.raises(TypeError, match="takes no conditioning, got class_labels"):
        CASES["ddpmpp"].network()(x, labels, class_labels=torch.zeros(2).long())
    timeless = NCSNpp(**SMALL, conditional=False)
    with pytest.raises(TypeError, match="takes no conditioning, got class_labels"):
        timeless(torch.zeros(2, 3, 8, 8), labels, class_labels=torch.zeros(2).long())
    with pytest.raises(TypeError, match="takes no conditioning, got text"):
        timeless.prepare(labels)(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), text=labels)


def test_labels_of_a_ladder_count_from_either_end() -> None:
    """score_sde counts from the largest σ down, `NCSNLadder` from the smallest up."""
    case = CASES["ddpm"]
    down, x = case.network(), case.image()
    up = DDPM(**{**case.config, "image_size": 8, "ascending_labels": True}).eval()
    up.load_state_dict(down.state_dict())
    with torch.no_grad():
        same = up(x, torch.tensor([997.0, 38.0])), down(x, torch.tensor([2.0, 961.0]))
    torch.testing.assert_close(*same)
    scale = up.output_scale(torch.tensor([0.0, 999.0]))
    torch.testing.assert_close(scale, torch.tensor([0.01, 50.0]))
