"""One run of a plan: network, step, network, step … with everything allocated before."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sbm_fast.plan import H0, TAIL_LANES, Plan, Z
from sbm_fast.row_inputs import RowInputs

if TYPE_CHECKING:
    from sbm_fast.sampler import Sampler

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What a network may take and give."""

NoiseHook = Callable[[int, int], Tensor]
"""(draw, stream) → tensor [B, …] used as z."""


@dataclass(frozen=True)
class Step:
    """What a callback gets after a row: `x` is a copy of the state, `time` that of the row's
    evaluation (NaN for a start row)."""

    row: int
    rows: int
    time: float
    x: Tensor


@dataclass(frozen=True)
class Table:
    """A plan on its device, with one vector of row numbers [B] for every row, so that the loop
    makes no tensors. `given_start`: it begins from an x_init."""

    plan: Plan
    given_start: bool
    coef: Tensor
    field: Tensor
    row_numbers: Sequence[Tensor]

    def fingerprint(self) -> Tensor:
        """64 bits of the table's hash, so that a kept state goes back to its own plan."""
        table = self.coef.cpu().numpy().tobytes() + self.field.cpu().numpy().tobytes()
        for inputs in (self.plan.log_std, self.plan.threshold):
            table += inputs.tobytes() if inputs.any() else b""
        digest = hashlib.sha256(table).digest()
        return torch.tensor(int.from_bytes(digest[:8], "little", signed=True), device="cpu")

    @classmethod
    def of(
        cls, plan: Plan, given_start: bool, batch: int, dtype: torch.dtype, device: torch.device
    ) -> Table:
        numbers = torch.arange(plan.rows, dtype=torch.int32, device=device)
        in_step = numbers[:, None].expand(plan.rows, batch).unbind(0)
        return cls(plan, given_start, *plan.pack(dtype, device), in_step)


