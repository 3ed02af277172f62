"""The checks of a plan's table: what does not hold together is named by field and row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sbm_fast.plan import H0, NORMS, D, F, X

if TYPE_CHECKING:
    from sbm_fast.plan import Plan

_MAX_INT32 = 2**31 - 1
_FLOAT32 = np.finfo(np.float32)
_MAX_LOG_STD = 80.0  # e^80 and its inverse are numbers of float32
_MAX_REGISTERS = 8  # kMaxRegisters of csrc/row.h: the kernels have room for no more


def check(plan: Plan) -> None:
    """See :meth:`sbm_fast.plan.Plan.check`."""
    if plan.coef.ndim != 3 or plan.coef.shape[1] != 2 or plan.coef.shape[2] < 4:
        raise ValueError(f"coef: expected [rows, 2, 4 + registers], got {plan.coef.shape}")
    if plan.registers > _MAX_REGISTERS:
        raise ValueError(f"coef: expected at most {_MAX_REGISTERS} registers, "
                         f"got {plan.registers}")  # fmt: skip
    if plan.rows < 1:
        raise ValueError("coef: a plan needs at least one row, got 0")
    for name, trailing in plan.TRAILING.items():
        shape = getattr(plan, name).shape
        if shape != (plan.rows, *trailing):
            raise ValueError(f"{name}: expected shape {(plan.rows, *trailing)}, got {shape}")
    _check_values(plan)
    _check_start_rows(plan)
    _check_evaluations(plan)
    _check_registers(plan)
    _check_langevin(plan)
    _check_row_inputs(plan)


def _check_values(plan: Plan) -> None:
    timeless = ~plan.evaluates
    finite = {
        "coef": np.isfinite(plan.coef).all(axis=(1, 2)),
        "denoiser": np.isfinite(plan.denoiser[:, :2]).all(axis=1) & (plan.denoiser[:, 2] > 0),
        "time": np.isfinite(plan.time) | timeless,
        "langevin": np.isfinite(plan.langevin).all(axis=1),
        "marginal": np.isfinite(plan.marginal).all(axis=1),
        "log_std": np.isfinite(plan.log_std).all(axis=1),
    }
    for name in ("label", "c_in", "guidance"):
        finite[name] = np.isfinite(getattr(plan, name))
    for name, good in finite.items():
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(
                f"{name}: row {row} must be finite (and L > 0), got {getattr(plan, name)[row]}"
            )
    ranges = {
        "slot": (-1, plan.registers - 1),
        "stream": (0, _MAX_INT32),
        "draw": (0, _MAX_INT32),
        "norm": (0, len(NORMS) - 1),
    }
    for name, (low, high) in ranges.items():
        values = getattr(plan, name)
        bad = (values < low) | (values > high)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"{name}: row {row} must be in [{low}, {high}], got {values[row]}")
    if not (np.isfinite(plan.start_scale) and plan.start_scale > 0):
        raise ValueError(f"start_scale: expected a positive number, got {plan.start_scale}")


def _check_start_rows(plan: Plan) -> None:
    start = int(np.argmax(plan.evaluates)) if plan.evaluates.any() else plan.rows
    if not 1 <= start <= 2:
        raise ValueError(
            f"evaluates: a plan begins with one or two rows without evaluation, got {start}"
        )
    if not plan.evaluates[start:].all():
        row = start + int(np.argmin(plan.evaluates[start:]))
        raise ValueError(f"evaluates: row {row} lacks an evaluation; only start rows may")
    if np.any(plan.coef[:start, :, (F, D)]):
        raise ValueError("coef: a start row reads F or D, but no network was evaluated")


def _check_evaluations(plan: Plan) -> None:
    held = {
        "c_in": (
            (plan.c_in != 0) | ~plan.evaluates,
            "an evaluating row needs a value that is not 0",
        ),
        "marginal": (plan.marginal[:, 1] >= 0, "σ must not be negative"),
    }
    for name, (good, need) in held.items():
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(f"{name}: row {row}: {need}, got {getattr(plan, name)[row]}")


def _check_registers(plan: Plan) -> None:
    written: set[int] = set()
    reads = (plan.coef[:, :, H0:] != 0).any(axis=1)
    writes = (plan.coef[:, 1] != 0).any(axis=1)
    for row in range(plan.rows):
        for k in np.flatnonzero(reads[row]):
            if int(k) not in written:
                raise ValueError(f"coef: row {row} reads register H{k} before it is written")
        slot = int(plan.slot[row])
        if slot >= 0:
            written.add(slot)
        elif writes[row]:
            raise ValueError(f"slot: row {row} has write coefficients but slot −1")


def _check_langevin(plan: Plan) -> None:
    for row in np.flatnonzero(plan.norm):
        plain = np.zeros_like(plan.coef[row])
        plain[0, X] = 1.0
        if not np.array_equal(plan.coef[row], plain) or plan.slot[row] >= 0:
            raise ValueError(f"coef: Langevin row {row} must be 1 on x, 0 elsewhere, no write")
        if not (plan.langevin[row, 0] > 0 and plan.evaluates[row]):
            raise ValueError(
                f"langevin: row {row} has norm {NORMS[plan.norm[row]]!r} and needs an "
                f"evaluation and a step scale > 0, got {plan.langevin[row, 0]}"
            )


def _check_row_inputs(plan: Plan) -> None:
    quantile, least, most = plan.threshold.T
    wanted = plan.threshold.any(axis=1)
    sound = (quantile > 0) & (quantile <= 1) & _in_float32(least) & (least <= most)
    sound &= plan.evaluates & np.isposinf(plan.denoiser[:, 2])
    divides = ~wanted | _in_float32(np.abs(plan.denoiser[:, 1]))
    small = (np.abs(plan.log_std) < _MAX_LOG_STD).all(axis=1)
    learned = plan.log_std.any(axis=1)
    for name, good, need in (
        ("threshold", sound | ~wanted, "an evaluation, L = ∞, 0 < quantile ≤ 1 and "
         "0 < minimum ≤ maximum (and minimum a positive number of float32)"),
        ("denoiser", divides, "for its threshold a q that is neither 0 nor ∞ in float32"),
        ("log_std", small, f"|log_std| < {_MAX_LOG_STD:g}"),
        ("log_std", (plan.evaluates & (plan.norm == 0)) | ~learned,
         "an evaluation and norm 'none'"),
    ):  # fmt: skip
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(f"{name}: row {row} needs {need}, got {getattr(plan, name)[row]}")


def _in_float32(value: np.ndarray) -> np.ndarray:
    """Whether positive values are normal numbers of float32 (what is less may be flushed to 0)."""
    return (value >= float(_FLOAT32.tiny)) & (value <= float(_FLOAT32.max))
