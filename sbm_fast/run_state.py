"""What `Sampler.resume` asks of a state that comes back (`Run.state()` gives it)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WHOLE = {
    "row": torch.int64,
    "first_bad": torch.int32,
    "given_start": torch.bool,
    "plan": torch.int64,
}
"""The tensors that are counted or compared, with their dtypes; keys have a check of their own."""

NAMES = ("x", "registers", "keys", "guidance", *WHOLE)


def check_state(state: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError naming `state` unless it has a state's tensors, x as given."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected what Run.state() returns, got {type(state).__name__}")
    wrong = [name for name in NAMES if not isinstance(state.get(name), Tensor)]
    if wrong:
        raise ValueError(f"state: no tensors for {wrong}; expected what Run.state() returns")
    single = [n for n in ("row", "given_start", "plan") if state[n].numel() != 1]
    if single or state["x"].dtype != dtype or tuple(state["x"].shape) != shape:
        raise ValueError(
            f"state: expected x {dtype} {shape} and single values for row, given_start and plan, "
            f"got {state['x'].dtype} {tuple(state['x'].shape)}"
        )
    for name, expected in {**WHOLE, "registers": dtype, "guidance": dtype}.items():
        if state[name].dtype != expected:
            raise ValueError(f"state: expected {name} as {expected}, got {state[name].dtype}")
    if tuple(state["guidance"].shape) not in ((0,), shape[:1]):
        raise ValueError(
            f"state: expected guidance of shape (0,) or {shape[:1]}, got "
            f"{tuple(state['guidance'].shape)}"
        )


def check_values(state: Mapping[str, Tensor], rows: int) -> None:
    """ValueError naming `state` unless its numbers can be those of a run of a plan of `rows`."""
    row, first_bad = int(state["row"].item()), state["first_bad"]
    if not 0 <= row <= rows:
        raise ValueError(f"state: expected a row in [0, {rows}], got {row}")
    if ((first_bad < -1) | (first_bad >= row)).any():
        raise ValueError(f"state: expected first_bad in [-1, {row}), the rows that have run")
    if (first_bad >= 0).any():
        return  # the run reports it at its end
    for name in ("x", "registers"):
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"state: {name} holds values that are not finite")


def check_guidance(kept: Tensor, weights: Tensor | None, *, given: bool) -> None:
    """ValueError naming `guidance` where a run would go on otherwise than it was kept.

    kept [B], or [0] for none; weights [B]: those it would go on with, `given` to `resume` or the
    sampler's own.
    """
    if weights is None:
        wrong = "none" if len(kept) else ""
    elif len(kept) != len(weights):
        raise ValueError(
            "guidance: the state is of a run without it; expected None, got weights from "
            + ("the call" if given else "the sampler")
        )
    else:
        wrong = "" if given or torch.equal(kept.to(weights.device), weights) else "others"
    if wrong:
        raise ValueError(
            "guidance: the state is of a run with weights; expected them again as "
            f"resume(state, guidance=…), got {wrong} from the sampler"
        )
