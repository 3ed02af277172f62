"""SDEs of every kind and a network for tests of the probability flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sbm_fast.backend import choose_backend
from sbm_fast.parameterization import PREDICTIONS
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule, Ladder, NCSNLadder, SubVPSDE

LADDERS: list[SDE] = [
    DDPMSchedule.linear(),
    DDPMSchedule.cosine(50),
    NCSNLadder.geometric(50.0, 0.01, 30),
    NCSNLadder([0.02, 0.03, 0.5, 7.0]),
]
CONTINUOUS: list[SDE] = [VESDE(), VPSDE(), SubVPSDE(), EDMSDE()]
ALL = [*CONTINUOUS, *LADDERS]
KERNELS = choose_backend("auto", torch.device("cpu"))


def name(value: object) -> str:
    levels = f" {value.levels}" if isinstance(value, Ladder) else ""
    return type(value).__name__ + levels if isinstance(value, SDE) else str(value)


every_sde = pytest.mark.parametrize("sde", ALL, ids=name)
continuous = pytest.mark.parametrize("sde", CONTINUOUS, ids=name)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def elementwise(x: Tensor, label: Tensor, shift: Any = 0.25) -> Tensor:
    """Smooth, sample by sample, of exactly rounded operations."""
    time = label.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    shift = torch.as_tensor(shift, dtype=x.dtype)
    shift = shift.reshape(-1, *[1] * (x.dim() - 1)) if shift.dim() else shift
    return (x + shift) / (1.0 + time * time + 0.1 * x * x)