class Run:
    """A sampling run that can be advanced row by row, kept, and taken up again.

    The network reads the state itself where it takes it unscaled and in the state's dtype;
    otherwise the step writes the network's next input into a buffer of its own. So beyond the
    network's memory there are the state, K registers and at most one such buffer.
    """

    def __init__(
        self,
        sampler: Sampler,
        table: Table,
        x: Tensor,
        keys: Tensor,
        seed: int | None,
        cond: dict[str, Any],
        guidance: Tensor | None,
        noise: NoiseHook | None,
    ) -> None:
        plan = table.plan
        self.plan, self.seed, self.row = plan, seed, 0
        self.seconds_network = 0.0
        self._coef, self._field = table.coef, table.field
        self._row_numbers, self._table = table.row_numbers, table
        self._cond, self._guidance, self._noise = cond, guidance, noise
        self._x, self._keys = x, keys
        batch = x.shape[0]
        self._registers = x.new_zeros((plan.registers, *x.shape)) if plan.registers else None
        direct = sampler.net_dtype == x.dtype and bool((plan.c_in[plan.evaluates] == 1.0).all())
        self._net_input = None if direct else torch.zeros_like(x, dtype=sampler.net_dtype)
        self._net_time = x.new_zeros(batch)
        # Embeddings of time are made in float32 by every network that is not float64 itself.
        wide = sampler.net_dtype == torch.float64
        self._label_dtype = torch.float64 if wide else torch.float32
        self._epsilon = x.new_zeros(batch) if plan.norm.any() else None
        self._first_bad = torch.full((batch,), -1, dtype=torch.int32, device=x.device)
        self._evaluates = plan.evaluates.tolist()
        self._step, self._net = sampler.kernels.affine_step_, sampler.model.net
        self._null_cond = dict(sampler.model.null_cond or {})
        self._row_inputs = RowInputs.of(plan, sampler.model, self._step, x)
        self._checked = self._running = False
        self._counts = not x.is_inference()  # inference tensors have no version counter
        self._needs_noise = ((plan.coef[:, :, Z] != 0).any(axis=1) | (plan.norm != 0)).tolist()

    @property
    def x(self) -> Tensor:
        """A copy of the present state, in the plan's coordinate."""
        return self._x.clone()

    @property
    def nfe(self) -> int:
        """Network evaluations so far."""
        done = int(np.count_nonzero(self.plan.evaluates[: self.row]))
        return done if self._guidance is None else 2 * done

    @torch.no_grad()
    def advance(
        self,
        rows: int | None = None,
        *,
        progress: bool = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Run:
        """Goes on for `rows` rows, or to the end.

        Raises: ValueError or TypeError naming `rows` or `model`; RuntimeError when it is called
        from the run's own network or callback.
        """
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int)):
            raise TypeError(f"rows: expected an integer ≥ 0 or None, got {rows!r}")
        if rows is not None and rows < 0:
            raise ValueError(f"rows: expected a number ≥ 0, got {rows}")
        if self._running:
            raise RuntimeError("advance: this run is being advanced already")
        left = self.plan.rows - self.row
        end = self.row + (left if rows is None else min(rows, left))
        if self._x.numel() == 0:
            self.row = end
            return self
        self._running = True
        try:
            self._go(end, progress, callback)
        finally:
            self._running = False
        return self

    def _go(self, end: int, progress: bool, callback: Callable[[Step], None] | None) -> None:
        with _eval_mode(self._net), _bar(end - self.row, progress) as bar:
            for row in self._rows(end):
                if bar is not None:
                    bar.update()
                if callback is not None:
                    time_of_row = float(self.plan.time[row])
                    callback(Step(row, self.plan.rows, time_of_row, self._x.clone()))

    def _rows(self, end: int) -> Iterator[int]:
        """Runs the rows before `end` and yields each when it is done.

        One loop with everything in locals: at small states its own time counts.
        """
        x, net_time, counts = self._x, self._net_time, self._counts
        inputs = x if self._net_input is None else self._net_input
        net, step, clock = self._net, self._step, time.perf_counter
        cond, evaluates, row_numbers = self._cond, self._evaluates, self._row_numbers
        guidance, registers, keys, epsilon = (
            self._guidance, self._registers, self._keys, self._epsilon,
        )  # fmt: skip
        coef, field, net_input, bad = self._coef, self._field, self._net_input, self._first_bad
        noise, cast = None, self._label_dtype if self._label_dtype != x.dtype else None
        row_inputs = self._row_inputs
        for row in range(self.row, end):
            network = uncond = None
            if evaluates[row]:
                begin = clock()
                version = inputs._version if counts else 0
                label = net_time if cast is None else net_time.to(cast)
                label_version = label._version if counts else 0
                network = net(inputs, label, **cond)
                if guidance is not None:
                    uncond = net(inputs, label, **self._null_cond)
                if not self._checked:
                    self._check_outputs(network, uncond)
                if counts and (inputs._version, label._version) != (version, label_version):
                    raise ValueError("model: the network changed its input in place")
                if inputs.requires_grad:  # it differentiated by x: the next row starts afresh
                    inputs.requires_grad_(False).grad = None
                self.seconds_network += clock() - begin
            if self._noise is not None:
                noise = self._given_noise(row)
            f, f_u, weight, z = network, uncond, guidance, noise
            try:
                if row_inputs is not None:
                    f, f_u, weight, z = row_inputs.inputs(
                        x, network, uncond, guidance, keys, row_numbers[row], noise
                    )
                step(
                    x, f, f_u, weight, registers, keys, row_numbers[row], coef, field,
                    epsilon, z, net_input, net_time, bad,
                )  # fmt: skip
            except RuntimeError as error:
                self._check_outputs(network, uncond)
                if "another view" not in str(error):
                    raise
                raise ValueError(f"model: its output does not fit: {error}") from error
            self.row = row + 1
            yield row

    def _check_outputs(self, network: object, uncond: object) -> None:
        """The first evaluation's outputs; later ones are looked at when the step refuses them."""
        inputs = self._x if self._net_input is None else self._net_input
        shape = inputs.shape if self._row_inputs is None else self._row_inputs.output_shape
        outputs = [_check_output(network, inputs, shape)]
        if self._guidance is not None:
            outputs.append(_check_output(uncond, inputs, shape))
            if outputs[0].data_ptr() == outputs[1].data_ptr():
                raise ValueError(
                    "model: both outputs under guidance are the same memory; return a new tensor "
                    "from every call"
                )
        self._checked = True

    def _given_noise(self, row: int) -> Tensor | None:
        if self._noise is None or not self._needs_noise[row]:
            return None
        z = self._noise(int(self.plan.draw[row]), int(self.plan.stream[row]))
        if not isinstance(z, Tensor) or z.shape != self._x.shape or not z.is_floating_point():
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z)
            raise ValueError(
                f"noise: expected a floating tensor of shape {tuple(self._x.shape)}, got {got}"
            )
        return z.to(self._x.device)

    def result(self) -> Tensor:
        """The samples, once every row has run.

        Raises: ValueError when rows are left, or when the network gave a value that is not finite
        (with step, time and sample), or the state became one.
        """
        if self.row < self.plan.rows:
            raise ValueError(f"result: {self.plan.rows - self.row} rows are left; call advance()")
        bad = torch.nonzero(self._first_bad >= 0).flatten()
        if len(bad):
            rows = self._first_bad[bad]
            first = int(torch.argmin(rows))
            row, sample = int(rows[first]), int(bad[first])
            step = int(np.count_nonzero(self.plan.evaluates[: row + 1]))
            raise ValueError(
                f"model: returned values that are not finite for {len(bad)} of {len(self._x)} "
                f"samples, first for sample {sample} at evaluation {step} of {self.plan.nfe} "
                f"(row {row}, t = {self.plan.time[row]:.6g})"
            )
        if not torch.isfinite(self._x).all():
            finite = torch.isfinite(self._x).reshape(len(self._x), -1).all(1)
            raise ValueError(
                f"x: the state of sample {int(torch.argmin(finite.int()))} is not finite although "
                "every network output was: they were too large, or the given noise or start was"
            )
        return self._x

    def state(self) -> dict[str, Tensor]:
        """Everything that `Sampler.resume` needs, as tensors (for torch.save or safetensors)."""
        registers = self._registers if self._registers is not None else self._x.new_zeros(0)
        return {
            "x": self._x.clone(),
            "registers": registers.clone(),
            "keys": self._keys.clone(),
            "row": torch.tensor(self.row, device="cpu"),
            "first_bad": self._first_bad.clone(),
            "given_start": torch.tensor(self._table.given_start, device="cpu"),
            "plan": self._table.fingerprint(),
        }

    def restore(self, row: int, registers: Tensor, first_bad: Tensor) -> None:
        """Puts the run before `row`, with these registers and what was noted of bad outputs."""
        held = (0,) if self._registers is None else tuple(self._registers.shape)
        if tuple(registers.shape) != held or first_bad.shape != self._first_bad.shape:
            raise ValueError(
                f"state: expected registers of shape {held} and first_bad of shape "
                f"{tuple(self._first_bad.shape)}, got {tuple(registers.shape)} and "
                f"{tuple(first_bad.shape)}"
            )
        if self._registers is not None:
            self._registers.copy_(registers)
        self._first_bad.copy_(first_bad)
        self.row = row
        if row < self.plan.rows and self._evaluates[row]:
            scale = float(self._coef[row - 1, 0, _lane(self.plan, "c_in_next")])
            label = float(self._coef[row - 1, 0, _lane(self.plan, "label_next")])
            self._net_time.fill_(label)
            if self._net_input is not None:
                self._net_input.copy_(self._x * scale)


