"""The record for people: one table of text, and README's rows."""

from collections.abc import Iterator
from typing import Any

NOT_RUN = "Not yet run on a GPU."
DRY = "DRY RUN on a CPU in tiny sizes: no figure here is a measurement, no goal is judged."
UNITS = {
    "B/s": (1e12, "TB/s"),
    "FLOP/s": (1e12, "TFLOP/s"),
    "normals/s": (1e9, "G normals/s"),
}


def table(record: dict[str, Any]) -> str:
    """Everything measured, the goals first."""
    lines = list(_head(record))
    judged = list(judgements(record))
    if judged:
        lines += ["", "goals", *(f"  {line}" for line in judged)]
    lines += ["", "phases"]
    for name, phase in record["phases"].items():
        lines.append(f"  {name:<18}{phase.get('seconds', 0):>7.1f} s  {phase['status']}")
    for name, phase in record["phases"].items():
        lines += ["", f"{name}: {phase['title']}", *(f"  {line}" for line in _phase(phase))]
    return "\n".join(line.rstrip() for line in lines)


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """What the machine's phase found; empty when it did not run."""
    entries = record["phases"].get("machine", {}).get("entries", {})
    found: dict[str, Any] = entries.get("facts", {}).get("facts", {})
    return found


def _head(record: dict[str, Any]) -> Iterator[str]:
    yield f"sbm_fast GPU laboratory, {record['date']}, {record['seconds']:.0f} s"
    if record["dry_run"]:
        yield DRY
    if not record["finished"]:
        yield "CUT SHORT: what follows is the part that was measured"
    yield record["command"]
    found = facts(record)
    shown = ("gpu", "driver_version", "torch", "cuda", "cudnn", "nvcc")
    yield ", ".join(f"{k} {found[k]}" for k in shown if k in found)
    yield f"commit {record['commit']}, Python {record['python']}"


def judgements(record: dict[str, Any]) -> Iterator[str]:
    """A line for each goal that a figure stands against."""
    for phase, entry_name, label, against, judged in _judged(record):
        yield (
            f"{judged['verdict']:<9}{judged['ratio']:>7.2f}  (goal {judged['goal']:g}, moonshot "
            f"{judged['moonshot']:g})  {phase} {entry_name}: {label}, {against}"
        )
    for phase_name, content in record["phases"].items():
        for name, entry in content.get("entries", {}).items():
            for pair, reason in entry.get("not_measured", {}).items():
                yield f"NOT MEASURED  {phase_name} {name}: {pair} ({reason})"


def _judged(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str, dict[str, Any]]]:
    for phase_name, phase in record["phases"].items():
        for name, entry in phase.get("entries", {}).items():
            for label, result in entry.get("results", {}).items():
                compared = {f"{k} ÷ it": v for k, v in result.get("ratios", {}).items()}
                if "fraction" in result:
                    compared["share of the copy's bandwidth"] = result["fraction"]
                for against, value in compared.items():
                    if "verdict" in value:
                        yield phase_name, name, label, against, value


def _phase(phase: dict[str, Any]) -> Iterator[str]:
    if "tests" in phase:
        counts = ", ".join(f"{v} {k}" for k, v in phase["tests"].items())
        yield f"{counts}; pytest: {phase['pytest']}"
        if phase["running"]:
            yield f"ended in {phase['running']}"
        for failure in phase["failed_tests"]:
            yield f"{failure['test']}: {failure['message']}"
        yield from (f"skipped {count}: {reason}" for reason, count in phase["skips"].items())
    for name, entry in phase.get("entries", {}).items():
        if "facts" in entry:
            yield from entry["facts"].get("doctor", ())
        else:
            yield from _entry(name, entry)
    for name, reason in phase.get("failures", {}).items():
        yield f"{name}: FAILED, {reason}"
    if phase.get("left_out"):
        yield f"left out: {', '.join(phase['left_out'])}"
    for when in ("before", "after"):
        if clocks := phase.get(f"clocks_{when}"):
            yield f"{when}: " + ", ".join(f"{k} {v}" for k, v in clocks.items())


def _entry(name: str, entry: dict[str, Any]) -> Iterator[str]:
    yield f"{name}  [{entry['method']}]"
    for label, result in entry["results"].items():
        yield f"  {label:<30}{_times(result)}{_rate(result)}{_share(result)}{_rest(result)}"
        for against, ratio in result.get("ratios", {}).items():
            low, high = ratio["quartiles"]
            reached = ""
            if "verdict" in ratio:
                goals = f"(goal {ratio['goal']:g}, moonshot {ratio['moonshot']:g})"
                reached = f"  {goals} {ratio['verdict']}"
            yield f"    {against:<34}{ratio['ratio']:>9.2f}×  [{low:.2f}, {high:.2f}]{reached}"
    for label, reason in entry.get("unavailable", {}).items():
        yield f"  {label:<30}not available: {reason}"
    for label, reason in entry["failed"].items():
        yield f"  {label:<30}FAILED: {reason}"


def _times(result: dict[str, Any]) -> str:
    if "median" not in result:
        return ""
    low, high = (f"{v * 1e6:.2f}" for v in result["quartiles"])
    return f"{result['median'] * 1e6:>12.2f} µs  {f'[{low}, {high}]':<24}"


def _rate(result: dict[str, Any]) -> str:
    if "rate" not in result:
        return ""
    scale, unit = UNITS[result["unit"]]
    return f"{result['rate'] / scale:>9.3f} {unit}"


def _share(result: dict[str, Any]) -> str:
    return f"{result['fraction']['ratio']:>8.1%} of the copy" if "fraction" in result else ""


def _rest(result: dict[str, Any]) -> str:
    extra = {k: v for k, v in result.items() if k.endswith("_seconds") or k.startswith("seconds_")}
    shown = [f"{k.replace('_', ' ')} {v:.3g}" for k, v in extra.items()]
    shown += [f"{k} {v:.2g}" for k, v in result.get("errors", {}).items() if v is not None]
    return f"  ({', '.join(shown)})" if shown else ""
