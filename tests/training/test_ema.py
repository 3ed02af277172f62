"""Averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sbm_fast.training.ema import EMA


class Scalar(nn.Module):
    count: torch.Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


def set_to(module: Scalar, value: float) -> None:
    with torch.no_grad():
        module.value.fill_(value)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_formula(warmup: bool) -> None:
    module = Scalar(1.0)
    ema = EMA(module, 0.3, warmup=warmup)
    expected = 1.0
    for n, value in enumerate((2.0, -3.0, 5.0, 0.5, 7.0)):
        set_to(module, value)
        module.count += 1
        decay = min(0.3, (1 + n) / (10 + n)) if warmup else 0.3
        assert ema.next_decay() == decay
        ema.update(module)
        expected = decay * expected + (1 - decay) * value
    ema.copy_to(module)
    assert module.value.item() == pytest.approx(expected, rel=1e-14)
    assert module.count.item() == 5


def test_constant_weights_stay() -> None:
    module = Scalar(0.1)
    ema = EMA(module, 0.99)
    for _ in range(50):
        ema.update(module)
    ema.copy_to(module)
    assert module.value.item() == pytest.approx(0.1, rel=1e-14)


def test_applied_to_gives_the_own_weights_back() -> None:
    module = Scalar(1.0)
    ema = EMA(module, 0.5)
    set_to(module, 9.0)
    with pytest.raises(RuntimeError, match="inside"), ema.applied_to(module):
        assert module.value.item() == 1.0
        raise RuntimeError("inside")
    assert module.value.item() == 9.0


def test_state_goes_on() -> None:
    module = Scalar(1.0)
    one, other = EMA(module, 0.9), EMA(module, 0.1, warmup=False)
    set_to(module, 2.0)
    one.update(module)
    other.load_state_dict(one.state_dict())
    for ema in (one, other):
        set_to(module, 5.0)
        ema.update(module)
    results = []
    for ema in (one, other):
        ema.copy_to(module)
        results.append(module.value.item())
    assert results[0] == results[1] and other.updates == 2


def test_errors() -> None:
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay"):
            EMA(Scalar(1.0), decay)
    with pytest.raises(ValueError, match="does not match"):
        EMA(Scalar(1.0)).update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not match"):
        EMA(nn.Linear(2, 2)).copy_to(nn.Linear(2, 3))
