"""EDM's snapshots: the outputs of EDM's own code, no code of the file, and clear errors.

The files in tests/golden/edm were made by EDM's code, see make_edm_golden.py.
"""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import EDMSDE, VESDE, VPSDE, DDPMSchedule
from sbm_fast.adapters import edm
from sbm_fast.adapters._unpickle import Record
from sbm_fast.model import as_score_model
from sbm_fast.nn import ADM, Network, SongUNet

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"
CASES: dict[str, tuple[type, type, str, int]] = {
    "edm_ddpmpp": (SongUNet, EDMSDE, "edm", 1),
    "vp_ddpmpp": (SongUNet, VPSDE, "eps", 1),
    "ve_ncsnpp": (SongUNet, VESDE, "eps", -1),
    "iddpm_adm": (ADM, DDPMSchedule, "eps", 1),
}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edm")
    for name in CASES:
        packed = (GOLDEN / f"{name}.pkl.xz").read_bytes()
        (folder / f"{name}.pkl").write_bytes(lzma.decompress(packed))
    return folder


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What EDM's code computed, and the conditioning that it was given."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    labels = arrays.pop("class_labels", None)
    return arrays, {} if labels is None else {"class_labels": labels}


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-4 relative, to the largest of each sample."""
    scale = theirs.abs().amax((1, 2, 3), keepdim=True)
    assert ((ours - theirs).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_snapshot_becomes_a_checkpoint(snapshots: Path, tmp_path: Path, name: str) -> None:
    """Of this package: safetensors, that hold everything that samples are made with."""
    model = edm.load(snapshots / f"{name}.pkl")
    path = tmp_path / "net.safetensors"
    model.net.save(path)
    back = Network.load(path).eval()
    assert as_score_model(back, None).time == model.time
    assert repr(back.sde) == repr(model.sde) and back.variance == model.variance
    sde = EDMSDE(0.1, 10.0)
    runs = [
        sbm_fast.sample(net, sde, (2, 3, 8, 8), method="edm", steps=3, seed=0)
        for net in (model, back)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_are_the_originals(snapshots: Path, name: str) -> None:
    kind, sde, predicts, sign = CASES[name]
    model = edm.load(snapshots / f"{name}.pkl")
    assert type(model.net) is kind and type(model.sde) is sde and model.predicts == predicts
    assert model.sample_shape == (3, 8, 8) and not model.net.training
    golden, cond = recorded(name)
    x, sigma, label = golden["x"], golden["sigma"], golden["label"]
    run = EDMSDE(1e-4, 1e4)
    at = [model.match(run, float(s)) for s in sigma]

    def scaled(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None, None]

    output = model(scaled([a.c_in for a in at]) * x, label, **cond)
    close(sign * output, golden["F"])
    of_x, of_F = (scaled([getattr(a.denoiser, part) for a in at]) for part in ("x", "F"))
    close(of_x * x + of_F * output[:, :3], golden["denoised"])
    # Theirs are made in float32, and those of VP from ln(1 + σ²) with σ = 0.002.
    np.testing.assert_allclose([a.label for a in at], label, rtol=2e-2, atol=1e-6)
    np.testing.assert_allclose([a.label for a in at][1:], label[1:], rtol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_ready_to_sample(snapshots: Path, name: str) -> None:
    model = edm.load(snapshots / f"{name}.pkl")
    options: dict[str, Any] = dict(method="ddim", steps=3, seed=0)
    x = sbm_fast.sample(model, model.sde, (2, 3, 8, 8), **options)
    assert torch.isfinite(x).all()
    if model.null_cond is not None:
        cond = {"class_labels": torch.tensor([0, 2])}
        sbm_fast.sample(model, model.sde, (2, 3, 8, 8), cond=cond, guidance=2.0, **options)
    else:
        assert name in ("vp_ddpmpp", "ve_ncsnpp")


def test_metadata_and_saving(snapshots: Path, tmp_path: Path) -> None:
    model = edm.load(snapshots / "vp_ddpmpp.pkl")
    assert model.net.metadata == {
        "source": "EDM",
        "preconditioning": "VPPrecond",
        "model": "SongUNet",
        "use_fp16": True,
        "data_range": [-1, 1],
    }
    model.net.save(tmp_path / "net.safetensors")
    back = SongUNet.load(tmp_path / "net.safetensors").eval()
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 800.0])
    assert torch.equal(back(x, label), model.net(x, label))
    assert back.sde == model.sde and back.metadata == model.net.metadata


def test_levels_of_iddpm(snapshots: Path) -> None:
    model = edm.load(snapshots / "iddpm_adm.pkl")
    assert isinstance(model.sde, DDPMSchedule) and model.variance == "learned_range"
    inside = np.arange(model.sde.levels, dtype=np.float64)
    np.testing.assert_array_equal(model.labels(inside, model.sde.nsr(inside)), inside)
    between = (model.sde.nsr(3.0) + model.sde.nsr(4.0)) / 2
    for factor, index in ((0.999, 3), (1.001, 4)):
        t = np.array([model.sde.time_at_nsr(between * factor)])
        assert model.labels(t, between * factor) == [index]


class Live(nn.Module):
    """The denoiser of N(0, ½²) data, called as EDM's networks are."""

    sigma_min, sigma_max, label_dim, img_channels, img_resolution = 0, float("inf"), 3, 3, 8

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1)
        return x * 0.25 / (0.25 + level**2)


