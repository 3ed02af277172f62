"""An entry of the record: implementations of the same thing, checked, timed and judged."""

import math
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.gpu.context import Context, Entry, describe
from benchmarks.gpu.timing import Summary, Timed, interleave, quartiles
from benchmarks.report import verdict
from benchmarks.workloads import Goal

COPY = "copy"


class Comparison:
    """Collects cases, times them interleaved, and gives the entry.

    A case that cannot be made, or is not right, is left out and stands under "failed"; a
    backend that this machine does not have, which is no failure, under "unavailable".
    """

    def __init__(
        self,
        context: Context,
        method: str,
        unavailable: dict[str, str] | None = None,
        **facts: Any,
    ) -> None:
        self.context = context
        self.facts = {"method": method, **facts}
        self.cases: dict[str, Timed] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}
        self.unavailable = dict(unavailable or {})
        self.not_measured: dict[str, str] = {}
        self.summaries: dict[str, Summary] = {}
        self.extra: dict[str, Any] = {}

    def add(self, label: str, make: Callable[[], tuple[Timed, dict[str, float]]]) -> None:
        """`make` checks before it gives the case: its errors, each with what it was held to.

        One untimed call follows, so that a case that cannot run fails here and alone.
        """
        print(f"   {label}", flush=True)
        try:
            case, errors = make()
            case.prepare()
            case.run()
            self.context.synchronize()
        except Exception as error:
            traceback.print_exc()
            self.failed[label] = describe(error)
            return
        self.cases[label], self.errors[label] = case, errors

    def measure(self, rounds: int, flush: Tensor | None = None, seconds: float = 8.0) -> None:
        self.summaries = interleave(self.cases, self.context, rounds, flush=flush, seconds=seconds)

    def entry(self) -> Entry:
        results: dict[str, Any] = {}
        for label, summary in self.summaries.items():
            results[label] = summary.entry() | {
                "steps_per_call": self.cases[label].steps,
                "errors": self.errors[label],
            }
        for label, values in self.extra.items():
            results.setdefault(label, {}).update(values)
        return {
            **self.facts,
            "results": results,
            "failed": self.failed,
            "unavailable": self.unavailable,
            "not_measured": self.not_measured,
        }

    def note(self, label: str, **values: Any) -> None:
        """Further values beside a label's times."""
        self.extra.setdefault(label, {}).update(values)

    def rate(self, label: str, amount: float, unit: str) -> float:
        """`amount` per step over the median; NaN where there is none."""
        if label not in self.summaries:
            return math.nan
        rate = amount / self.summaries[label].median
        self.note(label, rate=rate, unit=unit)
        return rate

    def ratios(
        self, ours: Iterable[str], goals: Iterable[Goal] = (), judged: Iterable[str] | None = None
    ) -> None:
        """How many times as long as each of ours every other implementation takes.

        `judged`: those of ours that the goals are meant for; None: all.
        """
        ours = list(ours)
        judged = ours if judged is None else list(judged)
        for own in judged:
            for goal in goals:
                self.miss(own, goal.baseline)
        ours = [label for label in ours if label in self.summaries]
        for own in ours:
            held = {goal.baseline: goal for goal in goals} if own in judged else {}
            times = {
                label: self.ratio(summary, self.summaries[own], held.get(label))
                for label, summary in self.summaries.items()
                if label not in (*ours, COPY)
            }
            self.note(own, ratios=times)

    def miss(self, own: str, against: str) -> None:
        """Keeps that a goal has no figure, where one of its two cases failed."""
        for label in (own, against):
            if label in self.failed:
                self.not_measured[f"{own}, {against}"] = f"{label}: {self.failed[label]}"

    def ratio(self, other: Summary, own: Summary, goal: Goal | None) -> dict[str, Any]:
        rounds = min(len(other.values), len(own.values))
        each = other.values[:rounds] / own.values[:rounds]
        value = other.median / own.median
        entry = {"ratio": value, "quartiles": quartiles(np.asarray(each))}
        return entry | self.judged(value, goal)

    def fraction(self, label: str, value: float, goal: Goal | None) -> None:
        """A share of what the machine can do."""
        self.note(label, fraction={"ratio": value} | self.judged(value, goal))

    def judged(self, value: float, goal: Goal | None) -> dict[str, Any]:
        """The goal and whether it was reached; a dry run is not judged."""
        if goal is None or self.context.dry_run:
            return {}
        return {"goal": goal.goal, "moonshot": goal.moonshot, "verdict": verdict(value, goal)}
