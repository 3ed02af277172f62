"""Checkpoints: exact round trips, and clear errors for files that are not what they seem."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sbm_fast.nn import UNet, read_metadata
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule, NCSNLadder, SubVPSDE

CONFIG: dict[str, Any] = {
    "channels": 4,
    "channel_mult": (1, 2),
    "attention_levels": (1,),
    "embedding": "fourier",
    "film": True,
    "predicts": "v",
    "time": "log_sigma",
    "sample_shape": (1, 8, 8),
    "sigma_data": 0.7,
}


@pytest.fixture
def net() -> UNet:
    torch.manual_seed(0)
    net = UNet(**CONFIG, sde=VPSDE(0.2, 15.0))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    return net


@pytest.fixture
def path(net: UNet, tmp_path: Path) -> Path:
    net.save(tmp_path / "net.safetensors", metadata={"steps": 3})
    return tmp_path / "net.safetensors"


def rewrite(path: Path, change: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    """Change entries of the JSON header, keep the weights."""
    header = {k: v for k, v in (read_metadata(path) | change).items() if k not in drop}
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, {"sbm_fast": json.dumps(header)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(net: UNet, tmp_path: Path, dtype: torch.dtype) -> None:
    net = net.to(dtype)
    net.save(tmp_path / "net.safetensors", metadata={"loss": 0.1})
    back = UNet.load(tmp_path / "net.safetensors", dtype=None)
    assert back.config == net.config and back.metadata == {"loss": 0.1}
    for name in ("predicts", "time", "sde", "sample_shape", "sigma_data"):
        assert getattr(back, name) == getattr(net, name), name
    ours, theirs = net.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        # An embedding's frequencies are not rounded to half precision, see `Embedding`.
        wide = torch.promote_types(dtype, torch.float32) if "frequencies" in key else dtype
        assert theirs[key].dtype == wide and torch.equal(ours[key], theirs[key]), key
    if dtype != torch.float16:
        x, label = torch.randn(2, 1, 8, 8, dtype=dtype), torch.rand(2)
        assert torch.equal(net(x, label), back(x, label))


def test_equal_weights_give_equal_bytes(net: UNet, path: Path) -> None:
    first = path.read_bytes()
    back = UNet.load(path)
    back.save(path)
    assert path.read_bytes() == first


def test_stored_type_and_loaded_type(net: UNet, path: Path) -> None:
    net.save(path, dtype=torch.float16)
    back = UNet.load(path)
    for key, value in net.state_dict().items():
        rounded = value if "frequencies" in key else value.half().float()
        assert torch.equal(back.state_dict()[key], rounded)
    assert UNet.load(path, dtype=torch.float64).last.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "sde",
    [
        None,
        VESDE(0.02, 40.0),
        VPSDE(0.2, 18.0),
        SubVPSDE(0.2, 18.0),
        EDMSDE(0.003, 70.0),
        NCSNLadder.geometric(10.0, 0.01, 7),
        DDPMSchedule.linear(20),
    ],
    ids=str,
)
def test_every_sde_comes_back(sde: SDE | None, tmp_path: Path) -> None:
    UNet(channels=4, channel_mult=(1,), sde=sde).save(tmp_path / "net")
    assert UNet.load(tmp_path / "net").sde == sde


def test_loading_leaves_the_random_state_alone(path: Path) -> None:
    before = torch.random.get_rng_state()
    UNet.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_interrupted_save_keeps_the_old_file(
    net: UNet, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        net.save(path)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_what_json_cannot_hold_is_refused(net: UNet, path: Path) -> None:
    class Homemade:
        pass

    net.sde = Homemade()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Homemade"):
        net.save(path)
    net.sde, net.time = None, lambda t: t
    with pytest.raises(TypeError, match="callable"):
        net.save(path)
    net.time = "t"
    with pytest.raises(ValueError, match="dtype"):
        net.save(path, dtype=torch.int8)


@pytest.mark.parametrize(
    ("time", "named"),
    [
        ({"class": "exec", "code": "1"}, "time must name one of HalfLog"),
        ({"class": "Steps", "steps": "many"}, "M: expected a number of steps"),
        ({"class": "Steps"}, "Steps takes steps"),
        ({"class": "HalfLog", "sde": None}, "sde: expected an SDE"),
        ({"class": "NearestLevel", "sde": {"class": "VPSDE", "beta_min": 0.1, "beta_max": 20.0}},
         "expected a DDPMSchedule"),
        (["t"], "time must be one of"),
    ],
)  # fmt: skip
def test_a_time_that_is_none_is_named(path: Path, time: Any, named: str) -> None:
    rewrite(path, {"time": time})
    with pytest.raises(ValueError, match=f"cannot load .*{named}"):
        UNet.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        UNet.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="not a file"):
        UNet.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 3000, -1])
def test_truncated_file(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net\.safetensors.*cut off"):
        UNet.load(path)


class Bomb:
    """Unpickling it would raise SystemExit."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "huge header"])
