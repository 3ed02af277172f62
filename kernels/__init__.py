"""Triton kernels, one op a file, under the names of csrc/. Installed as `sbm_fast.kernels`.

`sbm_fast.kernels.<op>` is the op as a launch of these kernels, with the op's own signature. Triton
is imported when the first of them is looked up.
"""

import importlib
from collections.abc import Callable

OPS = {
    "affine_step_": "affine_step",
    "langevin_epsilon_": "langevin_epsilon",
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
