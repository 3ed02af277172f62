"""Measures every workload, prints the ratio table and keeps the record.

python -m benchmarks.report [--out benchmarks/results/cpu.json]
"""

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import buffers
from benchmarks.checkout import ROOT
from benchmarks.machine import begin, facts
from benchmarks.measure import Measurement, measure
from benchmarks.workloads import WORKLOADS, Goal

RECORD = ROOT / "benchmarks" / "results" / "cpu.json"


def table(measurements: Iterable[Measurement], held: dict[str, float] | None = None) -> str:
    """Medians per step and how many times ours they are; quartiles of the rounds in brackets."""
    lines = [
        f"{'':<24}{'median µs':>12}{'÷ ours':>9}  {'quartiles':<15}{'goal':>8}{'moonshot':>10}"
    ]
    for m in measurements:
        lines.append(m.workload.title)
        goals = {goal.baseline: goal for goal in m.workload.goals}
        for label, timing in m.timings.items():
            ratio = m.ratios[label]
            low, high = ratio.quartiles
            line = f"  {label:<22}{timing.median * 1e6:>12.1f}{ratio.value:>9.2f}  "
            line += f"{f'[{low:.2f}, {high:.2f}]':<15}"
            if label in goals:
                goal = goals[label]
                line += f"{f'≥ {goal.goal:g}':>8}{f'≥ {goal.moonshot:g}':>10}  "
                line += verdict(ratio.value, goal)
            lines.append(line.rstrip())
    if held is not None:
        most = buffers.GOAL
        lines.append("PC, state-size buffers alive beyond the network's own")
        lines += [f"  {label:<22}{number:>12g}" for label, number in held.items()]
        reached = verdict(-held["ours"], Goal("", -most.goal, -most.moonshot))
        lines[-2] += f"{'':>26}{f'≤ {most.goal:g}':>8}{f'≤ {most.moonshot:g}':>10}  {reached}"
    return "\n".join(lines)


def verdict(value: float, goal: Goal) -> str:
    if value >= goal.moonshot:
        return "moonshot"
    return "goal" if value >= goal.goal else "missed"


def record(
    measurements: Iterable[Measurement], held: dict[str, float], busy: float
) -> dict[str, Any]:
    """What benchmarks/results/cpu.json holds; times in seconds per step."""
    return {
        "command": " ".join(["python -m benchmarks.report", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts(),
        "cores_busy_before": round(busy, 2),
        "workloads": [entry(m) for m in measurements],
        "pc_buffers": {"shape": buffers.SHAPE, "goal": 4, "moonshot": 3, "held": held},
    }


def entry(m: Measurement) -> dict[str, Any]:
    w = m.workload
    goals = {goal.baseline: goal for goal in w.goals}
    results = {}
    for label, timing in m.timings.items():
        ratio = m.ratios[label]
        results[label] = {
            "median": timing.median,
            "quartiles": timing.quartiles,
            "ratio": ratio.value,
            "ratio_quartiles": ratio.quartiles,
            "error": m.errors[label],
        }
        if label in goals:
            results[label] |= {"goal": goals[label].goal, "moonshot": goals[label].moonshot}
    return {
        "name": w.name,
        "shape": w.shape,
        "threads": w.threads,
        "steps_per_call": w.steps,
        "rounds": w.rounds,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    out: Path = parser.parse_args().out
    busy = begin()
    measurements = []
    for workload in WORKLOADS:
        print(f"measuring {workload.title} …", file=sys.stderr, flush=True)
        measurements.append(measure(workload))
    held = buffers.pc_buffers()
    print(table(measurements, held))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(measurements, held, busy), indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
