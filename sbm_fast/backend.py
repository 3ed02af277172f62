"""Which implementation of the ops a run uses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sbm_fast import _load
from sbm_fast.doctor import backends
from sbm_fast.ops import affine_step


@dataclass(frozen=True)
class Kernels:
    """The ops of one backend."""

    name: str
    affine_step_: Callable[..., None]


_CPU = Kernels("cpu", affine_step.affine_step_)
_EAGER = Kernels("eager", affine_step.reference)


def choose_backend(name: str, device: torch.device) -> Kernels:
    """The kernels for `backend=name` on a device; "auto" is the best one that works.

    Raises: ValueError for an unknown name, or one that is off here, with the reason.
    """
    off = backends()
    if name == "auto":
        if device.type == "cpu" and not off["cpu"]:
            return _CPU
        if device.type == "cpu":
            _load.warn_if_missing()
        return _EAGER
    if name not in off:
        raise ValueError(f"backend: expected one of {('auto', *off)}, got {name!r}")
    reason = off[name]
    if name == "cpu" and device.type != "cpu":
        reason = f"the run is on {device}"
    if reason:
        raise ValueError(f"backend: {name!r} is off: {reason}")
    return _CPU if name == "cpu" else _EAGER