def test_files_of_another_kind_execute_nothing(path: Path, kind: str) -> None:
    if kind == "torch":
        torch.save({"model": Bomb()}, path)
    else:
        content = {
            "pickle": pickle.dumps(Bomb()),
            "text": b"not a checkpoint\n" * 100,
            "huge header": (2**62).to_bytes(8, "little") + b"{}",
        }
        path.write_bytes(content[kind])
    with pytest.raises(ValueError, match=r"net\.safetensors.*no safetensors file"):
        UNet.load(path)


def test_safetensors_of_another_program(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"net\.safetensors.*another program"):
        UNet.load(path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "null", '{"version": 99}'])
def test_bad_json(path: Path, text: str) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, {"sbm_fast": text})
    with pytest.raises(ValueError, match=r"net\.safetensors.*(JSON|version)"):
        UNet.load(path)


def with_config(**change: Any) -> dict[str, Any]:
    config = UNet(**CONFIG).config | change
    return {"config": config}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"class": "MLP"}, "MLP"),
        ({"class": ["UNet"]}, "it holds a"),
        ({"config": None}, "config"),
        (with_config(surprise=1), "surprise"),
        ({"config": {}}, "lacks"),
        ({"predicts": "numbers"}, "predicts"),
        ({"time": 3}, "time"),
        ({"sample_shape": "big"}, "sample_shape"),
        ({"sigma_data": "wide"}, "sigma_data"),
        ({"sde": {"class": "os.system"}}, "sde"),
        ({"sde": {"class": "VPSDE", "beta": 1.0}}, "VPSDE takes"),
        ({"sde": {"class": "VPSDE", "beta_min": "x", "beta_max": 2.0}}, "configuration"),
        (with_config(channels=8), "largest tensor"),
        (with_config(channels=3), r"should be \["),
        (with_config(channel_mult=[1, 2, 2]), "missing"),
        (with_config(film=False), r"should be \["),
        (with_config(embedding="positional"), "not part of it"),
        (with_config(embedding=["fourier"]), "embedding"),
        (with_config(channels="many"), "channels"),
        (with_config(channels=10**12), "largest tensor"),
        (with_config(embedding_width=10**30), "largest tensor"),
        (with_config(in_channels=10**6), "largest tensor"),
        (with_config(out_channels=10**6), "largest tensor"),
        (with_config(channel_mult=[1, 10**9]), "largest tensor"),
        (with_config(blocks_per_level=10**9), "blocks"),
        (with_config(middle_blocks=10**9), "blocks"),
        (with_config(channel_mult=[1] * 10**5), "blocks"),
    ],
)
def test_a_header_that_does_not_fit_is_named(
    path: Path, change: dict[str, Any], problem: str
) -> None:
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"net\.safetensors.*{problem}"):
        UNet.load(path)


@pytest.mark.parametrize("entry", ["predicts", "sde", "sigma_data", "class"])
def test_a_header_that_lacks_something(path: Path, entry: str) -> None:
    rewrite(path, {}, drop=(entry,))
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        UNet.load(path)


def test_weights_of_another_type(path: Path) -> None:
    weights = safetensors.torch.load_file(path)
    weights["last.bias"] = weights["last.bias"].to(torch.int32)
    header = {"sbm_fast": json.dumps(read_metadata(path))}
    safetensors.torch.save_file(weights, path, header)
    with pytest.raises(ValueError, match=r"last\.bias.*floating"):
        UNet.load(path)
