"""Which implementation of the ops a run uses."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sbm_fast import _load
from sbm_fast.doctor import why_off
from sbm_fast.ops import affine_step, error_norm, hutchinson

NAMES = ("auto", "cuda", "triton", "cpu", "eager")


@dataclass(frozen=True)
class Kernels:
    """The ops of one backend."""

    name: str
    affine_step_: Callable[..., None]
    hutchinson_: Callable[..., None] = hutchinson.hutchinson_
    error_norm_: Callable[..., None] = error_norm.error_norm_


_warned = False


def choose_backend(name: str, device: torch.device) -> Kernels:
    """The kernels for `backend=name` on a device; "auto" is the best one that works.

    "auto" is on a CUDA device "cuda", or "triton" where no CUDA kernels were compiled; on a CPU
    "cpu"; where these are off, and on other devices, "eager", with one warning that says why.

    Raises: ValueError for an unknown name, or one that is off here, with the reason.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"backend: expected one of {NAMES}, got {name!r}")
    if name == "auto":
        return kernels_of(best(device))
    reason = why_off(name) or _elsewhere(name, device)
    if reason:
        raise ValueError(f"backend: {name!r} is off: {reason}")
    return kernels_of(name)


def best(device: torch.device) -> str:
    """What "auto" means on a device; warns once when it is plain torch for want of kernels."""
    if device.type == "cuda":
        off = {}
        for name in ("cuda", "triton"):
            off[name] = why_off(name)
            if not off[name]:
                return name
        _warn_once(f"on {device}: cuda is off: {off['cuda']}; triton is off: {off['triton']}")
    elif device.type == "cpu":
        if _load.load():
            return "cpu"
        _load.warn_if_missing()
    return "eager"


def kernels_of(name: str) -> Kernels:
    if name == "eager":
        return Kernels(name, affine_step.reference, hutchinson.reference, error_norm.reference)
    if name == "triton":
        from sbm_fast import kernels

        return Kernels(name, kernels.affine_step_, kernels.hutchinson_, kernels.error_norm_)
    return Kernels(name, affine_step.affine_step_)


def _elsewhere(name: str, device: torch.device) -> str:
    """Why a backend that works on this machine does not on this device."""
    if name == "triton" and device.type == "cpu":
        from sbm_fast.kernels import interpreted

        on_cpu = "there Triton runs only in its interpreter, with TRITON_INTERPRET=1 in the "
        return "" if interpreted() else f"the run is on cpu; {on_cpu}environment"
    wanted = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}.get(name, device.type)
    return "" if device.type == wanted else f"the run is on {device}"


def _warn_once(where: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        message = f"sbm_fast runs without kernels, on plain torch, {where}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
