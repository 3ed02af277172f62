"""Fused sampling kernels for score-based (diffusion) models.

>>> import sbm_fast
>>> x = sbm_fast.sample(model, sbm_fast.VPSDE(), (64, 3, 32, 32), method="pc", seed=0)
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING

from sbm_fast import noise, plan
from sbm_fast.bits import BitsResult, bits_per_dim
from sbm_fast.doctor import doctor
from sbm_fast.encoding import encode, interpolate
from sbm_fast.ladder import DDPMSchedule, NCSNLadder
from sbm_fast.likelihood import LikelihoodResult, log_likelihood
from sbm_fast.methods import DynamicThreshold
from sbm_fast.model import ScoreModel
from sbm_fast.optimize import optimize
from sbm_fast.sampler import SampleInfo, Sampler, sample
from sbm_fast.sde import EDMSDE, VESDE, VPSDE, SubVPSDE
from sbm_fast.variational import BoundResult, variational_bound

__all__ = [
    "EDMSDE",
    "VESDE",
    "VPSDE",
    "BitsResult",
    "BoundResult",
    "DDPMSchedule",
    "DynamicThreshold",
    "LikelihoodResult",
    "NCSNLadder",
    "SampleInfo",
    "Sampler",
    "ScoreModel",
    "SubVPSDE",
    "adapters",
    "bits_per_dim",
    "doctor",
    "encode",
    "interpolate",
    "log_likelihood",
    "noise",
    "optimize",
    "plan",
    "sample",
    "variational_bound",
]


if TYPE_CHECKING:
    from sbm_fast import adapters
else:

    def __getattr__(name: str) -> object:
        """Parts that most programs don't need are imported when they are first asked for."""
        if name == "adapters":
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
