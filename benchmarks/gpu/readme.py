"""README's table of GPU figures, made from the record; "not yet run" where there is none."""

from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.gpu.files import read_json
from benchmarks.gpu.table import NOT_RUN, facts
from benchmarks.markdown import ratio_cell, with_goals

RECORD = ROOT / "benchmarks" / "results" / "gpu.json"
BASELINES = ("score_sde", "tuned", "torch.compile", "torch.compile, in a CUDA graph", "torch.randn")
PHASES = ("em", "pc", "noise")
HEADINGS = ("workload", "ours", "µs", "share of copy bandwidth")


def markdown(path: Path = RECORD) -> str:
    """The table and where it comes from; ValueError for the record of a dry run."""
    record = read_json(path)
    if not record:
        return NOT_RUN
    if record["dry_run"]:
        raise ValueError(f"{path}: is the record of a dry run, not of a GPU")
    columns = [*HEADINGS, *(f"{name} ÷ ours" for name in BASELINES)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for phase in PHASES:
        for entry in record["phases"].get(phase, {}).get("entries", {}).values():
            lines += rows(entry)
    found = facts(record)
    where = (
        f"{found.get('gpu', 'unknown GPU')}, driver {found.get('driver_version')}, torch "
        f"{found.get('torch')}, Python {record['python']}, {record['date'][:10]}"
    )
    note = "Medians of interleaved runs in one process, in brackets goal / moonshot"
    tests = record["phases"].get("conformance", {}).get("status", "not run")
    if tests != "done":
        where += f"; the tests on this GPU: {tests}"
    return "\n".join([*lines, "", f"{note}: `{record['command']}` on {where}."])


def rows(entry: dict[str, Any]) -> list[str]:
    """One row for each of ours, which is what has ratios to others."""
    lines = []
    for label, result in entry["results"].items():
        if not result.get("ratios"):
            continue
        name = f"{entry['name']} {'×'.join(map(str, entry['shape']))}"
        if entry.get("bytes_per_element") == 10:
            name += ", bfloat16 network"
        cells = [name, label, f"{result['median'] * 1e6:.1f}", share(result.get("fraction"))]
        cells += [ratio_cell(result["ratios"].get(baseline)) for baseline in BASELINES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def share(fraction: dict[str, Any] | None) -> str:
    if fraction is None:
        return ""
    return with_goals(f"{fraction['ratio']:.0%}", fraction, ".0%")
