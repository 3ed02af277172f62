"""Moments of a plan for Gaussian data, in closed form: exact laws, and the cancellation κ.

For data N(μ, s²) and x = m x_0 + σ ε the perfect denoiser is affine,
D*(x) = A x + B with A = m s² / (m² s² + σ²) and B = μ σ² / (m² s² + σ²),
so every row of a plan without clamps and data-dependent norms is an affine map of (x, H_0 …).
The law is carried as mean and factor J (covariance J Jᵀ): where the state shrinks by orders of
magnitude, as under the VE SDE, the covariance itself would lose the digits that J keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sbm_fast.plan import H0, D, F, X, Z

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sbm_fast.plan import Plan

    Array = NDArray[np.float64]

_KAPPA_DATA_STD = 0.5
_MAX_COLUMNS = 64


class _Row(NamedTuple):
    """What one row read and made: coefficients on the sources, their rms, moments of x'."""

    coef: Array
    rms: Array
    mean: float
    std: float


def gaussian(
    plan: Plan, data_mean: float, data_std: float, start: tuple[float, float] | None
) -> tuple[Array, Array]:
    """See :meth:`sbm_fast.plan.Plan.gaussian`."""
    if not (np.isfinite(data_mean) and np.isfinite(data_std) and data_std >= 0):
        raise ValueError(
            f"data_mean, data_std: expected finite numbers, std ≥ 0, got {data_mean}, {data_std}"
        )
    if plan.norm.any():
        row = int(np.argmax(plan.norm != 0))
        raise ValueError(f"norm: row {row} has a data-dependent step size, no affine map")
    clamped = (plan.coef[:, :, D] != 0).any(axis=1) & np.isfinite(plan.denoiser[:, 2])
    if clamped.any():
        raise ValueError(f"denoiser: row {int(np.argmax(clamped))} is clamped, no affine map")
    for name, what in (("threshold", "is thresholded"), ("log_std", "learns its variance")):
        if (rows := getattr(plan, name).any(axis=1)).any():
            raise ValueError(f"{name}: row {int(np.argmax(rows))} {what}, no affine map")
    noisy = (plan.coef[:, :, Z] != 0).any(axis=1)
    drawn = list(zip(plan.stream[noisy], plan.draw[noisy], strict=True))
    if len(set(drawn)) < len(drawn):
        raise ValueError("draw: the plan uses one noise in two rows, the rows are not independent")
    if start is None:
        if plan.coef[0, 0, X] != 0:
            raise ValueError("start: the plan begins from a given state, its (mean, std) is needed")
        start = (0.0, 0.0)
    made = list(_propagate(plan, data_mean, data_std, start))
    return np.array([row.mean for row in made]), np.array([row.std for row in made])


def kappa(plan: Plan) -> Array:
    """See :attr:`sbm_fast.plan.Plan.kappa`."""
    m, sigma = plan.marginal[int(np.argmax(plan.evaluates))]
    start = (0.0, float(np.hypot(m * _KAPPA_DATA_STD, sigma)))
    out = []
    for row in _propagate(plan, 0.0, _KAPPA_DATA_STD, start):
        rms = float(np.hypot(row.mean, row.std))
        out.append(float(np.abs(row.coef) @ row.rms) / rms if rms > 0 else 1.0)
    return np.array(out)


def _propagate(
    plan: Plan, data_mean: float, data_std: float, start: tuple[float, float]
) -> Iterator[_Row]:
    """Push mean and factor of (x, H_0 …) through every row."""
    size = 1 + plan.registers
    mean = np.zeros(size)
    mean[0] = start[0]
    factor = np.zeros((size, 1))
    factor[0, 0] = start[1]
    for row in range(plan.rows):
        table = _coefficients(plan, row)
        linear, constant = _sources(plan, row, data_mean, data_std)
        source_std = np.linalg.norm(linear @ factor, axis=1)
        source_std[Z] = 1.0
        source_mean = linear @ mean + constant

        step = np.eye(size)
        shift = np.zeros(size)
        noise = np.zeros((size, 1))
        targets = [(0, 0)] + ([(1, 1 + int(plan.slot[row]))] if plan.slot[row] >= 0 else [])
        for output, target in targets:
            step[target] = table[output] @ linear
            shift[target] = table[output] @ constant
            noise[target, 0] = table[output, Z]
        mean = step @ mean + shift
        factor = _compressed(np.concatenate([step @ factor, noise], axis=1))
        yield _Row(
            table[0],
            np.hypot(source_mean, source_std),
            float(mean[0]),
            float(np.linalg.norm(factor[0])),
        )


def _coefficients(plan: Plan, row: int) -> Array:
    """[2, 4 + K]. Stand-ins for what data decide: the step size of the σ-norm, ε = 2α(rσ)², in
    Langevin rows, and the upper bound of a learned variance."""
    if plan.log_std[row].any():
        table = plan.coef[row].copy()
        table[:, Z] *= np.exp(plan.log_std[row].max())
        return table
    if not plan.norm[row]:
        return plan.coef[row]
    scale, p, q = plan.langevin[row]
    epsilon = scale * plan.marginal[row, 1] ** 2
    table = plan.coef[row].copy()
    table[0, X] += epsilon * p
    table[0, F] += epsilon * q
    table[0, Z] += np.sqrt(2 * epsilon)
    return table


def _sources(plan: Plan, row: int, data_mean: float, data_std: float) -> tuple[Array, Array]:
    """Sources {x, F, D, z, H_k} as affine maps of (x, H_k): [4 + K, 1 + K] and [4 + K]."""
    linear = np.zeros((4 + plan.registers, 1 + plan.registers))
    constant = np.zeros(4 + plan.registers)
    linear[X, 0] = 1.0
    linear[H0:, 1:] = np.eye(plan.registers)
    if plan.evaluates[row]:
        m, sigma = plan.marginal[row]
        p, q, _ = plan.denoiser[row]
        variance = (m * data_std) ** 2 + sigma**2
        linear[D, 0] = m * data_std**2 / variance
        constant[D] = data_mean * sigma**2 / variance
        if q != 0:
            linear[F, 0] = (linear[D, 0] - p) / q
            constant[F] = constant[D] / q
    return linear, constant


def _compressed(factor: Array) -> Array:
    """The same J Jᵀ in fewer columns, by an orthogonal transform, so no digits are lost."""
    if factor.shape[1] <= _MAX_COLUMNS:
        return factor
    upper: Array = np.linalg.qr(factor.T)[1]
    return upper.T
