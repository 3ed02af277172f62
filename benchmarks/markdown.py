"""README's speed table, made from the record.

python -m benchmarks.markdown          prints it
python -m benchmarks.markdown --write  puts it into README.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RECORD = ROOT / "benchmarks" / "results" / "cpu.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def table(record: dict[str, Any]) -> str:
    """Times ours, by workload; in brackets the goal and the moonshot that were set for it."""
    lines = [
        "| workload | ours, µs | score_sde ÷ ours | tuned eager ÷ ours | torch.compile ÷ ours |",
        "|---|---|---|---|---|",
    ]
    for workload in record["workloads"]:
        shape = "×".join(map(str, workload["shape"]))
        name = f"{workload['name']} {shape}, {workload['threads']} thread(s)"
        results = workload["results"]
        cells = [_ratio(results.get(k)) for k in ("score_sde", "tuned", "torch.compile")]
        if "torch.randn" in results:
            cells[1] = f"{_ratio(results['torch.randn'])} torch.randn"
        lines.append(f"| {name} | {results['ours']['median'] * 1e6:.0f} | {' | '.join(cells)} |")
    held = record["pc_buffers"]
    lines.append(
        f"| state-size buffers during PC, beyond the network's own (goal {held['goal']}, "
        f"moonshot {held['moonshot']}) | {held['held']['ours']:g} | {held['held']['score_sde']:g} "
        "buffers | | |"
    )
    machine = record["machine"]
    versions = machine["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of interleaved runs in one process, in brackets goal / moonshot: "
            f"`{record['command']}` on {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['instruction_set']}, torch {versions['torch']}, Python "
            f"{versions['python']}, {versions['compiler']}.",
        ]
    )


def _ratio(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    text = f"{result['ratio']:.1f}×"
    if "goal" in result:
        text += f" ({result['goal']:g} / {result['moonshot']:g})"
    return text


def with_table(readme: str, text: str) -> str:
    """README's text with the part between the marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = table(json.loads(arguments.record.read_text(encoding="utf-8")))
    if arguments.write:
        README.write_text(with_table(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
