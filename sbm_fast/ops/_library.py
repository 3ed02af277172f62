"""Registration of the ops: from the compiled part where it is there, else from Python."""

from collections.abc import Callable

import torch

from sbm_fast import _load

NAMESPACE = "sbm_fast"
SCHEMAS: dict[str, str] = {}

_load.load()
_library = torch.library.Library(NAMESPACE, "FRAGMENT" if _load.COMPILED else "DEF")


def register(schema: str, reference: Callable[..., None]) -> torch._ops.OpOverload:
    """Makes `torch.ops.sbm_fast.<name>` available and returns its default overload.

    Compiled: the op and its CPU kernel are there already, and tests hold their schema against this
    one. Not compiled: the op is defined here and runs its eager reference on every device. All ops
    write into arguments and return nothing, so one fake serves them all.
    """
    name = schema.split("(", 1)[0]
    SCHEMAS[name] = f"{NAMESPACE}::{schema}"
    if not _load.COMPILED:
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def use_compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernels serve this tensor's device."""
    return _load.COMPILED and tensor.device.type == "cpu"
