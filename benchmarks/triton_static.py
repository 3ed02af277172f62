"""What can be said of group_norm_silu's Triton kernels without a GPU: calculated, not run on one.

python -m benchmarks.triton_static [--out benchmarks/results/triton_static.json]

Compiled for sm_90 at batch 256, bfloat16, channels_last, with scale, shift and pre-add: registers,
spills, the bytes of x that a multiprocessor has under way at once, and the instructions an element
against what an H200 could issue at the speed of a copy: 4.3 TB/s, 132 multiprocessors, 1.755 GHz.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.cuda_static import CLAIM, LIMITS

SCRIPT = ROOT / "tests" / "kernels" / "aot_group_norm.py"
RECORD = ROOT / "benchmarks" / "results" / "triton_static.json"
SHAPES = [(channels, side) for channels in (128, 256, 384) for side in (32, 16, 8)]
COPY, ISSUE = 4.3e12, 132 * 128 * 1.755e9
"""Bytes and instructions of threads, a second."""


def record() -> dict[str, Any]:
    names = [f"fast {channels}x{side}" for channels, side in SHAPES]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "90", *names]
    printed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    kernels = json.loads(printed)
    shapes = {
        f"256×{channels}×{side}×{side}": of_shape(kernels[name], 256 * channels * side**2)
        for name, (channels, side) in zip(names, SHAPES, strict=True)
    }
    return {"claim": CLAIM, "command": "python -m benchmarks.triton_static", "shapes": shapes}


def of_shape(kernel: dict[str, Any], elements: int) -> dict[str, Any]:
    threads = 32 * kernel["warps"]
    limits = LIMITS["sm_90"]
    programs = min(
        limits.registers // (threads * kernel["REG"]), limits.threads // threads, limits.blocks
    )
    launched = 256 * kernel["slices"]
    instructions = kernel["instructions"] * threads * launched / elements
    return {
        "registers": kernel["REG"],
        "spills": kernel["STACK"],
        "shared": kernel["shared"],
        "warps": kernel["warps"],
        "programs": launched,
        "programs_per_multiprocessor": programs,
        "bytes_under_way": programs * 2 * elements // launched,
        "bytes_per_element": kernel["bytes"],
        "instructions_per_element": round(instructions, 1),
        "issue_busy_at_copy_speed": round(instructions * COPY / kernel["bytes"] / ISSUE, 2),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| shape | bytes an element | registers | spills | programs an SM | KB under way an SM | "
        "instructions an element | of the issue rate at copy speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, found in result["shapes"].items():
        lines.append(
            f"| {shape} | {found['bytes_per_element']} | {found['registers']} | {found['spills']} "
            f"| {found['programs_per_multiprocessor']} | {found['bytes_under_way'] / 1000:.0f} | "
            f"{found['instructions_per_element']:g} | {found['issue_busy_at_copy_speed']:.0%} |"
        )
    note = (
        f"Calculated for sm_90 from the compiler's output, not run on a GPU: `{result['command']}`."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RECORD)
    result = record()
    parser.parse_args().out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
