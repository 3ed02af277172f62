"""Every implementation of the ops that runs here: the backends that the op tests compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from sbm_fast import _load, kernels
from sbm_fast.ops import (
    affine_step,
    error_norm,
    group_norm_silu,
    hutchinson,
    langevin_epsilon,
    winograd,
)
from sbm_fast.ops import noise as noise_ops
from sbm_fast.ops._library import cuda_compiled, triton_missing

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Backend:
    """`ops` has the ops by their names, with the signatures of torch.ops.sbm_fast."""

    ops: Any
    device: str = "cpu"
    slow: bool = False
    """Emulated: tests give it fewer shapes."""


EAGER = SimpleNamespace(
    affine_step_=affine_step.reference,
    langevin_epsilon_=langevin_epsilon.reference,
    hutchinson_=hutchinson.reference,
    error_norm_=error_norm.reference,
    group_norm_silu_=group_norm_silu.reference,
    group_norm_silu_product_=group_norm_silu.product_reference,
    winograd_input_=winograd.input_reference,
    winograd_output_=winograd.output_reference,
    keys_=noise_ops.keys_reference,
    **{f"{kind}_": reference for kind, reference in noise_ops.REFERENCES.items()},
)


def _triton_version() -> tuple[int, ...]:
    return tuple(map(int, version("triton").split(".")[:2]))


BACKENDS = {"eager": Backend(EAGER)}
if _load.COMPILED:
    BACKENDS["cpu"] = Backend(torch.ops.sbm_fast)
if GPU and cuda_compiled():
    BACKENDS["cuda"] = Backend(torch.ops.sbm_fast, "cuda")
elif not GPU and not emulated.missing():
    BACKENDS["cuda"] = Backend(emulated, slow=True)
# Triton 3.6 compiles the kernels, but its interpreter fails with numpy from 2.4 on.
if not triton_missing() and (GPU or _triton_version() >= (3, 7)):
    if not GPU:
        import triton_interpreter  # noqa: F401  # exact, and before the kernels
    BACKENDS["triton"] = Backend(kernels, "cuda" if GPU else "cpu", slow=not GPU)


def parameters(backend: str, *values: Any) -> Any:
    """Parameters of a test; marked `gpu` where the backend runs on one."""
    marks = [pytest.mark.gpu] if BACKENDS[backend].device == "cuda" else []
    return pytest.param(backend, *values, marks=marks)


# Ops without a CUDA kernel have nothing to emulate.
TWINLESS = [name for name, properties in BACKENDS.items() if properties.ops is not emulated]
each = pytest.mark.parametrize("backend", [parameters(name) for name in BACKENDS])
each_twinless = pytest.mark.parametrize("backend", [parameters(name) for name in TWINLESS])


needs_compiled = pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason=triton_missing())
# Of the errors that kernels of both kinds give.
either = pytest.mark.parametrize(
    "backend",
    [pytest.param("cpu", marks=needs_compiled), pytest.param("triton", marks=needs_triton)],
)


def over(
    names: str, values: Sequence[Any], few: Sequence[Any], backends: Iterable[str] = BACKENDS
) -> pytest.MarkDecorator:
    """Parametrises `backend` and `names`: slow backends with `few` of the values."""
    cases = [
        parameters(backend, *(value if "," in names else (value,)))
        for backend in backends
        for value in (few if is_slow(backend) else values)
    ]
    return pytest.mark.parametrize(f"backend,{names}", cases)


def is_slow(backend: str) -> bool:
    return BACKENDS[backend].slow


def call(backend: str, op: str, *arguments: Any, **options: Any) -> None:
    """Runs an op of a backend on CPU tensors.

    On another device it works on copies of their whole memory, which come back: views stay views,
    and what is written beside a tensor is seen.
    """
    chosen = BACKENDS[backend]
    run = getattr(chosen.ops, op)
    if chosen.device == "cpu":
        run(*arguments, **options)
        return
    memory: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = storage, storage.to(device=torch.device(chosen.device))
        copy = torch.empty(0, dtype=value.dtype, device=chosen.device)
        where = memory[storage.data_ptr()][1]
        return copy.set_(where, value.storage_offset(), value.size(), value.stride())

    run(*map(there, arguments), **{name: there(value) for name, value in options.items()})
    for here, copy in memory.values():
        here.copy_(copy)
