"""README's speed table, made from the record."""

from typing import Any


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
        cells = [ratio_cell(results.get(k)) for k in ("score_sde", "tuned", "torch.compile")]
        if "torch.randn" in results:
            cells[1] = f"{ratio_cell(results['torch.randn'])} torch.randn"
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


def ratio_cell(result: dict[str, Any] | None) -> str:
    """A ratio, with its goal and moonshot in brackets; empty for none."""
    if result is None:
        return ""
    return with_goals(f"{result['ratio']:.1f}×", result, "g")


def with_goals(text: str, result: dict[str, Any], form: str) -> str:
    """A figure's text, with its goal and moonshot in brackets where it has them."""
    if "goal" in result:
        text += f" ({result['goal']:{form}} / {result['moonshot']:{form}})"
    return text
