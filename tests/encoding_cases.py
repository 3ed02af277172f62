"""SDEs, a denoiser and calls of the adaptive sampler for tests of encoding and sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sbm_fast import EDMSDE, VESDE, VPSDE, ScoreModel, SubVPSDE, sample
from sbm_fast.sde import SDE

SDES: list[SDE] = [VESDE(0.05, 8.0), VPSDE(), SubVPSDE(), EDMSDE(0.02, 10.0)]
VE = SDES[0]
every_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def denoises(x: Tensor, sigma: Tensor, shift: Any = 0.25) -> Tensor:
    """D of data of about unit scale at x/m: sample by sample, of exactly rounded operations."""
    shift = torch.as_tensor(shift, dtype=x.dtype, device=x.device)
    shift = shift.reshape(-1, *[1] * (x.dim() - 1)) if shift.dim() else shift
    r = sigma.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return (x + r * r * shift / (1.0 + 0.2 * x * x)) / (1.0 + r * r)


def model(**more: Any) -> ScoreModel:
    """Trained under a VE SDE, so that its input is x/m."""
    return ScoreModel(denoises, "x0", "sigma", VESDE(1e-4, 200.0), **more)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def flowed(shape: tuple[int, ...] = (4, 6), sde: SDE = VE, **more: Any) -> Any:
    options = {"seed": 0, "solver": "dopri5", **LOOSE, **more}
    return sample(options.pop("model", model()), sde, shape, method="ode", **options)
