"""Functions of the networks' layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sbm_fast import _load
from sbm_fast.nn import _group_norm
from sbm_fast.ops._library import ON_CUDA

ACTIVATIONS = ("silu", None)
NAMES = ("weight", "bias", "scale", "shift", "add", "residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
    activation: str | None = "silu",
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm, FiLM and SiLU in one pass, behind a sum that may be made in the same pass.

        h = gain · (x + add + residual)
        n = (h − mean_group) / √(var_group + eps) · weight + bias
        y = silu(n · (1 + scale) + shift)

    Differentiable in every tensor, in both modes. y and h have the dtype of x and its memory format
    (channels first or last; any other x is copied first). Statistics are float32, or float64 for a
    float64 x. Sources: see `sbm_fast.ops.group_norm_silu`.

    Args:
        x: [B, C, …], any number of spatial dimensions, also none.
        num_groups: divides C.
        weight, bias: [C].
        eps: not negative.
        scale, shift, add: [B, C], the same at all positions (a projected time embedding).
        residual: like x.
        gain: finite, not 0.
        activation: "silu" or None.
        return_sum: also return h; it is x itself where nothing is added and gain is 1.

    Raises:
        TypeError: a tensor of no float dtype (float64, float32, bfloat16, float16).
        ValueError: any other argument that is not as above.
    """
    keep = return_sum and (add is not None or residual is not None or gain != 1.0)
    tensors = (x, weight, bias, scale, shift, add, residual)
    numbers = (num_groups, eps, gain, activation)
    checked = False
    try:
        function, checks = _function(tensors)
        # The kernels refuse bad tensors themselves: good ones are not looked at twice.
        if not checks or not _usual(*numbers):
            _check(tensors, *numbers)
            checked = True
        results = function(*tensors, num_groups, eps, gain, activation == "silu", keep)
    except Exception:
        if not checked:
            _check(tensors, *numbers)
        raise
    if not return_sum:
        return results[0]
    return results[0], results[2] if keep else x


def _usual(groups: object, eps: object, gain: object, activation: object) -> bool:
    """Whether `_check` has nothing to say of these but that groups may divide no channels."""
    usual = type(groups) is int and type(eps) is float and 0.0 <= eps < math.inf
    return usual and type(gain) is float and gain == 1.0 and activation == "silu"


def _function(tensors: tuple[Tensor | None, ...]) -> tuple[Callable[..., tuple[Tensor, ...]], bool]:
    """The op alone where nothing is differentiated, which costs least; and whether what is called
    checks the tensors before it does anything else."""
    wanted = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    dual, transformed = forward_ad._current_level >= 0, torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():
        if dual or transformed:  # torch.compile takes no Function with rules for these
            return _group_norm.formula, False
        return (_group_norm.Reverse.apply if wanted else _group_norm.run), False
    if transformed:
        nested = _group_norm.nested_forward_mode()
        return (_group_norm.formula if nested else _group_norm.GroupNormSiLU.apply), False
    if wanted or dual:
        return _group_norm.GroupNormSiLU.apply, False
    x = tensors[0]
    assert x is not None
    return _group_norm.run, _load.COMPILED if x.is_cpu else x.is_cuda and ON_CUDA != ""


def _check(
    tensors: tuple[Tensor | None, ...],
    groups: int,
    eps: float,
    gain: float,
    activation: str | None,
) -> None:
    for name, v in zip(("x", *NAMES), tensors, strict=True):
        if not isinstance(v, Tensor) and (v is not None or name == "x"):
            raise TypeError(f"{name}: expected a tensor, got {type(v).__name__}")
    x, *others = tensors
    assert x is not None
    if x.ndim < 2:
        raise ValueError(f"x: expected [B, C, …], got the shape {list(x.shape)}")
    shape = x.shape
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"num_groups: expected an int, got {type(groups).__name__} {groups!r}")
    if groups < 1 or shape[1] % groups or not shape[1]:
        raise ValueError(f"num_groups: expected a divisor of {shape[1]} channels, got {groups}")
    expected = (shape[1:2], shape[1:2], shape[:2], shape[:2], shape[:2], shape)
    for name, v, wanted in zip(NAMES, others, expected, strict=True):
        if v is not None and v.shape != wanted:
            raise ValueError(f"{name}: expected the shape {list(wanted)}, got {list(v.shape)}")
    for name, v in zip(("x", *NAMES), tensors, strict=True):
        if v is not None and v.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {DTYPES}, got {v.dtype}")
        if v is not None and v.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got one on {v.device}")
    for name, number in (("eps", eps), ("gain", gain)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__} {number!r}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
    if gain == 0.0 or not -math.inf < gain < math.inf:
        raise ValueError(f"gain: expected a finite number other than 0, got {gain!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