def _check_output(out: object, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(out, Tensor) or out.shape != shape or out.dtype not in FLOATS:
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out)
        raise ValueError(f"model: expected a floating tensor of shape {tuple(shape)}, got {got}")
    if out.device != x.device:
        raise ValueError(f"model: expected its output on {x.device}, got {out.device}")
    return out


def _lane(plan: Plan, name: str) -> int:
    return 2 * (H0 + plan.registers) + TAIL_LANES.index(name)


_in_use: WeakKeyDictionary[torch.nn.Module, list[int]] = WeakKeyDictionary()
_in_use_lock = threading.Lock()


@contextmanager
def _eval_mode(net: object) -> Iterator[None]:
    """Every submodule in eval mode, and each put back as it was.

    Runs in several threads may share a module: the last one out puts it back.
    """
    modules = list(net.modules()) if isinstance(net, torch.nn.Module) else []
    with _in_use_lock:
        for module in modules:
            users = _in_use.setdefault(module, [0, int(module.training)])
            users[0] += 1
            module.training = False
    try:
        yield
    finally:
        with _in_use_lock:
            for module in modules:
                users = _in_use[module]
                users[0] -= 1
                if users[0] == 0:
                    module.training = bool(users[1])
                    del _in_use[module]


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    with tqdm(total=total, unit="row", dynamic_ncols=True) as bar:
        yield bar
