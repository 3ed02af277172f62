"""Registration of the ops: from the compiled part where it is there, else from Python."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

from sbm_fast import _load

NAMESPACE = "sbm_fast"
SCHEMAS: dict[str, str] = {}
WITHOUT_TWIN: list[str] = []
"""Ops that have no CUDA kernel: the backend "cuda" runs them on Triton's, or on plain torch."""
OLDEST_TRITON = (3, 6)

_load.load()
_library = torch.library.Library(NAMESPACE, "FRAGMENT" if _load.COMPILED else "DEF")


def cuda_compiled() -> bool:
    """Whether the compiled part has CUDA kernels."""
    return _load.host is not None and bool(_load.host.build_info()["cuda"])


@functools.cache
def triton_missing() -> str:
    """Why the Triton kernels cannot be imported; empty when they can.

    Looked up once: it takes longer than a GPU needs for 64 M normals, and stands before each call
    of `noise.normal(backend="triton")`.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; to install it: pip install triton"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        return ""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is older than {oldest}; to mend it: pip install -U triton"
    return ""


_HAS_TRITON = not triton_missing()
# What serves the ops on CUDA tensors; "" when plain torch stands in.
ON_CUDA = "cuda" if cuda_compiled() else "triton" if _HAS_TRITON else ""


def register(
    schema: str,
    reference: Callable[..., None],
    *,
    cuda_twin: bool = True,
    cpu_only: bool = False,
) -> torch._ops.OpOverload:
    """Makes `torch.ops.sbm_fast.<name>` available and returns its default overload.

    Compiled: the op and its CPU kernel are there already, and tests hold their schema against this
    one. Not compiled: the op is defined here and runs its eager reference on every device. Without
    CUDA kernels, CUDA tensors go to the Triton kernel, or to the reference where Triton is missing;
    so they do always where the op has no `cuda_twin`, a CUDA kernel in csrc/. An op is `cpu_only`
    where the package itself calls it on CPU tensors only: CUDA tensors get the reference. All ops
    write into arguments and return nothing, so one fake serves them all.
    """
    name = schema.split("(", 1)[0]
    SCHEMAS[name] = f"{NAMESPACE}::{schema}"
    if not _load.COMPILED:
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
    if not (cuda_twin or cpu_only):
        WITHOUT_TWIN.append(name)
    if cpu_only or not cuda_twin or ON_CUDA != "cuda":
        by_triton = _HAS_TRITON and not cpu_only
        _library.impl(name, _triton_op(name) if by_triton else reference, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(schema), lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _fake(schema: str) -> Callable[..., None]:
    """Refuses a meta tensor beside one that has data, whose op would be skipped silently."""
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]

    def fake(*arguments: object) -> None:
        given = zip(names, arguments, strict=False)  # the last ones may have defaults
        tensors = {name: v for name, v in given if isinstance(v, torch.Tensor)}
        on_meta = [name for name, v in tensors.items() if v.device.type == "meta"]
        if 0 < len(on_meta) < len(tensors):
            raise RuntimeError(f"{on_meta[0]}: expected a tensor with data, got a meta tensor")

    return fake


def _triton_op(name: str) -> Callable[..., None]:
    def op(*arguments: object) -> None:
        from sbm_fast import kernels  # imports Triton at its first use

        getattr(kernels, name)(*arguments)

    return op


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the registered ops run kernels, compiled or Triton, on this tensor's device."""
    if tensor.device.type == "cuda":
        return ON_CUDA != ""
    return _load.COMPILED and tensor.device.type == "cpu"
