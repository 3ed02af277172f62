"""What the configuration of a scheduler of diffusers says about the network it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbm_fast.sde import EDMSDE, VESDE, DDPMSchedule

if TYPE_CHECKING:
    from sbm_fast.sde import SDE

_DISCRETE = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
)
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_VE = ("ScoreSdeVeScheduler",)
SCHEDULERS = (*_DISCRETE, *_EDM, *_VE)
"""Classes of diffusers' schedulers whose configuration is understood."""

_PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True)
class Training:
    """What a scheduler's configuration says about the network.

    Attributes:
        sde, predicts, time, sigma_data: as in `ScoreModel`.
        sign: the network predicts sign · ``predicts``.
        variance: "learned_range" or None, as in `ScoreModel`.
    """

    sde: SDE
    predicts: str
    time: str
    sigma_data: float = 0.5
    sign: int = 1
    variance: str | None = None


def training(name: object, config: Mapping[str, Any]) -> Training:
    """What the configuration of the scheduler class ``name`` says about its network.

    ==================  ==========================================  ======================
    schedulers          noise levels                                time
    ==================  ==========================================  ======================
    on β (DDPM, DDIM…)  `DDPMSchedule` of its β                     index
    EDM's               `EDMSDE`, network inside EDM's c's          ¼ ln σ
    ScoreSdeVe          `VESDE`, the network gives the score        σ
    ==================  ==========================================  ======================

    Raises: ValueError for what is not understood, naming it.
    """
    if name in _DISCRETE:
        return _discrete(config)
    if name in _EDM:
        sde = EDMSDE(_number(config, "sigma_min"), _number(config, "sigma_max"))
        prediction = _prediction(config)
        if prediction == "sample":
            raise ValueError(f"prediction_type: {name} has no 'sample'")
        # Its "v_prediction" is c_skip x − c_out F: the other sign of F, nothing else.
        sign = -1 if prediction == "v_prediction" else 1
        return Training(sde, "edm", "edm", _number(config, "sigma_data"), sign)
    if name in _VE:
        levels = VESDE(_number(config, "sigma_min"), _number(config, "sigma_max"))
        return Training(levels, "score", "sigma")
    raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {name!r:.80}")


def _discrete(config: Mapping[str, Any]) -> Training:
    for key, refused in (
        ("rescale_betas_zero_snr", "a last level without signal has no σ/m"),
        ("use_flow_sigmas", "flow matching is no diffusion on β"),
    ):
        if config.get(key):
            raise ValueError(f"{key}: {refused}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type: expected 'discrete', got {config['timestep_type']!r:.80}")
    variance = config.get("variance_type")
    if variance == "learned":
        raise ValueError("variance_type: 'learned' (not 'learned_range') is not supported")
    return Training(
        DDPMSchedule(_betas(config)),
        _PREDICTS[_prediction(config)],
        "index",
        variance="learned_range" if variance == "learned_range" else None,
    )


def _prediction(config: Mapping[str, Any]) -> str:
    # Releases before 0.10 had a flag in place of the name.
    default = "sample" if config.get("predict_epsilon") is False else "epsilon"
    prediction = config.get("prediction_type") or default
    if prediction not in _PREDICTS:
        known = ", ".join(_PREDICTS)
        raise ValueError(f"prediction_type: expected one of {known}, got {prediction!r:.80}")
    return prediction


def _betas(config: Mapping[str, Any]) -> Any:
    """β_i, i = 0 … N−1, by the schedule's formula in float64."""
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    levels, kind = count(config, "num_train_timesteps"), config.get("beta_schedule")
    if kind == "squaredcos_cap_v2":
        return DDPMSchedule.cosine(levels).betas
    low, high = _number(config, "beta_start"), _number(config, "beta_end")
    if kind == "linear":
        return np.linspace(low, high, levels)
    if kind == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, levels) ** 2
    if kind == "sigmoid":
        return low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, levels)))
    known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
    raise ValueError(f"beta_schedule: expected one of {known}, got {kind!r:.80}")


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{key}: expected a number ≥ 0, got {value!r:.80}")
    return float(value)


def count(config: Mapping[str, Any], key: str) -> int:
    """``config[key]`` if it is an int in 1 … 1000000, else ValueError."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000:
        raise ValueError(f"{key}: expected an integer in 1 … 1000000, got {value!r:.80}")
    return value
