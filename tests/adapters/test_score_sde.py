"""score_sde's checkpoints and modules: its own scores, weights by position, and clear errors.

The files in tests/golden/score_sde were made by score_sde's code, see make_score_sde_golden.py.
"""

from __future__ import annotations

import lzma
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from score_sde_cases import CASES
from torch import Tensor, nn

import sbm_fast
from sbm_fast import VESDE, VPSDE, DDPMSchedule, NCSNLadder, SubVPSDE
from sbm_fast.adapters import score_sde
from sbm_fast.nn import DDPM, NCSNpp, presets
from sbm_fast.sde import SDE

GOLDEN = Path(__file__).parents[1] / "golden" / "score_sde"
SDES: dict[str, SDE] = {
    "ncsnpp_ve": VESDE(0.01, 50.0),
    "ddpmpp_subvp": SubVPSDE(),
    "ddpm_ladder": NCSNLadder.geometric(50.0, 0.01, 1000),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score_sde")
    for name in CASES:
        packed = (GOLDEN / f"{name}.pth.xz").read_bytes()
        (folder / f"{name}.pth").write_bytes(lzma.decompress(packed))
    return folder


def scores(model: sbm_fast.ScoreModel, golden: Any) -> Tensor:
    """Our score at the recorded times, on a ladder at the level that was asked for."""
    sde = model.sde
    assert sde is not None
    times = golden["t"].astype(np.float64)
    if isinstance(sde, (NCSNLadder, DDPMSchedule)):
        times = np.rint(times * sde.t_max)
    found = []
    for t, x in zip(times, torch.from_numpy(golden["x"]), strict=True):
        at = model.match(sde, float(t))
        output = model(at.c_in * x[None], torch.tensor([at.label], dtype=torch.float32))
        found.append(at.score.x * x[None] + at.score.F * output)
    return torch.cat(found)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_scores_are_the_originals(checkpoints: Path, name: str, ema: bool) -> None:
    model = score_sde.load(checkpoints / f"{name}.pth", CASES[name], ema=ema)
    assert type(model.net) is (DDPM if name == "ddpm_ladder" else NCSNpp)
    assert model.sde == SDES[name] and model.sample_shape == (3, 8, 8)
    unit = [-1, 1] if name == "ddpmpp_subvp" else [0, 1]
    known = {"source": "score_sde", "ema": ema, "step": 17, "data_range": unit}
    assert model.net.metadata == known and not model.net.training
    with np.load(GOLDEN / f"{name}.npz") as golden:
        theirs = torch.from_numpy(golden["ema" if ema else "model"])
        error = (scores(model, golden) - theirs).abs().amax((1, 2, 3))
    assert (error / theirs.abs().amax((1, 2, 3))).max() < 1e-4


def test_ready_to_sample(checkpoints: Path) -> None:
    for name, method in (("ncsnpp_ve", "pc"), ("ddpmpp_subvp", "em"), ("ddpm_ladder", "pc")):
        model = score_sde.load(checkpoints / f"{name}.pth", CASES[name])
        x = sbm_fast.sample(model, model.sde, (2, 3, 8, 8), method=method, steps=2, seed=0)
        assert torch.isfinite(x).all()


def test_a_preset_by_name(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["ncsnpp_ve"]
    small = score_sde.load(checkpoints / "ncsnpp_ve.pth", case)
    known = presets._presets()
    cls, arguments = known["ve/cifar10_ncsnpp_continuous"]
    config = {name: small.net.config[name] for name in small.net.config if name != "out_channels"}
    monkeypatch.setitem(known, "small", (cls, {**arguments, **config}))
    named = score_sde.load(checkpoints / "ncsnpp_ve.pth", "small")
    assert named.sde == small.sde and named.time == small.time == "sigma"
    for ours, theirs in zip(named.net.parameters(), small.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_configurations_as_dicts(checkpoints: Path) -> None:
    as_dict = {name: vars(part) for name, part in vars(CASES["ddpm_ladder"]).items()}
    assert score_sde.load(checkpoints / "ddpm_ladder.pth", as_dict).time == "index"


def changed(case: str, part: str, /, **values: Any) -> SimpleNamespace:
    """A case with other entries; None takes one away."""
    config = SimpleNamespace(**vars(CASES[case]))
    setattr(config, part, SimpleNamespace(**(vars(getattr(config, part)) | values)))
    return config


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model", {"num_res_blocks": 2}, r"ddpmpp_subvp\.pth.*does not fit the configuration"),
        ("model", {"nf": 12}, r"ddpmpp_subvp\.pth.*does not fit"),
        ("model", {"resblock_type": "ddpm"}, r"ddpmpp_subvp\.pth.*does not fit"),
        ("model", {"name": "ncsnv2_64"}, "model.name: expected one of ncsnpp, ddpm"),
        ("model", {"nonlinearity": "elu"}, "nonlinearity"),
        ("model", {"normalization": "InstanceNorm"}, "model.normalization: expected 'GroupNorm'"),
        ("model", {"nf": None}, "model.nf is missing"),
        ("training", {"sde": "other"}, "training.sde: expected vpsde, subvpsde or vesde"),
        ("data", {"image_size": None}, "data.image_size is missing"),
    ],
)
def test_wrong_configurations(
    checkpoints: Path, part: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_sde.load(checkpoints / "ddpmpp_subvp.pth", changed("ddpmpp_subvp", part, **values))


def test_wrong_levels(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match=r"ncsnpp_ve\.pth.*expected \[90\.0, 0\.01, 1000\]"):
        score_sde.load(checkpoints / "ncsnpp_ve.pth", changed("ncsnpp_ve", "model", sigma_max=90.0))


def test_wrong_arguments(checkpoints: Path) -> None:
    path = checkpoints / "ncsnpp_ve.pth"
    with pytest.raises(ValueError, match="there is no preset 'cifar'"):
        score_sde.load(path, "cifar")
    with pytest.raises(TypeError, match="preset: expected a name or a configuration"):
        score_sde.load(path, 3)
    with pytest.raises(TypeError, match="ema"):
        score_sde.load(path, CASES["ncsnpp_ve"], ema="model")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        score_sde.load(checkpoints / "nothing.pth", CASES["ncsnpp_ve"])


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("touched-by-a-checkpoint",)


def test_wrong_files(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, case = tmp_path / "checkpoint.pth", CASES["ddpmpp_subvp"]
    whole = (checkpoints / "ddpmpp_subvp.pth").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=r"cannot load .*checkpoint\.pth.*" + message):
            score_sde.load(path, case)

    for size in (0, 3, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("more than weights, or is cut off")
    state = torch.load(checkpoints / "ddpmpp_subvp.pth", weights_only=True)
    average = state["ema"]["shadow_params"]
    for change, message in (
        ({"model": Evil()}, "more than weights"),
        ({"optimizer": [({"a": Evil()},)]}, "more than weights"),
        ({"ema": None}, "has no 'ema'"),
        ({"step": "17"}, "has no 'step'"),
        ({"ema": {"shadow_params": average[:-1]}}, "averaged parameters"),
        ({"ema": {}}, "averaged parameters, got none"),
        ({"ema": {"shadow_params": average[::-1]}}, "does not fit"),
        ({"ema": {"shadow_params": ["a"] * len(average)}}, "does not fit"),
        ({"ema": {"shadow_params": [w.cfloat() for w in average]}}, "floating, is torch.complex64"),
        ({"model": {"a": 3}}, "does not fit"),
        ({"model": state["model"] | {"b": torch.zeros(1)}}, "'b' is not part of it"),
    ):
        for zipped in (True, False):
            torch.save({**state, **change}, path, _use_new_zipfile_serialization=zipped)
            refused(message)
    case = CASES["ncsnpp_ve"]
    state = torch.load(checkpoints / "ncsnpp_ve.pth", weights_only=True)
    for sigmas in (torch.zeros(()), torch.zeros(0), torch.zeros(2, 2)):
        torch.save({**state, "model": state["model"] | {"module.sigmas": sigmas}}, path)
        refused("sigmas: expected a list of levels, got the shape")
    torch.save([1, 2], path)
    refused("score_sde's training did not write it")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


class Recorder(nn.Module):
    """Gives x, keeps the labels."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.labels = labels
        return x


class subVPSDE:
    beta_0, beta_1, N = 0.1, 20.0, 1000


class VPSDE_(subVPSDE):
    pass


class VESDE_:
    sigma_min, sigma_max, N = 0.01, 50.0, 100


VPSDE_.__name__, VESDE_.__name__ = "VPSDE", "VESDE"


@pytest.mark.parametrize(
    ("theirs", "continuous", "sde", "predicts"),
    [
        (VPSDE_(), True, VPSDE(), "eps"),
        (VPSDE_(), False, DDPMSchedule.linear(1000, 1e-4, 0.02), "eps"),
        (subVPSDE(), True, SubVPSDE(), "eps"),
        (subVPSDE(), False, SubVPSDE(), "eps"),
        (VESDE_(), True, VESDE(0.01, 50.0), "score"),
        (VESDE_(), False, NCSNLadder.geometric(50.0, 0.01, 100), "score"),
        (NCSNLadder([1.0, 2.0]), True, NCSNLadder([1.0, 2.0]), "score"),
    ],
)
def test_live_modules(theirs: object, continuous: bool, sde: SDE, predicts: str) -> None:
    module = Recorder()
    model = score_sde.wrap(module, theirs, continuous=continuous)
    assert model.sde == sde and model.predicts == predicts
    t = sde.t_max if isinstance(sde, (DDPMSchedule, NCSNLadder)) else 0.25
    model(torch.zeros(1, 2), torch.tensor([model.match(sde, t).label]))
    expected = {
        VPSDE: 999 * 0.25,
        SubVPSDE: 999 * 0.25,
        DDPMSchedule: t,
        VESDE: 0.01 * 5000**0.25,
        NCSNLadder: 0,
    }
    assert module.labels.item() == pytest.approx(expected[type(sde)])
    assert module.labels.is_floating_point() == (type(sde) is not NCSNLadder)


def test_wrong_live_modules() -> None:
    with pytest.raises(TypeError, match="module: expected a callable"):
        score_sde.wrap(3, VPSDE())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sde"):
        score_sde.wrap(Recorder(), 3)
    with pytest.raises(ValueError, match="sde: expected an SDE with N levels"):
        score_sde.wrap(Recorder(), VPSDE(), continuous=False)
    with pytest.raises(ValueError, match="sde: expected a VP, sub-VP or VE SDE"):
        score_sde.wrap(Recorder(), sbm_fast.EDMSDE())
