"""README's and docs/likelihood.md's tables of likelihoods, made from the record."""

import json
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.markdown import with_goals

RECORD = ROOT / "benchmarks" / "results" / "likelihood.json"
NOT_MEASURED = "Not yet measured."


def sections(path: Path = RECORD) -> dict[str, str]:
    """ "likelihood" of README, and "speed", "equal error" and "digits" of docs/likelihood.md."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    made = {
        part: table(record[part]) if part in record else NOT_MEASURED
        for part, table in TABLES.items()
    }
    if "speed" in record and "equal error" in record:
        short = summary(record["speed"], record["equal error"])
    else:
        short = NOT_MEASURED
    return {"likelihood": short, **made}


def summary(speed: dict[str, Any], equal: dict[str, Any]) -> str:
    """One line for each network and number of probes."""
    lines = [
        "| network | probes | ours, s | score_sde ÷ ours | torchdiffeq ÷ ours, at equal error |",
        "|---|---|---|---|---|",
    ]
    curves = {entry["name"]: entry["curves"]["ours"] for entry in equal["result"]}
    for entry in speed["result"]:
        for probes, results in entry["probes"].items():
            ratio = ratio_cell(results["score_sde"])
            cells = [_name(entry), probes, f"{results['ours']['seconds']:.1f}", ratio]
            cells.append(_at_tolerance(curves[entry["name"]], 1e-5) if probes == "1" else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(speed)])


def speed_table(part: dict[str, Any]) -> str:
    """Everybody at the same tolerance."""
    lines = [
        "| network | probes | | s | ÷ ours | NFE a sample, mean (largest) | error, nats: rms "
        "(largest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in part["result"]:
        for probes, results in entry["probes"].items():
            for label, r in results.items():
                cells = [
                    _name(entry),
                    probes,
                    label,
                    f"{r['seconds']:.1f}",
                    ratio_cell(r),
                    _nfe(r),
                    f"{r['error_rms']:.1e} ({r['error_max']:.1e})",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(part)])


def equal_error_table(part: dict[str, Any]) -> str:
    """Error, evaluations and time at each tolerance, one probe."""
    lines = [
        "| network | | tolerance | error, nats: rms | NFE a sample, mean (largest) | s | "
        "torchdiffeq ÷ ours at this error | on our flow |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in part["result"]:
        for label, curve in entry["curves"].items():
            for r in curve:
                cells = [_name(entry), label, f"{r['tolerance']:g}", f"{r['error_rms']:.1e}"]
                cells += [_nfe(r), f"{r['seconds']:.1f}"]
                ratios = r.get("ratios", {})
                cells += [_times(ratios[name]) for name in ratios] or ["", ""]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(part)])


def digits_table(part: dict[str, Any]) -> str:
    """Bits per dimension of the held-out digits."""
    found = part["result"]
    lines = [
        "| trace | bits/dim | of one digit: median standard error | NFE a digit, mean (largest) |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        error = row["median_stderr"]
        cells = [row["name"], f"{row['mean']:.4f} ± {row['mean_stderr']:.4f}", f"{error:.4f}"]
        lines.append(f"| {' | '.join([*cells, _nfe(row)])} |")
    off = found["difference"]
    note = (
        f"{found['samples']} held-out digits, {found['levels']} levels, uniform dequantisation; ± "
        "is the standard error over the digits. Estimated minus exact on the same dequantised "
        f"digits: {off['mean']:+.5f} ± {off['stderr']:.5f} by the probes' standard errors, in "
        f"units of which a single digit is off by {off['rms_in_stderrs']:.2f} (root mean square; "
        f"Student's t has {off['expected_rms']:.2f}). `{part['command']}`."
    )
    return "\n".join([*lines, "", note])


TABLES = {"speed": speed_table, "equal error": equal_error_table, "digits": digits_table}


def ratio_cell(result: dict[str, Any]) -> str:
    return with_goals(f"{result['ratio']:.2f}×", result, "g")


def _times(ratio: float | None) -> str:
    return "not reached" if ratio is None else f"{ratio:.2f}×"


def _at_tolerance(curve: list[dict[str, Any]], tolerance: float) -> str:
    (point,) = (p for p in curve if p["tolerance"] == tolerance)
    return f"{_times(point['ratios']['torchdiffeq'])} ({point['error_rms']:.0e} nats)"


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['name']}, {entry['parameters'] / 1e6:.2g} M"


def _samples(entry: dict[str, Any]) -> str:
    """How many: a number, or one for each number of probes."""
    numbers = {k: results["ours"]["samples"] for k, results in entry.get("probes", {}).items()}
    if len(set(numbers.values())) < 2:
        return str(entry["samples"])
    return " / ".join(f"{n} ({k} probe{'s' * (k != '1')})" for k, n in numbers.items())


def _nfe(result: dict[str, Any]) -> str:
    return f"{result['nfe_mean']:.0f} ({result['nfe_max']})"


def _note(part: dict[str, Any]) -> str:
    machine, tasks = part["machine"], part["result"]
    versions = machine["versions"]
    what = "; ".join(
        f"{entry['name']} (held-out loss {entry['held_out_loss']:.2f}): {_samples(entry)} "
        f"held-out digits in batches of {entry['batch']}"
        for entry in tasks
    )
    fewer = tasks[0]["rounds_of_several_probes_or_tolerances"]
    return (
        f"{what}; VP, t_min = 1e-5, {tasks[0]['threads']} threads, medians of "
        f"{tasks[0]['rounds']} interleaved runs in one process "
        f"({fewer} with several probes or tolerances), in brackets goal / moonshot: "
        f"`{part['command']}` on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['instruction_set']}, torch {versions['torch']}, Python {versions['python']}."
    )
