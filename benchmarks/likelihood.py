"""Times likelihoods beside how others compute them, and keeps the record.

    python -m benchmarks.likelihood                  all of it, about half an hour on two cores
    python -m benchmarks.likelihood --part speed     one part, the others stay as recorded
    python -m benchmarks.likelihood --quick          few samples; prints, records nothing

Parts: "speed" (everybody at tolerance 1e-5), "equal error" (against torchdiffeq), "digits" (bits
per dimension of the held-out digits). Errors are against the same network in float64 and the same
probes, by torchdiffeq at 1e-8, kept under build/.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sbm_fast
from benchmarks import likelihood_digits, likelihood_tables
from benchmarks.likelihood_baselines import T_MIN, Outcome, ScoreSDE, Torchdiffeq, in_batches
from benchmarks.likelihood_models import (
    CACHE,
    Model,
    dequantised,
    digest,
    in_float64,
    shipped_digits,
    signs,
    wide_unet,
)
from benchmarks.likelihood_tables import RECORD
from benchmarks.machine import begin, facts
from benchmarks.measure import interleave, threads
from benchmarks.workloads import OURS, SCORE_SDE, Case, Goal

THREADS = 2
FEWER = 2
"""Rounds of what takes minutes: several probes, and many tolerances."""
TOLERANCE = 1e-5
REFERENCE_TOLERANCE = 1e-8
MOST_ERROR = 0.05
"""Nats (root mean square) that anybody may be off at `TOLERANCE`."""
TORCHDIFFEQ, ON_OUR_FLOW = "torchdiffeq", "torchdiffeq, our flow"
GOALS = {1: Goal(SCORE_SDE, 2, 3), 8: Goal(SCORE_SDE, 3.5, 6)}
TOLERANCES = {
    OURS: (1e-4, 1e-5, 1e-6),
    TORCHDIFFEQ: (1e-4, 1e-5, 3e-6, 1e-6, 3e-7),
    ON_OUR_FLOW: (1e-4, 1e-5, 3e-6, 1e-6),
}


@dataclass(frozen=True)
class Task:
    """Log-densities of `samples` held-out digits in batches of `batch`.

    Attributes:
        make: the network; called once.
        judged: samples, the first ones, that errors are measured on.
        rounds: timed calls of everybody.
    """

    make: Callable[[], Model]
    samples: int
    batch: int
    judged: int
    rounds: int = 3

    @cached_property
    def model(self) -> Model:
        return self.make()

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        return dequantised(self.samples)

    def run(self, label: str, probes: int, tolerance: float = TOLERANCE) -> Outcome:
        """What is timed."""
        (x, keys), network = self.data, self.model.network
        if label in (OURS, ON_OUR_FLOW):
            found = sbm_fast.log_likelihood(
                network,
                sbm_fast.VPSDE(),
                x,
                probes=probes,
                exact=False,
                solver="dopri5" if label == OURS else "torchdiffeq:dopri5",
                rtol=tolerance,
                atol=tolerance,
                t_min=T_MIN,
                keys=keys,
                batch_size=self.batch,
            )
            return Outcome(found.columns, found.nfe)
        method = {SCORE_SDE: ScoreSDE, TORCHDIFFEQ: Torchdiffeq}[label](network, tolerance)
        return in_batches(method, x, signs(keys, probes, x.shape[1:]), self.batch)

    @cached_property
    def reference(self) -> Tensor:
        """log p by the first probe, [judged]: no part of it is ours but the probe."""
        stem = f"reference-{digest(self.model.network)}-{REFERENCE_TOLERANCE:g}"
        for path in CACHE.glob(f"{stem}-*.pt"):
            known: Tensor = torch.load(path, weights_only=True)
            if len(known) >= self.judged:
                return known[: self.judged]
        print(f"reference for {self.model.name}, {self.judged} samples …", file=sys.stderr)
        x, keys = dequantised(self.judged)
        method = Torchdiffeq(in_float64(self.model.network), REFERENCE_TOLERANCE)
        found = in_batches(method, x.double(), signs(keys, 1, x.shape[1:]).double(), 16)
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(found.columns[0], CACHE / f"{stem}-{self.judged}.pt")
        return found.columns[0]

    def errors(self, outcome: Outcome) -> dict[str, float]:
        """Of log p by the first probe, nats."""
        off = outcome.columns[0, : self.judged] - self.reference
        return {"error_rms": float(off.square().mean().sqrt()), "error_max": float(off.abs().max())}

    def measure(
        self, settings: Mapping[str, tuple[str, int, float]], rounds: int
    ) -> dict[str, dict[str, Any]]:
        """Seconds, evaluations and errors of every (label, probes, tolerance), timed in turn."""
        outcomes: dict[str, Outcome] = {}

        def case(name: str) -> Case:
            return Case(
                lambda: print(f"  {name} …", file=sys.stderr, flush=True),
                lambda: outcomes.__setitem__(name, self.run(*settings[name])),
            )

        seconds = interleave({name: case(name) for name in settings}, rounds, untimed=0)
        results = {}
        for name, values in seconds.items():
            nfe = outcomes[name].nfe.double()
            results[name] = {
                "seconds": float(np.median(values)),
                "all_seconds": values.tolist(),
                "nfe_mean": float(nfe.mean()),
                "nfe_max": int(nfe.max()),
                **self.errors(outcomes[name]),
            }
        return results

    def check(self) -> dict[str, float]:
        """Everybody computes the same: root mean square errors on the judged samples, warmed up."""
        small, errors = self.of(self.judged), {}
        for label in (SCORE_SDE, TORCHDIFFEQ, ON_OUR_FLOW, OURS):
            errors[label] = small.errors(small.run(label, 1))["error_rms"]
            off = f"{self.model.name}: {label} is off by {errors[label]:.2g} nats"
            assert errors[label] <= MOST_ERROR, off
        return errors

    def of(self, samples: int) -> "Task":
        """The same with so many samples."""
        other = replace(self, samples=samples)
        other.__dict__["model"] = self.model
        return other

    def facts(self) -> dict[str, Any]:
        """What the record says of it."""
        return {
            "name": self.model.name,
            "parameters": self.model.network.num_parameters(),
            "held_out_loss": self.model.held_out_loss,
            "samples": self.samples,
            "batch": self.batch,
            "judged": self.judged,
            "rounds": self.rounds,
            "rounds_of_several_probes_or_tolerances": FEWER,
            "threads": THREADS,
        }


TASKS = (Task(shipped_digits, 256, 64, 64), Task(wide_unet, 128, 32, 32))
QUICK = (Task(shipped_digits, 48, 16, 16, 1), Task(wide_unet, 24, 8, 8, 1))


def speed(whole: Task, only: int | None = None) -> dict[str, Any]:
    """Everybody at the same tolerance, with 1 and 8 probes (these on half the samples), or `only`
    one of them."""
    entry = {**whole.facts(), "check": whole.check(), "probes": {}}
    for probes, goal in GOALS.items():
        if only not in (None, probes):
            continue
        task = whole if probes == 1 else whole.of(whole.samples // 2)
        labels = (SCORE_SDE, TORCHDIFFEQ, OURS)
        rounds = task.rounds if probes == 1 else min(task.rounds, FEWER)
        results = task.measure({name: (name, probes, TOLERANCE) for name in labels}, rounds)
        ours = np.array(results[OURS]["all_seconds"])
        for result in results.values():
            times = np.array(result["all_seconds"])
            result["ratio"] = result["seconds"] / results[OURS]["seconds"]
            result["samples"] = task.samples
            result["ratio_range"] = [float(v) for v in ((times / ours).min(), (times / ours).max())]
        results[goal.baseline] |= {"goal": goal.goal, "moonshot": goal.moonshot}
        entry["probes"][str(probes)] = results
    return entry


def equal_error(task: Task) -> dict[str, Any]:
    """One probe at several tolerances; how long torchdiffeq takes for each error that ours has."""
    settings = {
        f"{label} {tolerance:g}": (label, 1, tolerance)
        for label, tolerances in TOLERANCES.items()
        for tolerance in tolerances
    }
    task = task.of(task.judged)
    results = task.measure(settings, min(task.rounds, FEWER))
    curves: dict[str, list[dict[str, Any]]] = {label: [] for label in TOLERANCES}
    for name, result in results.items():
        label, _, tolerance = settings[name]
        curves[label].append({"tolerance": tolerance, **result})
    for label in (TORCHDIFFEQ, ON_OUR_FLOW):
        for point in curves[OURS]:
            needed = seconds_at_error(curves[label], point["error_rms"])
            point.setdefault("ratios", {})[label] = needed and needed / point["seconds"]
    return {**task.facts(), "curves": curves}


def seconds_at_error(curve: list[dict[str, Any]], error: float) -> float | None:
    """The least time for an error, linear in the logarithms between two settings of a curve.

    None outside: nothing was measured that is as good, or as bad.
    """
    points = sorted((point["error_rms"], point["seconds"]) for point in curve)
    errors, seconds = np.array(points).T
    # A setting that is both slower and worse than another one would not be chosen.
    seconds = np.minimum.accumulate(seconds)
    if not errors[0] <= error <= errors[-1]:
        return None
    return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(seconds))))


PARTS: dict[str, Callable[[tuple[Task, ...], bool, int | None], Any]] = {
    "speed": lambda tasks, quick, only: [speed(task, only) for task in tasks],
    "equal error": lambda tasks, quick, only: [equal_error(task) for task in tasks],
    "digits": lambda tasks, quick, only: likelihood_digits.record(8 if quick else 96),
}


def keep_other_probes(new: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """What a run with `--probes` has not measured stays as recorded."""
    for entry, old in zip(new, before, strict=True):
        entry["probes"] = {**old["probes"], **entry["probes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--probes", type=int, choices=GOALS, help="part speed: these alone")
    parser.add_argument("--quick", action="store_true", help="few samples, no record")
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    arguments = parser.parse_args()
    busy = begin()
    out: Path = arguments.out
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for part in arguments.part or PARTS:
        with threads(THREADS):
            tasks = QUICK if arguments.quick else TASKS
            result = PARTS[part](tasks, arguments.quick, arguments.probes)
        if part == "speed" and arguments.probes and part in known:
            keep_other_probes(result, known[part]["result"])
        known[part] = {
            "command": f"python -m benchmarks.likelihood --part '{part}'",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": facts(),
            "cores_busy_before": round(busy, 2),
            "result": result,
        }
        print(likelihood_tables.TABLES[part](known[part]), flush=True)
        if not arguments.quick:
            text = json.dumps(known, indent=1, ensure_ascii=False, allow_nan=False)
            out.write_text(text + "\n", encoding="utf-8")
            print(f"written to {out}")


if __name__ == "__main__":
    main()
