"""Checkpoints and published weights of every class of network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from network_cases import CASES, tensor

from sbm_fast.nn import NCSNpp, Network, SongUNet, UNet, checkpoint, read_metadata
from sbm_fast.nn.peer_weights import PeerTensor, from_peer

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_round_trip(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    net = case.network()
    net.save(tmp_path / "net", metadata={"data_range": [0, 1]})
    for back in (Network.load(tmp_path / "net"), case.cls.load(tmp_path / "net")):
        assert type(back) is case.cls and back.config == net.config
        assert back.metadata == {"data_range": [0, 1]}
        ours, theirs = net.state_dict(), back.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_frequencies_are_stored_exactly(tmp_path: Path) -> None:
    net = CASES["ncsnpp"].network()
    net.save(tmp_path / "net", dtype=torch.float16)
    back = NCSNpp.load(tmp_path / "net", dtype=None)
    assert back.first.weight.dtype == torch.float16
    exact = net.embed.features.frequencies
    assert torch.equal(back.embed.features.frequencies, exact)
    assert torch.equal(net.half().embed.features.frequencies, exact)


def test_what_guidance_and_learned_variance_need_comes_back(tmp_path: Path) -> None:
    config = {**CASES["adm"].config, "out_channels": 6, "variance": "learned_range"}
    net = CASES["adm"].cls(image_size=8, null_cond={"class_labels": None}, **config)
    net.save(tmp_path / "net")
    back = Network.load(tmp_path / "net")
    assert back.null_cond == {"class_labels": None} and back.variance == "learned_range"


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    net = CASES["song_ncsnpp"].network()
    net.null_cond = {"class_labels": torch.zeros(1)}
    with pytest.raises(TypeError, match="null_cond or metadata"):
        net.save(tmp_path / "net")

    class Homemade(SongUNet):
        pass

    with pytest.raises(TypeError, match="got Homemade"):
        Homemade(channels=8, channel_mult=(1,), num_blocks=1).save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_another_class_is_refused(tmp_path: Path) -> None:
    CASES["ddpmpp"].network().save(tmp_path / "net")
    for cls in (UNet, SongUNet):
        with pytest.raises(ValueError, match=f"it holds a 'NCSNpp', not a '{cls.__name__}'"):
            cls.load(tmp_path / "net")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("ncsnpp", {"channels": 10**12}, "largest tensor"),
        ("ncsnpp", {"channels": -(10**12)}, "channels"),
        ("ncsnpp", {"num_blocks": 10**9}, "blocks"),
        ("ncsnpp", {"channel_mult": [1] * 10**5}, "blocks"),
        ("ncsnpp", {"channel_mult": [1, 10**9]}, "largest tensor"),
        ("ncsnpp", {"in_channels": 10**9}, "largest tensor"),
        ("ncsnpp", {"num_blocks": 40}, "weights or more"),
        ("song_ddpmpp", {"num_blocks": 40}, "weights or more"),
        ("adm", {"num_blocks": 40}, "weights or more"),
        ("adm", {"label_dim": 10**4}, "largest tensor"),
        ("ncsnpp", {"fir_kernel": [1.0] * 10**5}, "fir_kernel"),
        ("ncsnpp", {"progressive_input": "none"}, "not part of it"),
        ("ncsnpp", {"nonlinearity": "elu"}, "nonlinearity"),
        ("song_ddpmpp", {"label_dim": 10**12}, "largest tensor"),
        ("song_ddpmpp", {"augment_dim": 10**12}, "largest tensor"),
        ("song_ddpmpp", {"channel_mult_emb": 10**9}, "largest tensor"),
        ("song_ncsnpp", {"channel_mult_noise": 10**9}, "largest tensor"),
        ("adm", {"channel_mult_emb": 10**9}, "largest tensor"),
        ("adm", {"channels_per_head": 10**9}, "channels_per_head"),
    ],
)
def test_a_header_that_asks_for_too_much(
    name: str, change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    CASES[name].network().save(path)
    header = read_metadata(path)
    header["config"] |= change
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, {"sbm_fast": json.dumps(header)})
    with pytest.raises(ValueError, match=rf"net\.safetensors.*{problem}"):
        Network.load(path)


def test_many_empty_tensors_do_not_pay_for_large_ones(tmp_path: Path) -> None:
    """A file of kilobytes would ask for gigabytes."""
    path = tmp_path / "net.safetensors"
    UNet(1, channels=16, channel_mult=(1,)).save(path)
    header = read_metadata(path)
    header["config"]["blocks_per_level"] = 300
    weights = safetensors.torch.load_file(path) | {f"{i}": torch.zeros(0) for i in range(400)}
    safetensors.torch.save_file(weights, path, {"sbm_fast": json.dumps(header)})
    with pytest.raises(ValueError, match=r"net\.safetensors.*weights or more"):
        Network.load(path)


def test_one_memory_counts_once() -> None:
    config = {**UNet(1, channels=16, channel_mult=(1,)).config, "blocks_per_level": 300}
    one = torch.zeros(9 * 16**2 * 4)
    with pytest.raises(ValueError, match="weights or more, but the file holds 9216 numbers"):
        checkpoint.bound(UNet, config, {f"{i}": one for i in range(400)})


@every_case
def test_published_tensors_fill_every_weight_once(name: str) -> None:
    net = CASES[name].network()
    filled = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    peers = [peer for peer in net.peer_tensors() if peer.target is not None]
    for peer in peers:
        part = filled[peer.target] if peer.rows is None else filled[peer.target][slice(*peer.rows)]
        part += 1
        assert part.numel() == torch.Size(peer.shape).numel()
    assert all(bool((value == 1).all()) for value in filled.values())
    names = [peer.name for peer in net.peer_tensors()]
    assert len(set(names)) == len(names)


def test_score_sdes_names_and_order() -> None:
    """The head of a state_dict of its NCSNpp; the EMA list has the trainable ones only."""
    peers = CASES["ncsnpp"].network().peer_tensors()
    assert [peer.name for peer in peers][:9] == [
        "all_modules.0.W",
        "all_modules.1.weight",
        "all_modules.1.bias",
        "all_modules.2.weight",
        "all_modules.2.bias",
        "all_modules.3.weight",
        "all_modules.3.bias",
        "all_modules.4.GroupNorm_0.weight",
        "all_modules.4.GroupNorm_0.bias",
    ]
    assert [peer.name for peer in peers if not peer.trainable] == ["all_modules.0.W"]


def test_layouts() -> None:
    product = PeerTensor("NIN_0.W", (2, 3), "w", layout="product")
    assert torch.equal(
        product.ours(torch.arange(6).reshape(2, 3)), torch.tensor([[0, 3], [1, 4], [2, 5]])
    )
    heads = PeerTensor("qkv.bias", (12,), "b", layout="heads", heads=2)
    # There: (head, channel, q k v); here: (q k v, head, channel).
    want = torch.tensor([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])
    assert torch.equal(heads.ours(torch.arange(12)), want)


def test_missing_and_misshapen_tensors_are_named() -> None:
    net = CASES["song_ncsnpp"].network()
    good = {peer.name: tensor(peer.name, peer.shape) for peer in net.peer_tensors()}
    name = "enc.16x16_block0.conv0.weight"
    with pytest.raises(ValueError, match=rf"'{name}' is missing"):
        from_peer(net, {key: value for key, value in good.items() if key != name})
    with pytest.raises(ValueError, match=rf"'{name}' should be \[8, 8, 3, 3\], is \[8, 8\]"):
        from_peer(net, good | {name: good[name][:, :, 0, 0]})
    with pytest.raises(NotImplementedError, match="UNet"):
        UNet().peer_tensors()
