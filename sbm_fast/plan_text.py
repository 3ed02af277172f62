"""Plans in words: printing, and the first difference of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sbm_fast.plan import H0, NORMS, SOURCES, D, Plan

if TYPE_CHECKING:
    from sbm_fast.plan import Array

_SHOWN, _HEAD, _TAIL = 12, 6, 5


def text(plan: Plan) -> str:
    """What ``print(plan)`` shows: a long table by its ends."""
    names = [*SOURCES, *(f"H{k}" for k in range(plan.registers))]
    about = ", ".join(f"{key}={value}" for key, value in plan.description.items())
    lines = [
        f"Plan {plan.method}: {plan.rows} rows, {plan.nfe} network evaluations, "
        f"{plan.registers} registers",
        f"  {about}",
        f"  {'row':>5} {'time':>10} {'label':>10}  update",
    ]
    shown = range(plan.rows)
    short = plan.rows <= _SHOWN
    head, tail = (shown, shown[:0]) if short else (shown[:_HEAD], shown[-_TAIL:])
    lines += [_line(plan, row, names) for row in head]
    if tail:
        lines.append(f"  … {plan.rows - len(head) - len(tail)} rows …")
        lines += [_line(plan, row, names) for row in tail]
    return "\n".join(lines)


def difference(plan: Plan, other: object) -> str:
    """See :meth:`sbm_fast.plan.Plan.difference`."""
    if not isinstance(other, Plan):
        raise TypeError(f"other: expected a Plan, got {type(other).__name__}")
    if plan.coef.shape != other.coef.shape:
        return f"coef: shape {plan.coef.shape} != {other.coef.shape}"
    first: tuple[int, str] | None = None
    for name in plan.arrays():
        mine, theirs = getattr(plan, name), getattr(other, name)
        unequal = (mine != theirs) & ~((mine != mine) & (theirs != theirs))
        if unequal.any():
            at = tuple(int(i) for i in np.argwhere(unequal)[0])
            if first is None or at[0] < first[0]:
                first = at[0], f"{_where(name, at)}: {mine[at]!r} != {theirs[at]!r}"
    if first is not None:
        return first[1]
    if plan.start_scale != other.start_scale:
        return f"start_scale: {plan.start_scale!r} != {other.start_scale!r}"
    return ""


def _where(name: str, at: tuple[int, ...]) -> str:
    if name == "coef":
        source = SOURCES[at[2]] if at[2] < H0 else f"H{at[2] - H0}"
        return f"row {at[0]}, coef[{('next x', 'write')[at[1]]}, {source}]"
    return f"row {at[0]}, {name}" + (f"[{at[1]}]" if len(at) > 1 else "")


def _combination(weights: Array, names: list[str]) -> str:
    pairs = zip(weights, names, strict=True)
    return " ".join(f"{value:+.6g} {name}" for value, name in pairs if value != 0) or "0"


def _line(plan: Plan, row: int, names: list[str]) -> str:
    line = f"x' = {_combination(plan.coef[row, 0], names)}"
    if plan.norm[row]:
        line += f" + ε s + √(2ε) z, ε = {plan.langevin[row, 0]:.6g} (‖z‖/‖s‖)²"
        line += f" [{NORMS[plan.norm[row]]}]"
    if plan.slot[row] >= 0:
        line += f" ; H{plan.slot[row]} = {_combination(plan.coef[row, 1], names)}"
    if np.isfinite(plan.denoiser[row, 2]) and plan.coef[row, :, D].any():
        line += f" ; |D| ≤ {plan.denoiser[row, 2]:g}"
    if plan.log_std[row].any():
        low, high = np.exp(plan.log_std[row])
        line += f" ; z of std {low:.6g} … {high:.6g}"
    if plan.threshold[row, 0]:
        quantile, least, most = plan.threshold[row]
        line += f" ; |D| ≤ s, D/s, s = quantile {quantile:g} in [{least:g}, {most:g}]"
    if plan.evaluates[row]:
        return f"  {row:>5} {plan.time[row]:>10.6g} {plan.label[row]:>10.6g}  {line}"
    return f"  {row:>5} {'start':>10} {'':>10}  {line}"
