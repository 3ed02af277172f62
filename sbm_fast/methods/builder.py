"""Writing plans as formulas: linear forms, evaluations and the builder that turns them into rows.

A method asks for an evaluation and writes its paper's update with the forms that it gives::

    e = b.evaluate(t)
    b.row(x=e.x + (f * e.x - g**2 * e.s) * dt + g * abs(dt) ** 0.5 * e.z)

D, s and ε are linear forms of the state x and the network output F, each from its own analytic
coefficients. With ``clip=L`` the denoised D is an atom of its own, clamped to ±L, and s and ε are
taken from the clamped D. With a ``DynamicThreshold`` they keep their forms, because the F that the
row will read is the one of the thresholded D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sbm_fast.methods import clipping
from sbm_fast.methods.clipping import Clip
from sbm_fast.model import as_score_model
from sbm_fast.plan import H0, NORMS, SOURCES, D, F, Plan, X, Z
from sbm_fast.process import count
from sbm_fast.sde import as_sde

if TYPE_CHECKING:
    from sbm_fast.model import Match

TRAJECTORY = 1
"""Noise stream of the rows (the prior is stream 0)."""


@dataclass(frozen=True)
class Lin:
    """A linear form Σ c_j · source_j over the columns {x, F, D, z, H_k} of a plan.

    ``evaluation`` is the number of the evaluation whose x, F or D it contains (None: only noise
    and registers); forms of two evaluations cannot meet in one row, the earlier one has to be
    kept in a register.
    """

    terms: Mapping[int, float] = field(default_factory=dict)
    evaluation: int | None = None

    # numpy scalars must leave products with a form to __rmul__
    __array_ufunc__: ClassVar[None] = None

    def __add__(self, other: Lin) -> Lin:
        if not isinstance(other, Lin):
            return NotImplemented
        terms = dict(self.terms)
        for column, value in other.terms.items():
            terms[column] = terms.get(column, 0.0) + value
        return Lin(terms, _same_evaluation(self.evaluation, other.evaluation))

    def __mul__(self, factor: object) -> Lin:
        if not isinstance(factor, Real):
            return NotImplemented
        scale = float(factor)
        return Lin({column: scale * value for column, value in self.terms.items()}, self.evaluation)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Lin:
        if not isinstance(divisor, Real):
            return NotImplemented
        scale = float(divisor)
        if scale == 0:
            raise ValueError(f"a linear form was divided by zero: {self}")
        return Lin({column: value / scale for column, value in self.terms.items()}, self.evaluation)

    def __neg__(self) -> Lin:
        return self * -1.0

    def __sub__(self, other: Lin) -> Lin:
        if not isinstance(other, Lin):
            return NotImplemented
        return self + (-other)

    def __str__(self) -> str:
        names = {c: SOURCES[c] if c < H0 else f"H{c - H0}" for c in self.terms}
        return " ".join(f"{self.terms[c]:+.6g} {names[c]}" for c in sorted(names)) or "0"


def _same_evaluation(a: int | None, b: int | None) -> int | None:
    if a is not None and b is not None and a != b:
        raise ValueError(
            f"a form of evaluation {a} meets one of evaluation {b}: a row sees only its own "
            "evaluation, keep the earlier form in a register"
        )
    return b if a is None else a


@dataclass(frozen=True)
class Evaluation:
    """The network at one state: forms x, F, D, s, eps, z and the level t, m, sigma.

    ``eps_raw`` is ε straight from the network's output where D is clamped (else it is ``eps``).
    """

    t: float
    m: float
    sigma: float
    x: Lin
    F: Lin
    D: Lin
    s: Lin
    eps: Lin
    eps_raw: Lin
    z: Lin
    match: Match


class PlanBuilder:
    """Collects the rows of one plan.

    Args:
        model: a ScoreModel, or what ``as_score_model`` takes.
        sde: the SDE that the plan runs under, or what ``as_sde`` takes.
        method: name that the plan carries.
        coordinate: "x", or "x/m" for a state divided by the mean scale m.
        clip: L > 0 clamps the denoised estimate to ±L; a `DynamicThreshold` finds its bound in
            each sample.
        given_start: the state at ``t_start`` is given (x_init) instead of drawn from the prior.
        t_start: time of the start, default the SDE's t_max.

    Raises:
        TypeError, ValueError: naming ``coordinate`` or ``clip_denoised``.
    """

    def __init__(
        self,
        model: object,
        sde: object,
        *,
        method: str,
        coordinate: str = "x",
        clip: Clip | None = None,
        given_start: bool = False,
        t_start: float | None = None,
    ) -> None:
        if coordinate not in ("x", "x/m"):
            raise ValueError(f"coordinate: expected 'x' or 'x/m', got {coordinate!r}")
        self.sde = as_sde(sde)
        self.model = as_score_model(model, self.sde)
        self.method = method
        self.coordinate = coordinate
        self.clip, self.threshold = clipping.split(clip)
        self.given_start = given_start
        self.t_start = float(self.sde.t_max if t_start is None else t_start)
        self._rows: list[dict[str, Any]] = []
        self._forms: list[tuple[Lin, Lin]] = []
        self._current: Evaluation | None = None
        self._evaluations = 0
        self._matches: dict[float, Match] = {}

    @staticmethod
    def H(k: int) -> Lin:
        """Register k ≥ 0 as a form."""
        return Lin({H0 + count("k", k, least=0): 1.0})

    z = Lin({Z: 1.0})
    """The row's own noise."""

    def level(self, t: float) -> tuple[float, float]:
        """(m, σ) at time t in the state's coordinate."""
        if self.coordinate == "x/m":
            return 1.0, float(self.sde.nsr(t))
        return float(self.sde.mean_scale(t)), float(self.sde.std(t))

    def evaluate(self, t: float) -> Evaluation:
        """Evaluate the network at the present state, at time t of the run's SDE.

        Raises:
            ValueError: when the evaluation before has no row yet, or t lies outside the network's
                trained range.
        """
        if self._current is not None:
            raise ValueError("evaluate: one row is one evaluation; write the row before the next")
        t = float(t)
        match = self._matches.get(t)
        if match is None:
            match = self.model.match(self.sde, t, coordinate=self.coordinate)
            self._matches[t] = match
        n = self._evaluations
        x, out = Lin({X: 1.0}, n), Lin({F: 1.0}, n)
        raw = {
            name: form.x * x + form.F * out
            for name, form in (
                ("D", match.denoiser),
                ("s", match.score),
                ("eps", match.noise),
            )
        }
        m, sigma = float(match.m), float(match.sigma)
        eps_raw = raw["eps"]
        if self.clip is not None:
            clamped = Lin({D: 1.0}, n)
            raw = {
                "D": clamped,
                "s": (m * clamped - x) / sigma**2,
                "eps": (x - m * clamped) / sigma,
            }
        self._current = Evaluation(
            t, m, sigma, x, out, raw["D"], raw["s"], raw["eps"], eps_raw, self.z, match
        )
        return self._current

    def start(self, std: float | None = None) -> None:
        """The first row: x' = std · z from the prior stream, or x' = x for a given start.

        ``std`` defaults to the SDE's prior (at t_max) or σ(t_start), divided by m for "x/m".
        """
        if self._rows:
            raise ValueError("start: the start row comes first, and once")
        if self.given_start:
            self._append(Lin({X: 1.0}), stream=0, draw=0)
            return
        if std is None:
            t = self.t_start
            std = self.sde.prior_std if t == self.sde.t_max else float(self.sde.std(t))
            std = float(std) * self._start_scale()
        self._append(float(std) * self.z, stream=0, draw=0)

    def start_row(self, x: Lin) -> None:
        """A second row without evaluation: noise added before the first evaluation."""
        if len(self._rows) != 1 or self._evaluations or self._current is not None:
            raise ValueError("start_row: comes directly after start(), once")
        self._append(x, stream=TRAJECTORY, draw=None)

    @property
    def state(self) -> Lin:
        """The state x for :meth:`start_row`; rows take x from their evaluation."""
        return Lin({X: 1.0})

    def row(
        self,
        x: Lin,
        write: tuple[int, Lin] | None = None,
        *,
        stream: int = TRAJECTORY,
        draw: int | None = None,
        guidance: float = 1.0,
        log_std: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Write the current evaluation's row: next state ``x``, (slot, form) to a register.

        ``draw`` numbers the row's noise, default the row's index. ``log_std`` (l_0, l_1) makes its
        z one of learned variance, exp((1 − v) l_0 + v l_1) times a standard normal.
        """
        e = self._take()
        self._append(
            x, write, stream=stream, draw=draw, guidance=guidance, evaluation=e, log_std=log_std
        )

    def langevin(
        self, alpha: float, snr: float, norm: str = "sigma", *, noise: bool = True
    ) -> None:
        """The Langevin corrector at the current evaluation: x' = x + ε s + √(2ε) z.

        norm "sigma": ε = 2α(rσ)², known ahead, an ordinary row (exact in law in every dimension).
        "batch_mean", "per_sample", "sqrt_d": ε = 2α(r‖z‖/‖s‖)², found while sampling.
        Song et al. 2021, Algorithms 4 and 5 (r = ``snr``).

        Raises:
            ValueError: for an unknown norm; for a data-dependent norm with clipping (such a row
                takes s from the unclamped network) or without noise.
        """
        if norm == "sigma":
            e = self._peek()
            epsilon = 2 * alpha * (snr * e.sigma) ** 2
            x = e.x + epsilon * e.s
            self.row(x + math.sqrt(2 * epsilon) * e.z if noise else x)
            return
        if norm not in NORMS[1:]:
            raise ValueError(f"norm: expected one of {('sigma', *NORMS[1:])}, got {norm!r}")
        if self.clip is not None:
            raise ValueError(
                f"clip_denoised: norm={norm!r} finds its step from the unclamped score; use "
                "norm='sigma' or no clipping"
            )
        if not noise:
            raise ValueError(f"denoise: the noise of a row with norm={norm!r} cannot be dropped")
        e = self._take()
        score = e.match.score
        self._append(
            e.x,
            evaluation=e,
            norm=NORMS.index(norm),
            langevin=(2 * alpha * snr**2, score.x, score.F),
        )

    def _peek(self) -> Evaluation:
        if self._current is None:
            raise ValueError("row: a row needs an evaluation, call evaluate(t) first")
        return self._current

    def _take(self) -> Evaluation:
        e = self._peek()
        if not self._rows:
            raise ValueError("row: the first row is start()")
        self._current = None
        self._evaluations += 1
        return e

    def _append(
        self,
        x: Lin,
        write: tuple[int, Lin] | None = None,
        *,
        stream: int = TRAJECTORY,
        draw: int | None = None,
        guidance: float = 1.0,
        evaluation: Evaluation | None = None,
        norm: int = 0,
        langevin: tuple[float, float, float] = (0.0, 0.0, 0.0),
        log_std: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        slot, written = (-1, Lin()) if write is None else write
        forms: tuple[object, object] = (x, written)
        for form in forms:
            if not isinstance(form, Lin):
                raise TypeError(f"row: expected a linear form, got {type(form).__name__}")
            if evaluation is not None:
                _same_evaluation(form.evaluation, self._evaluations - 1)
        e = evaluation
        limit = math.inf if self.clip is None else self.clip
        bound = self.threshold if e is not None else None
        self._forms.append((x, written))
        self._rows.append(
            {
                "slot": slot,
                "denoiser": (0.0, 0.0, math.inf)
                if e is None
                else (e.match.denoiser.x, e.match.denoiser.F, limit),
                "time": math.nan if e is None else e.t,
                "label": 0.0 if e is None else e.match.label,
                "c_in": 0.0 if e is None else e.match.c_in,
                "evaluates": e is not None,
                "stream": stream,
                "draw": len(self._rows) if draw is None else draw,
                "guidance": guidance,
                "norm": norm,
                "langevin": langevin,
                "marginal": (1.0, 0.0) if e is None else (e.m, e.sigma),
                "log_std": log_std,
                "threshold": (0.0, 0.0, 0.0)
                if bound is None
                else (bound.quantile, bound.minimum, bound.maximum),
            }
        )

    def _start_scale(self) -> float:
        return 1.0 / float(self.sde.mean_scale(self.t_start)) if self.coordinate == "x/m" else 1.0

    def build(self, **description: object) -> Plan:
        """The finished plan; ``description`` is kept for printing and saving."""
        if self._current is not None:
            raise ValueError("build: the last evaluation has no row")
        columns = [c for pair in self._forms for form in pair for c in form.terms]
        slots = [int(row["slot"]) for row in self._rows]
        width = max([4, *(c + 1 for c in columns), *(H0 + s + 1 for s in slots)])
        coef = np.zeros((len(self._rows), 2, width))
        for row, forms in enumerate(self._forms):
            for output, form in enumerate(forms):
                for column, factor in form.terms.items():
                    coef[row, output, column] = factor
        about: dict[str, str | float | int] = {
            "sde": repr(self.sde),
            "predicts": self.model.predicts,
            "coordinate": self.coordinate,
            "clip_denoised": str(self.threshold or "none") if self.clip is None else self.clip,
        }
        for key, value in description.items():
            about[key] = value if isinstance(value, (str, int, float)) else str(value)
        arrays = {name: np.array([row[name] for row in self._rows]) for name in self._rows[0]}
        return Plan(
            method=self.method,
            description=about,
            coef=coef,
            start_scale=self._start_scale(),
            **arrays,
        )
