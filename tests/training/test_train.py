"""The training loop, the digits and the weights that ship."""

from __future__ import annotations

import builtins
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from sbm_fast.data import digits
from sbm_fast.nn import UNet
from sbm_fast.sde import VPSDE
from sbm_fast.training import held_out_loss, train, train_digits
from sbm_fast.training.digits import SIGMA_DATA, digits_unet
from sbm_fast.training.train import lr_factor

WEIGHTS = Path(str(files("sbm_fast") / "weights" / "digits.safetensors"))


def tiny(**options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(channels=8, channel_mult=(1,), predicts="edm", time="edm", **options)


def test_digits() -> None:
    data = digits()
    assert data.train.shape == (1498, 1, 8, 8) and data.held_out.shape == (299, 1, 8, 8)
    both = torch.cat((data.train, data.held_out))
    assert both.dtype == torch.float32 and both.min() == -1 and both.max() == 1
    assert set((both * 8 + 8).unique().tolist()) == set(range(17))
    for labels in (data.train_labels, data.held_out_labels):
        assert labels.unique().tolist() == list(range(10))
    assert float(data.train.std()) == pytest.approx(SIGMA_DATA, abs=1e-4)
    seen = {tuple(image.flatten().tolist()) for image in data.train}
    assert not any(tuple(image.flatten().tolist()) in seen for image in data.held_out)


def test_digits_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        digits()


def test_twenty_steps_lower_the_loss() -> None:
    data, model = digits().train[:64], tiny()
    before = held_out_loss(model, VPSDE(), data, repeats=2)
    options: dict[str, Any] = {"batch_size": 32, "lr_warmup": 2, "ema_decay": 0.5}
    result = train(model, VPSDE(), data, steps=20, held_out=data, progress=False, **options)
    assert len(result.losses) == 20 and result.seconds > 0
    assert result.held_out_loss is not None and result.held_out_loss < 0.8 * before
    assert sum(result.losses[-5:]) < 0.8 * sum(result.losses[:5])
    assert not model.training


def test_equal_seeds_give_equal_weights_and_leave_the_generator_alone() -> None:
    data = digits().train[:64]
    weights = []
    for seed in (0, 0, 1):
        model = tiny(dropout=0.2)
        state = torch.random.get_rng_state()
        train(model, VPSDE(), data, steps=3, batch_size=16, seed=seed, progress=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        weights.append(model.last.weight.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_result_is_the_average() -> None:
    data = digits().train[:64]
    models = [tiny(), tiny()]
    for model, decay in zip(models, (0.0, 0.9), strict=True):
        train(model, VPSDE(), data, steps=4, batch_size=16, ema_decay=decay, progress=False)
    assert not torch.equal(models[0].last.weight, models[1].last.weight)


def test_learning_rate() -> None:
    assert lr_factor(0, 1000, 100) == pytest.approx(0.01)
    assert lr_factor(500, 1000, 100) == pytest.approx(0.5)
    assert lr_factor(999, 1000, 0) == pytest.approx(0.0, abs=1e-5)


def test_errors() -> None:
    data = torch.zeros(8, 1, 4, 4)
    with pytest.raises(ValueError, match="steps"):
        train(tiny(), VPSDE(), data, steps=0)
    with pytest.raises(ValueError, match="batch_size"):
        train(tiny(), VPSDE(), data, steps=1, batch_size=9)
    data[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 0"):
        train(tiny(), VPSDE(), data, steps=1, batch_size=8, progress=False)


def test_train_digits_writes_a_checkpoint(tmp_path: Path) -> None:
    result = train_digits(tmp_path / "digits.safetensors", steps=2, seed=3, progress=False)
    model = UNet.load(tmp_path / "digits.safetensors")
    assert model.config == digits_unet().config
    assert model.metadata["held_out_loss"] == result.held_out_loss
    assert model.metadata["command"].endswith("--steps 2 --seed 3")


def test_the_weights_that_ship() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    model = UNet.load(WEIGHTS).eval()
    assert model.config == digits_unet().config and model.sde == VPSDE()
    assert model.sample_shape == (1, 8, 8) and "sbm-fast train digits" in model.metadata["command"]
    loss = held_out_loss(model, VPSDE(), digits().held_out, repeats=4)
    assert loss < 5.2
    # Recorded before rounding to float16, with more repeats.
    assert loss == pytest.approx(model.metadata["held_out_loss"], rel=0.1)
