"""One run of a plan: network, step, network, step … with everything allocated before."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sbm_fast.module_state import eval_mode
from sbm_fast.nn.conv import packed
from sbm_fast.nn.network import CHUNK, Prepared, can_be_prepared
from sbm_fast.plan import H0, NORMS, TAIL_LANES, Plan, Z
from sbm_fast.row_inputs import RowInputs
from sbm_fast.row_step import (
    INPUT_CHANGED,
    OTHER_VIEW,
    REFUSALS,
    Memory,
    RowStep,
    check_outputs,
    kind,
    readable,
)

if TYPE_CHECKING:
    from sbm_fast.capture import Capture
    from sbm_fast.sampler import Sampler

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

    @property
    def coupled(self) -> bool:
        """Whether a row couples the samples of a batch."""
        return bool((self.plan.norm == NORMS.index("batch_mean")).any())


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
        capture: Capture | None = None,
    ) -> None:
        plan, model = table.plan, sampler.model
        self.plan, self.seed, self.row = plan, seed, 0
        self.seconds_network = 0.0
        self.memory = Memory.of(plan, x, keys, guidance, sampler.net_dtype)
        self.cond, self.null_cond = cond, dict(model.null_cond or {})
        self.net, self.kernels = model.net, sampler.kernels
        self._model, self._table, self._noise, self._capture = model, table, noise, capture
        # Embeddings of time are made in float32 by every network that is not float64 itself.
        wide = sampler.net_dtype == torch.float64
        self._label_dtype = torch.float64 if wide else torch.float32
        self._checked = self._running = False
        self._row_inputs = None if capture else self._make_row_inputs(x)
        # A kernel refuses what it can't read; plain torch would broadcast or convert it.
        self._refuses = sampler.kernels.name != "eager" and self._row_inputs is None
        self._evaluates, self._step = plan.evaluates.tolist(), _bare(sampler.kernels.affine_step_)
        # Rows without a norm are called without: on a GPU that spares a launch.
        self._epsilons = [self.memory.epsilon if norm else None for norm in plan.norm]
        if self.memory.workspace is not None:  # on a GPU: see `affine_step_`
            workspace = {"workspace": self.memory.workspace, "coupled": table.coupled}
            self._step = partial(self._step, **workspace)
        self._needs_noise = ((plan.coef[:, :, Z] != 0).any(axis=1) | (plan.norm != 0)).tolist()

    def _make_row_inputs(self, x: Tensor) -> RowInputs | None:
        return RowInputs.of(self.plan, self._model, self.kernels.affine_step_, x)

    def row_step(
        self, memory: Memory, row: Tensor, cond: dict[str, Any], null_cond: dict[str, Any]
    ) -> RowStep:
        """This run's rows over another memory."""
        by_row = self._by_row(0, self.plan.rows)
        return RowStep(
            net=self.net if by_row is None else by_row,
            by_row=by_row is not None,
            affine_step_=self.kernels.affine_step_,
            coef=self._table.coef,
            field=self._table.field,
            coupled=self._table.coupled,
            row_inputs=self._make_row_inputs(memory.x),
            label_dtype=self._label_dtype,
            memory=memory,
            row=row,
            cond=cond,
            null_cond=null_cond,
        )

    def _by_row(self, begin: int, end: int) -> Prepared | None:
        """The network with the time of these rows done, where it is one that can be prepared.

        Made anew at every advance: the weights may have changed since the last one.
        """
        if not can_be_prepared(self.net):
            return None
        label = torch.tensor(self.plan.label[begin:end])
        return self.net.prepare(label.to(self.memory.x.device, self._label_dtype))

    @property
    def x(self) -> Tensor:
        """A copy of the present state, in the plan's coordinate."""
        return self.memory.x.clone()

    @property
    def given_start(self) -> bool:
        """Whether it began from an x_init."""
        return self._table.given_start

    @property
    def nfe(self) -> int:
        """Network evaluations so far."""
        done = int(np.count_nonzero(self.plan.evaluates[: self.row]))
        return done if self.memory.guidance is None else 2 * done

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
        if self.memory.x.numel() == 0 or end == self.row:
            self.row = end
            return self
        self._running = True
        try:
            self._go(end, progress, callback)
        finally:
            self._running = False
        return self

    def _go(self, end: int, progress: bool, callback: Callable[[Step], None] | None) -> None:
        rows = self._rows(end) if self._capture is None else self._capture.rows(self, end)
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.net))
            stack.enter_context(packed(self.net))
            bar = stack.enter_context(_bar(end - self.row, progress))
            for row in stack.enter_context(closing(rows)):
                if bar is not None:
                    bar.update()
                if callback is not None:
                    time_of_row = float(self.plan.time[row])
                    callback(Step(row, self.plan.rows, time_of_row, self.x))

    def _rows(self, end: int) -> Generator[int, None, None]:
        """Runs the rows before `end` and yields each when it is done.

        One loop with everything in locals: at small states its own time counts. `RowStep` is the
        same row for those who can't look at each.
        """
        m, table, net, clock = self.memory, self._table, self.net, time.perf_counter
        x, inputs, net_time, net_input, bad = m.x, m.inputs, m.net_time, m.net_input, m.first_bad
        guidance, registers, keys = m.guidance, m.registers, m.keys
        coef, field, row_numbers = table.coef, table.field, table.row_numbers
        cond, null_cond, row_inputs = self.cond, self.null_cond, self._row_inputs
        first = self.row // CHUNK * CHUNK
        by_row = self._by_row(first, end)
        net = net if by_row is None else by_row
        evaluates, epsilons, step = self._evaluates, self._epsilons, self._step
        counts = not x.is_inference()  # inference tensors have no version counter
        noise, cast = None, self._label_dtype if self._label_dtype != x.dtype else None
        for row in range(self.row, end):
            network = uncond = None
            if evaluates[row]:
                begin = clock()
                version = inputs._version if counts else 0
                if by_row is None:
                    label = net_time if cast is None else net_time.to(cast)
                else:
                    label = row_numbers[row - first]
                label_version = label._version if counts else 0
                network = net(inputs, label, **cond)
                if guidance is not None:
                    uncond = net(inputs, label, **null_cond)
                if not self._checked:
                    self._check_outputs(network, uncond)
                if counts and (inputs._version, label._version) != (version, label_version):
                    raise ValueError(INPUT_CHANGED)
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
                    epsilons[row], z, net_input, net_time, bad,
                )  # fmt: skip
            except REFUSALS as error:
                if evaluates[row]:
                    self._check_outputs(network, uncond)
                if OTHER_VIEW not in str(error):
                    raise
                raise ValueError(f"model: its output does not fit: {error}") from error
            self.row = row + 1
            yield row

    def _check_outputs(self, network: object, uncond: object) -> None:
        """Every evaluation's outputs, or, where the step refuses bad ones, the first's and those
        that it has refused."""
        m = self.memory
        outputs = [network] if m.guidance is None else [network, uncond]
        check_outputs(outputs, m.inputs, self._row_inputs)
        self._checked = self._refuses

    def _given_noise(self, row: int) -> Tensor | None:
        if self._noise is None or not self._needs_noise[row]:
            return None
        at, x = (int(self.plan.draw[row]), int(self.plan.stream[row])), self.memory.x
        z = self._noise(*at)
        if not readable(z, tuple(x.shape)):
            raise ValueError(
                f"noise: expected a floating tensor of shape {tuple(x.shape)} at (draw, stream) = "
                f"{at}, got {kind(z)}"
            )
        if not torch.isfinite(z.to(x.dtype)).all():
            raise ValueError(
                f"noise: expected values that are finite in {x.dtype} at (draw, stream) = {at}, "
                "got others"
            )
        return z.to(x.device)

    def result(self) -> Tensor:
        """The samples, once every row has run.

        Raises: ValueError when rows are left, or when a network output, or what the row made of it
        (guidance, threshold, learned variance), was not finite (with step, time and sample), or
        the state became so.
        """
        if self.row < self.plan.rows:
            raise ValueError(f"result: {self.plan.rows - self.row} rows are left; call advance()")
        x, first_bad = self.memory.x, self.memory.first_bad
        bad = torch.nonzero(first_bad >= 0).flatten()
        if len(bad):
            rows = first_bad[bad]
            first = int(torch.argmin(rows))
            row, sample = int(rows[first]), int(bad[first])
            step = int(np.count_nonzero(self.plan.evaluates[: row + 1]))
            raise ValueError(
                "model: its outputs, or what the row made of them, are not finite for "
                f"{len(bad)} of {len(x)} samples, first for sample {sample} at evaluation {step} "
                f"of {self.plan.nfe} (row {row}, t = {self.plan.time[row]:.6g})"
            )
        if not torch.isfinite(x).all():
            finite = torch.isfinite(x).reshape(len(x), -1).all(1)
            raise ValueError(
                f"x: the state of sample {int(torch.argmin(finite.int()))} is not finite although "
                "every network output was: they were too large, or the given noise or start was"
            )
        return x.clone() if self._running else x  # a callback may see a graph's memory

    def state(self) -> dict[str, Tensor]:
        """Everything that `Sampler.resume` needs, as tensors (for torch.save or safetensors)."""
        m = self.memory
        none = m.x.new_zeros(0)
        registers = none if m.registers is None else m.registers
        guidance = none if m.guidance is None else m.guidance
        return {
            "x": m.x.clone(),
            "registers": registers.clone(),
            "keys": m.keys.clone(),
            "guidance": guidance.clone(),
            "row": torch.tensor(self.row, device="cpu"),
            "first_bad": m.first_bad.clone(),
            "given_start": torch.tensor(self.given_start, device="cpu"),
            "plan": self._table.fingerprint(),
        }

    def restore(self, row: int, registers: Tensor, first_bad: Tensor) -> None:
        """Puts the run before `row`, with these registers and what was noted of bad outputs."""
        m = self.memory
        held = (0,) if m.registers is None else tuple(m.registers.shape)
        if tuple(registers.shape) != held or first_bad.shape != m.first_bad.shape:
            raise ValueError(
                f"state: expected registers of shape {held} and first_bad of shape "
                f"{tuple(m.first_bad.shape)}, got {tuple(registers.shape)} and "
                f"{tuple(first_bad.shape)}"
            )
        if m.registers is not None:
            m.registers.copy_(registers)
        m.first_bad.copy_(first_bad)
        self.row = row
        if row < self.plan.rows and self.plan.evaluates[row]:
            before = self._table.coef[row - 1, 0]
            m.net_time.fill_(float(before[_lane(self.plan, "label_next")]))
            if m.net_input is not None:
                m.net_input.copy_(m.x * float(before[_lane(self.plan, "c_in_next")]))


def _lane(plan: Plan, name: str) -> int:
    return 2 * (H0 + plan.registers) + TAIL_LANES.index(name)


def _bare(op: Callable[..., None]) -> Callable[..., None]:
    """A torch op without the Python frame around it, a microsecond of a small state's row."""
    return op.op if isinstance(op, torch._ops.OpOverload) else op


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    with tqdm(total=total, unit="row", dynamic_ncols=True) as bar:
        yield bar
