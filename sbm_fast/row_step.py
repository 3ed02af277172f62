"""What a row of a run does, and the tensors it does it to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sbm_fast.noise import DTYPES
from sbm_fast.ops.affine_step import workspace_for
from sbm_fast.plan import Plan
from sbm_fast.row_inputs import RowInputs

FLOATS = DTYPES
"""What a network may take and give."""


@dataclass(frozen=True, eq=False)
class Memory:
    """The tensors of a run over B samples; S is the state's dtype.

    Attributes:
        x [B, …] S: the state.
        keys int64 [B], guidance [B] S or None.
        registers [K, B, …] S, None without registers.
        net_input [B, …]: the network's input; None where the network reads x itself.
        net_time [B] S: its time.
        first_bad int32 [B]: see `affine_step_`.
        epsilon [B] S and workspace: room for rows with a norm, no part of the state.
    """

    x: Tensor
    keys: Tensor
    guidance: Tensor | None
    registers: Tensor | None
    net_input: Tensor | None
    net_time: Tensor
    first_bad: Tensor
    epsilon: Tensor | None
    workspace: Tensor | None

    @classmethod
    def of(
        cls, plan: Plan, x: Tensor, keys: Tensor, guidance: Tensor | None, net_dtype: torch.dtype
    ) -> Memory:
        """The memory of a run that begins at x, which it takes over."""
        batch, norms = x.shape[0], bool(plan.norm.any())
        direct = net_dtype == x.dtype and bool((plan.c_in[plan.evaluates] == 1.0).all())
        return cls(
            x=x,
            keys=keys,
            guidance=guidance,
            registers=x.new_zeros((plan.registers, *x.shape)) if plan.registers else None,
            net_input=None if direct else torch.zeros_like(x, dtype=net_dtype),
            net_time=x.new_zeros(batch),
            first_bad=torch.full((batch,), -1, dtype=torch.int32, device=x.device),
            epsilon=x.new_zeros(batch) if norms else None,
            workspace=workspace_for(x) if norms and x.device.type == "cuda" else None,
        )

    def twin(self) -> Memory:
        """Memory for another state of the same kind."""
        held = (getattr(self, f.name) for f in fields(self))
        return Memory(*(None if t is None else torch.zeros_like(t) for t in held))  # type: ignore[arg-type]

    @property
    def inputs(self) -> Tensor:
        """What the network is called with."""
        return self.x if self.net_input is None else self.net_input

    def state(self) -> dict[str, Tensor]:
        """Everything that a row leaves to the next one."""
        names = (f.name for f in fields(self) if f.name not in ("epsilon", "workspace"))
        return {name: held for name in names if (held := getattr(self, name)) is not None}

    def copy_(self, state: Mapping[str, Tensor]) -> None:
        """Takes over another memory's `state`."""
        for name, held in self.state().items():
            held.copy_(state[name])


@dataclass(frozen=True, eq=False)
class RowStep:
    """A row as a function of device tensors only: network, row inputs, update, on to the next row.

    It reads no Python value that changes from row to row, so one graph of it is every row of its
    kind (`norm`: a row whose step size depends on the data). `row` int32 [B] is where it stands;
    the launch that advances it reads nothing else. `by_row`: the network is called with `row`, not
    with its time (`Prepared`).
    """

    net: Any
    by_row: bool
    affine_step_: Callable[..., None]
    coef: Tensor
    field: Tensor
    coupled: bool
    row_inputs: RowInputs | None
    label_dtype: torch.dtype
    memory: Memory
    row: Tensor
    cond: dict[str, Any]
    null_cond: dict[str, Any]

    def refresh(self) -> None:
        """Takes over the network's weights as they are now, where time tables were made of them."""
        if self.by_row:
            self.net.refresh()

    def start(self) -> None:
        """A row without evaluation."""
        self._update(None, None, None)

    def __call__(self, norm: bool, check: bool = False) -> None:
        """An evaluating row. `check` holds the network to its contract, as the loop does."""
        m = self.memory
        inputs = m.inputs
        label = self.row if self.by_row else m.net_time.to(self.label_dtype)
        versions = _versions(inputs, label) if check else ()
        network, uncond = self.net(inputs, label, **self.cond), None
        if m.guidance is not None:
            uncond = self.net(inputs, label, **self.null_cond)
        if check:
            outputs = [network] if m.guidance is None else [network, uncond]
            check_outputs(outputs, inputs, self.row_inputs)
            if _versions(inputs, label) != versions:
                raise ValueError(INPUT_CHANGED)
        if inputs.requires_grad:  # it differentiated by x: the next row starts afresh
            inputs.requires_grad_(False).grad = None
        self._update(network, uncond, m.epsilon if norm else None)

    def _update(self, network: Any, uncond: Any, epsilon: Tensor | None) -> None:
        m, guidance, noise = self.memory, self.memory.guidance, None
        if self.row_inputs is not None:
            network, uncond, guidance, noise = self.row_inputs.inputs(
                m.x, network, uncond, guidance, m.keys, self.row, None
            )
        self.affine_step_(
            m.x, network, uncond, guidance, m.registers, m.keys, self.row, self.coef, self.field,
            epsilon, noise, m.net_input, m.net_time, m.first_bad, m.workspace, self.coupled,
        )  # fmt: skip
        self.row.add_(1)


INPUT_CHANGED = "model: the network changed its input in place"
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError)
"""What a step or row inputs raise at outputs that they can't read (`check_outputs` says why)."""
OTHER_VIEW = "another view"
"""In the step's error where an output shares the state's memory in another order."""


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if not t.is_inference())


def readable(value: object, shape: tuple[int, ...]) -> TypeGuard[Tensor]:
    """Whether every backend's step can read this as an input of the shape."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return value.shape == shape and value.dtype in FLOATS


def kind(value: object) -> str:
    """What an error says of a value that is not `readable`."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout is torch.strided else f"{value.layout} "
    return f"{layout}{value.dtype} {tuple(value.shape)}"


def check_outputs(outputs: Sequence[object], inputs: Tensor, row_inputs: RowInputs | None) -> None:
    """ValueError naming `model` unless these are one or two outputs that the step can read."""
    shape = tuple(inputs.shape if row_inputs is None else row_inputs.output_shape)
    checked = [checked_output(out, inputs, shape) for out in outputs]
    if len(checked) == 2 and checked[0].data_ptr() == checked[1].data_ptr():
        raise ValueError(
            "model: both outputs under guidance are the same memory; return a new tensor from "
            "every call"
        )


def checked_output(out: object, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A network's output at x if it is one that can be read, else ValueError naming `model`."""
    if not readable(out, shape):
        raise ValueError(f"model: expected a floating tensor of shape {shape}, got {kind(out)}")
    if out.device != x.device:
        raise ValueError(f"model: expected its output on {x.device}, got {out.device}")
    return out
