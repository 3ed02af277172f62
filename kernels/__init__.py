"""Triton kernels, one op a file, under the names of csrc/. Installed as `sbm_fast.kernels`.

`sbm_fast.kernels.<op>` is the op as a launch of these kernels, with the op's own signature. Triton
is imported when the first of them is looked up.
"""

import importlib
import os
import sys
from collections.abc import Callable

OPS = {
    "affine_step_": "affine_step",
    "langevin_epsilon_": "langevin_epsilon",
    "hutchinson_": "hutchinson",
    "error_norm_": "error_norm",
    "group_norm_silu_": "group_norm_silu",
    "group_norm_silu_product_": "group_norm_silu_product",
    "normal_": "noise",
    "uniform_": "noise",
    "rademacher_": "noise",
    "words_": "noise",
    "keys_": "noise",
}


def __getattr__(name: str) -> Callable[..., None]:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op: Callable[..., None] = getattr(importlib.import_module(f"{__name__}.{OPS[name]}"), name)
    return op


def interpreted() -> bool:
    """Whether these kernels run in Triton's interpreter, which takes CPU tensors.

    Triton decides when it compiles a function's definition, at the import of its module.
    """
    loaded = sys.modules.get(f"{__name__}.noise")
    if loaded is not None:
        return type(loaded.fill).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
