"""The plan: a sampler as a table with one row per network evaluation.

A row maps the state x, the network's output F at that state, fresh noise z and K registers H_k to

    x'   = a x + b F + c D + d z + Σ_k h_k H_k          (output 0, the new state)
    H_s  = a x + b F + c D + d z + Σ_k h_k H_k          (output 1, written to register s = ``slot``)
    D    = clamp(p x + q F, ±L)

A row reads everything before it writes. The first one or two rows are start rows: they evaluate no
network (prior noise or a given start; and noise that a method adds before its first evaluation).
Everything is float64 on the host; :meth:`Plan.pack` gives the table that the kernels read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch import device as torch_device
    from torch import dtype as torch_dtype

    Array = NDArray[np.float64]
    IntArray = NDArray[np.int64]

X, F, D, Z, H0 = range(5)
"""Columns of ``Plan.coef``: state, network output, denoised estimate, noise, first register."""

SOURCES = ("x", "F", "D", "z")
NORMS = ("none", "batch_mean", "per_sample", "sqrt_d")
"""Values of ``Plan.norm``: how a Langevin row finds its step size (0: an ordinary row)."""

TAIL_LANES = ("p", "q", "L", "c_in_next", "label_next", "guidance", "eps_scale", "p_s", "q_s")
"""Lanes of :meth:`Plan.pack` behind the 2·(4 + K) coefficients."""

FIELD_LANES = ("slot", "stream", "draw", "norm")
"""Lanes of the integer table of :meth:`Plan.pack`."""

_FORMAT = 1
_MAX_INT32 = 2**31 - 1
_MAX_REGISTERS = 8  # kMaxRegisters of csrc/row.h: the kernels have room for no more


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler written out: R rows, K registers. Immutable; checked when it is made.

    Attributes:
        method: name of the method that wrote the table.
        description: what it was made for (SDE, prediction, options), for printing and saving.
        coef: [R, 2, 4 + K] outputs {x', register write} × sources {x, F, D, z, H_0 … H_{K-1}}.
            A coefficient 0 means that the source is not read (0·NaN never happens).
        slot: [R] register that the row writes, −1 none.
        denoiser: [R, 3] p, q, L of D = clamp(p x + q F, ±L); L = inf does not clamp.
        time: [R] time of the evaluation under the run's SDE, NaN for start rows.
        label: [R] what the network gets as its time input, 0 for start rows.
        c_in: [R] the network's input is c_in · x, 0 for start rows.
        evaluates: [R] whether the row evaluates the network at its x (before the update).
        stream, draw: [R] which noise z is (see ``sbm_fast.noise``).
        guidance: [R] factor on (w − 1) where classifier-free guidance is used.
        norm: [R] index into :data:`NORMS`. A row ≠ 0 is x' = x + ε s + √(2ε) z with a step size ε
            that depends on the data; its coef is 1 on x and 0 elsewhere.
        langevin: [R, 3] (2 α r², p_s, q_s): ε = langevin[0]·(‖z‖ / ‖s‖)², s = p_s x + q_s F.
        marginal: [R, 2] (m, σ) of the evaluated state in the state's coordinate,
            x = m x_0 + σ ε; (1, 0) for start rows. Used for moments, previews and κ.
        start_scale: the state is start_scale · x_init (1, or 1/m when the state is x/m).

    Raises:
        ValueError: naming the field that does not hold together (:meth:`check`).
        TypeError: naming the field that holds another kind of value.
    """

    method: str
    description: dict[str, str | float | int]
    coef: Array
    slot: IntArray
    denoiser: Array
    time: Array
    label: Array
    c_in: Array
    evaluates: NDArray[np.bool_]
    stream: IntArray
    draw: IntArray
    guidance: Array
    norm: IntArray
    langevin: Array
    marginal: Array
    start_scale: float = 1.0

    _TRAILING: ClassVar[dict[str, tuple[int, ...]]] = {
        "slot": (),
        "denoiser": (3,),
        "time": (),
        "label": (),
        "c_in": (),
        "evaluates": (),
        "stream": (),
        "draw": (),
        "guidance": (),
        "norm": (),
        "langevin": (3,),
        "marginal": (2,),
    }
    _INTEGER: ClassVar[tuple[str, ...]] = ("slot", "stream", "draw", "norm")

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[type | tuple[type, ...], str]] = {
            "method": (str, "a str"),
            "description": (Mapping, "a dict"),
            "start_scale": ((int, float, np.integer, np.floating), "a positive number"),
        }
        for name, (kind, expected) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
        for name in ("coef", *self._TRAILING):
            array = self._converted(name, getattr(self, name))
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "description", dict(self.description))
        object.__setattr__(self, "start_scale", float(self.start_scale))
        self.check()

    def _converted(self, name: str, value: Any) -> NDArray[Any]:
        """A copy of the values as the field holds them; an error rather than a silent rounding."""
        kind: Any = np.float64
        expected, kinds = "real numbers", "iuf"
        if name in self._INTEGER:
            kind, expected = np.int64, "integers"
        elif name == "evaluates":
            kind, expected, kinds = np.bool_, "booleans", "b"
        try:
            given = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: expected an array of {expected} ({error})") from error
        if given.dtype.kind not in kinds:
            raise TypeError(f"{name}: expected {expected}, got an array of {given.dtype}")
        with np.errstate(invalid="ignore", over="ignore"):
            array = np.array(given, dtype=kind, order="C")
        if name in self._INTEGER and not np.array_equal(array, given):
            wrong = given[array != given].flat[0]
            raise ValueError(f"{name}: expected integers, got {wrong}")
        return array

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return int(self.coef.shape[0])

    @property
    def registers(self) -> int:
        """Number of registers K."""
        return int(self.coef.shape[2]) - 4

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return int(self.evaluates.sum())

    def check(self) -> None:
        """Raise ValueError, naming the field, unless the table holds together.

        Shapes and finiteness; one or two start rows, at the start only, that read neither network
        nor registers; every register written before it is read; Langevin rows in their own form.
        """
        if self.coef.ndim != 3 or self.coef.shape[1] != 2 or self.coef.shape[2] < 4:
            raise ValueError(f"coef: expected [rows, 2, 4 + registers], got {self.coef.shape}")
        if self.registers > _MAX_REGISTERS:
            raise ValueError(f"coef: expected at most {_MAX_REGISTERS} registers, "
                             f"got {self.registers}")  # fmt: skip
        if self.rows < 1:
            raise ValueError("coef: a plan needs at least one row, got 0")
        for name, trailing in self._TRAILING.items():
            shape = getattr(self, name).shape
            if shape != (self.rows, *trailing):
                raise ValueError(f"{name}: expected shape {(self.rows, *trailing)}, got {shape}")
        self._check_values()
        self._check_start_rows()
        self._check_evaluations()
        self._check_registers()
        self._check_langevin()

    def _check_values(self) -> None:
        timeless = ~self.evaluates
        finite = {
            "coef": np.isfinite(self.coef).all(axis=(1, 2)),
            "denoiser": np.isfinite(self.denoiser[:, :2]).all(axis=1) & (self.denoiser[:, 2] > 0),
            "time": np.isfinite(self.time) | timeless,
            "langevin": np.isfinite(self.langevin).all(axis=1),
            "marginal": np.isfinite(self.marginal).all(axis=1),
        }
        for name in ("label", "c_in", "guidance"):
            finite[name] = np.isfinite(getattr(self, name))
        for name, good in finite.items():
            if not good.all():
                row = int(np.argmin(good))
                raise ValueError(
                    f"{name}: row {row} must be finite (and L > 0), got {getattr(self, name)[row]}"
                )
        ranges = {
            "slot": (-1, self.registers - 1),
            "stream": (0, _MAX_INT32),
            "draw": (0, _MAX_INT32),
            "norm": (0, len(NORMS) - 1),
        }
        for name, (low, high) in ranges.items():
            values = getattr(self, name)
            bad = (values < low) | (values > high)
            if bad.any():
                row = int(np.argmax(bad))
                raise ValueError(f"{name}: row {row} must be in [{low}, {high}], got {values[row]}")
        if not (np.isfinite(self.start_scale) and self.start_scale > 0):
            raise ValueError(f"start_scale: expected a positive number, got {self.start_scale}")

    def _check_start_rows(self) -> None:
        start = int(np.argmax(self.evaluates)) if self.evaluates.any() else self.rows
        if not 1 <= start <= 2:
            raise ValueError(
                f"evaluates: a plan begins with one or two rows without evaluation, got {start}"
            )
        if not self.evaluates[start:].all():
            row = start + int(np.argmin(self.evaluates[start:]))
            raise ValueError(f"evaluates: row {row} lacks an evaluation; only start rows may")
        if np.any(self.coef[:start, :, (F, D)]):
            raise ValueError("coef: a start row reads F or D, but no network was evaluated")

    def _check_evaluations(self) -> None:
        held = {
            "c_in": (
                (self.c_in != 0) | ~self.evaluates,
                "an evaluating row needs a value that is not 0",
            ),
            "marginal": (self.marginal[:, 1] >= 0, "σ must not be negative"),
        }
        for name, (good, need) in held.items():
            if not good.all():
                row = int(np.argmin(good))
                raise ValueError(f"{name}: row {row}: {need}, got {getattr(self, name)[row]}")

    def _check_registers(self) -> None:
        written: set[int] = set()
        reads = (self.coef[:, :, H0:] != 0).any(axis=1)
        writes = (self.coef[:, 1] != 0).any(axis=1)
        for row in range(self.rows):
            for k in np.flatnonzero(reads[row]):
                if int(k) not in written:
                    raise ValueError(f"coef: row {row} reads register H{k} before it is written")
            slot = int(self.slot[row])
            if slot >= 0:
                written.add(slot)
            elif writes[row]:
                raise ValueError(f"slot: row {row} has write coefficients but slot −1")

    def _check_langevin(self) -> None:
        for row in np.flatnonzero(self.norm):
            plain = np.zeros_like(self.coef[row])
            plain[0, X] = 1.0
            if not np.array_equal(self.coef[row], plain) or self.slot[row] >= 0:
                raise ValueError(f"coef: Langevin row {row} must be 1 on x, 0 elsewhere, no write")
            if not (self.langevin[row, 0] > 0 and self.evaluates[row]):
                raise ValueError(
                    f"langevin: row {row} has norm {NORMS[self.norm[row]]!r} and needs an "
                    f"evaluation and a step scale > 0, got {self.langevin[row, 0]}"
                )

    def gaussian(
        self, data_mean: float, data_std: float, *, start: tuple[float, float] | None = None
    ) -> tuple[Array, Array]:
        """Mean and standard deviation [R] of x after each row, exactly, for Gaussian data.

        The data are N(data_mean, data_std²) per coordinate and the network is perfect. ``start`` is
        the (mean, std) of the given start for plans that begin from one.

        Raises:
            ValueError: for plans with data-dependent Langevin norms or clamped rows (not affine),
                with noise that is used twice, or with a given start of unknown law.
        """
        from sbm_fast import plan_moments  # it imports the columns from here

        return plan_moments.gaussian(self, data_mean, data_std, start)

    @cached_property
    def kappa(self) -> Array:
        """[R] cancellation κ = Σ_j |c_j| rms(v_j) / rms(x') of each row.

        Taken from Gaussian data with mean 0 and std ½. The relative error of the network's
        dtype, times κ, is what arrives in x'.
        """
        from sbm_fast import plan_moments

        return plan_moments.kappa(self)

    def pack(self, dtype: torch_dtype, device: torch_device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The table as the kernels read it.

        Returns:
            coef: [R, 2, 2(4 + K) + 9] in ``dtype``: [:, 0] the rounded value, [:, 1] what rounding
                lost (0 where the value is not finite). Lanes: sources of x', sources of the
                register write, then :data:`TAIL_LANES`. ``c_in_next`` and ``label_next`` belong to
                the next row's evaluation, 0 where there is none.
            field: int32 [R, 4], lanes :data:`FIELD_LANES`.

        Raises:
            ValueError: when dtype is neither torch.float32 nor torch.float64.
        """
        import torch

        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        after = np.zeros((self.rows, 2))
        after[:-1, 0] = self.c_in[1:]
        after[:-1, 1] = self.label[1:]
        tail = (self.denoiser, after, self.guidance[:, None], self.langevin)
        value = np.concatenate([self.coef[:, 0], self.coef[:, 1], *tail], axis=1)
        kind = np.float32 if dtype == torch.float32 else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            high = value.astype(kind)
            low = np.where(np.isfinite(high), value - high, 0.0).astype(kind)
        field = np.stack([getattr(self, name) for name in FIELD_LANES], axis=1).astype(np.int32)
        coef = torch.from_numpy(np.stack([high, low], axis=1))
        return coef.to(device), torch.from_numpy(field).to(device)

    def difference(self, other: Plan) -> str:
        """The first difference from another plan in words, "" when the tables are equal.

        Compares what runs (all arrays and start_scale), not method name and description.
        """
        if not isinstance(other, Plan):
            raise TypeError(f"other: expected a Plan, got {type(other).__name__}")
        if self.coef.shape != other.coef.shape:
            return f"coef: shape {self.coef.shape} != {other.coef.shape}"
        first: tuple[int, str] | None = None
        for name in ("coef", *self._TRAILING):
            mine, theirs = getattr(self, name), getattr(other, name)
            unequal = (mine != theirs) & ~((mine != mine) & (theirs != theirs))
            if unequal.any():
                at = tuple(int(i) for i in np.argwhere(unequal)[0])
                if first is None or at[0] < first[0]:
                    first = at[0], f"{self._where(name, at)}: {mine[at]!r} != {theirs[at]!r}"
        if first is not None:
            return first[1]
        if self.start_scale != other.start_scale:
            return f"start_scale: {self.start_scale!r} != {other.start_scale!r}"
        return ""

    def _where(self, name: str, at: tuple[int, ...]) -> str:
        if name == "coef":
            source = SOURCES[at[2]] if at[2] < H0 else f"H{at[2] - H0}"
            return f"row {at[0]}, coef[{('next x', 'write')[at[1]]}, {source}]"
        return f"row {at[0]}, {name}" + (f"[{at[1]}]" if len(at) > 1 else "")

    def __str__(self) -> str:
        names = [*SOURCES, *(f"H{k}" for k in range(self.registers))]
        about = ", ".join(f"{key}={value}" for key, value in self.description.items())
        lines = [
            f"Plan {self.method}: {self.rows} rows, {self.nfe} network evaluations, "
            f"{self.registers} registers",
            f"  {about}",
            f"  {'row':>5} {'time':>10} {'label':>10}  update",
        ]
        shown = range(self.rows)
        head, tail = (list(shown), []) if self.rows <= 12 else (list(shown[:6]), list(shown[-5:]))
        lines += [self._line(row, names) for row in head]
        if tail:
            lines.append(f"  … {self.rows - len(head) - len(tail)} rows …")
            lines += [self._line(row, names) for row in tail]
        return "\n".join(lines)

    def _line(self, row: int, names: list[str]) -> str:
        def combination(output: int) -> str:
            pairs = zip(self.coef[row, output], names, strict=True)
            terms = [f"{value:+.6g} {name}" for value, name in pairs if value != 0]
            return " ".join(terms) or "0"

        text = f"x' = {combination(0)}"
        if self.norm[row]:
            text += f" + ε s + √(2ε) z, ε = {self.langevin[row, 0]:.6g} (‖z‖/‖s‖)²"
            text += f" [{NORMS[self.norm[row]]}]"
        if self.slot[row] >= 0:
            text += f" ; H{self.slot[row]} = {combination(1)}"
        if np.isfinite(self.denoiser[row, 2]) and self.coef[row, :, D].any():
            text += f" ; |D| ≤ {self.denoiser[row, 2]:g}"
        if self.evaluates[row]:
            return f"  {row:>5} {self.time[row]:>10.6g} {self.label[row]:>10.6g}  {text}"
        return f"  {row:>5} {'start':>10} {'':>10}  {text}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to an .npz file (no pickles) at exactly ``path``."""
        header = {
            "format": _FORMAT,
            "method": self.method,
            "description": self.description,
            "start_scale": self.start_scale,
        }
        arrays = {name: getattr(self, name) for name in ("coef", *self._TRAILING)}
        with open(path, "wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by :meth:`save`; the table is checked again.

        Raises:
            ValueError: naming ``path`` when the file is no plan, of another format, or holds a
                table that fails the check.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {name: file[name] for name in ("coef", *cls._TRAILING)}
            found = header.pop("format")
            known = {field.name for field in fields(cls)} - set(arrays)
            if found != _FORMAT or set(header) != known:
                raise ValueError(f"format {found!r}, this version reads {_FORMAT}")
            return cls(**header, **arrays)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"path: {os.fspath(path)!r} is not a saved plan ({error})") from error
