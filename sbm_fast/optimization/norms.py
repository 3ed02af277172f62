"""Which modules are GroupNorms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sbm_fast.optimization.joined import own_call

_OWN = {"num_groups", "num_channels", "eps", "affine", *vars(nn.Module())}


def looks_like_norm(module: nn.Module) -> bool:
    """Whether it is a GroupNorm by class, or by what it holds: num_groups, eps, weight, bias."""
    if isinstance(module, nn.GroupNorm):
        return True
    held = {*vars(module), *module._parameters}
    return {"num_groups", "eps", "weight", "bias"} <= held and not module._modules


def why_not(module: Any) -> str:
    """Why a module that looks like a GroupNorm cannot be taken for one; empty if it can."""
    if type(module).__module__.startswith("sbm_fast."):
        return "is sbm_fast's own, and fused by itself"
    if "forward" in vars(module):
        return "a forward was set on the instance"
    if own_call(module):
        return "a __call__ of its own"
    if type(module).forward is nn.GroupNorm.forward:
        return ""
    # Private state counts where forward reads it: EDM's classes keep their arguments so.
    read = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    state = {v for v in set(vars(module)) - _OWN if not v.startswith("_") or v in read}
    if state or set(module._parameters) - {"weight", "bias"} or module._buffers:
        return "a forward of its own, and state that torch's GroupNorm does not have"
    return "" if _is_group_norm(module) else "a forward of its own that is not group_norm"


@torch.no_grad()
def _is_group_norm(module: Any) -> bool:
    """Whether its forward equals group_norm on random inputs, small and large, in both modes.

    It sees no other state than torch's GroupNorm has (`why_not`), so that the same is done later.
    """
    weight, bias = module.weight, module.bias
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.device.type == "meta":
        return False
    training = module.training
    source = torch.Generator().manual_seed(0)
    try:
        for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (1e3, 10.0)):
            x = torch.randn((2, weight.numel(), 5, 3), generator=source) * scale + offset
            x = x.to(weight.device, weight.dtype)
            should = nn.functional.group_norm(x, module.num_groups, weight, bias, module.eps)
            limit = 16 * torch.finfo(weight.dtype).eps * float(should.abs().amax())
            for mode in (True, False):
                module.training = mode
                if not torch.allclose(module.forward(x), should, rtol=0, atol=limit):
                    return False
                if not _keeps(module, x):
                    return False
    except Exception:
        return False  # Somebody else's code, on an input that it may not expect.
    finally:
        module.training = training
    return True


def _keeps(module: Any, x: Tensor) -> bool:
    """Whether its output has the input's dtype, whatever that is, where it takes it."""
    for dtype in (torch.bfloat16, torch.float32):
        try:
            out = module.forward(x.to(dtype))
        except RuntimeError:
            continue
        if out.dtype != dtype:
            return False
    return True