def test_live_networks() -> None:
    model = edm.wrap(Live())
    assert model.predicts == "x0" and model.time == "sigma" and model.sde == EDMSDE()
    assert model.sample_shape == (3, 8, 8) and model.null_cond == {"class_labels": None}
    x = sbm_fast.sample(model, model.sde, (64, 3, 8, 8), method="edm", steps=30, seed=0)
    assert abs(x.std() - 0.5) < 0.02
    own = Live()
    own.sigma_min, own.sigma_max, own.label_dim = 0.02, 100, 0
    assert edm.wrap(own).sde == EDMSDE(0.02, 100.0) and edm.wrap(own).null_cond is None
    with pytest.raises(TypeError, match=r"net: expected a network of EDM.*got Linear"):
        edm.wrap(nn.Linear(1, 1))


def altered(data: bytes, old: bytes, new: bytes) -> bytes:
    """A snapshot with a short string or number replaced by one as long."""
    assert len(old) == len(new) and old in data
    return data.replace(old, new)


def test_wrong_files(snapshots: Path, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pkl"
    whole = (snapshots / "edm_ddpmpp.pkl").read_bytes()

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot load .*snapshot\.pkl.*" + message):
            edm.load(path)

    for end in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        refused(whole[:end], "no pickle")
    refused(altered(whole, b"EDMPrecond", b"OldPrecond"), "expected a network of class EDMPrecond")
    refused(altered(whole, b"SongUNet", b"SomeUNet"), "expected a model of SongUNet.*a SomeUNet")
    refused(altered(whole, b"num_blocks", b"num_blacks"), "argument 'num_blacks'")
    refused(altered(whole, b"map_layer1", b"map_layer9"), "map_layer")
    refused(pickle.dumps({"ema": 3}), "got a int")
    refused(pickle.dumps({"net": 3}), "got a NoneType")
    refused(pickle.dumps([1]), "got a list")
    # model_channels 16: K\x10 after its name and a memo.
    at = whole.index(b"model_channels")
    wide = whole[:at] + altered(whole[at : at + 40], b"K\x10", b"K\x20") + whole[at + 40 :]
    refused(wide, "network is not usable")
    steps = {"beta_min": 0.1, "beta_d": 19.9, "M": "many"}
    with pytest.raises(ValueError, match="M: expected a number of steps, at least 2, got a str"):
        edm._vp(steps)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        edm.load(tmp_path / "nothing.pkl")


@pytest.mark.parametrize("argument", ["channel_mult", "dropout", "resample_filter", "encoder_type"])
def test_nested_arguments_are_named_soon(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    """A few bytes of pickle can nest a tuple whose repr has 2^60 brackets."""
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    state = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    inner = Record("SongUNet", state | {"_init_args": (8, 3, 3), "_init_kwargs": {}})
    inner.state["_init_kwargs"] = {argument: nested if argument != "resample_filter" else (nested,)}
    outer = Record("EDMPrecond", state | dict(sigma_min=0, sigma_max=1.0, sigma_data=0.5))
    outer.state["_modules"] = {"model": inner}
    monkeypatch.setattr(edm, "read_pickle", lambda _: {"ema": outer})
    monkeypatch.setattr("sbm_fast.nn.checkpoint.bound", lambda *_: None)
    with pytest.raises(ValueError, match=r"snapshot\.pkl.* got ") as caught:
        edm.load("snapshot.pkl")
    assert len(str(caught.value)) < 500


def test_a_tensor_in_place_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = Record("EDMPrecond", {"_modules": torch.zeros(3)})
    monkeypatch.setattr(edm, "read_pickle", lambda _: {"ema": outer})
    with pytest.raises(ValueError, match=r"snapshot\.pkl.*not usable"):
        edm.load("snapshot.pkl")


def test_modules_that_hold_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(name: str, **state: Any) -> Record:
        return Record(name, {"_parameters": {}, "_buffers": {}, "_modules": {}, **state})

    inner = record("SongUNet", _init_args=(8, 3, 3), _init_kwargs={})
    inner.state["_modules"] = {"enc": inner, "dec": inner}
    outer = record("EDMPrecond", sigma_min=0, sigma_max=1.0, sigma_data=0.5)
    outer.state["_modules"] = {"model": inner}
    monkeypatch.setattr(edm, "read_pickle", lambda _: {"ema": outer})
    with pytest.raises(ValueError, match=r"snapshot\.pkl.*more than 10000 modules"):
        edm.load("snapshot.pkl")
