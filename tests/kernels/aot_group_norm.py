"""Compiles the kernels of group normalisation as launches for given shapes would, and prints what
they take, as JSON.

Run as a script, outside the interpreter: `python tests/kernels/aot_group_norm.py 90 [names …]`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import aot
import torch
from sbm_fast.kernels import _groups, group_norm_silu, group_norm_silu_product

WIDTHS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS["fp64"] = torch.float64
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        group_norm_silu.hold, group_norm_silu.chunk_statistics, group_norm_silu.normalise_chunk,
        group_norm_silu_product.hold_product, group_norm_silu_product.chunk_sums,
        group_norm_silu_product.project_chunk,
    )
}  # fmt: skip


def number(v: int) -> object:
    """The type of an integer argument: 1 is a constant, multiples of 16 are known as such."""
    return 1 if v == 1 else f"{aot.ALIGNED}i32" if v % 16 == 0 else "i32"


def launch(
    name: str,
    batch: int,
    channels: int,
    side: int,
    dtype: str = "bf16",
    last: bool = True,
    rest: bool = False,
    forward: bool = False,
) -> dict[str, Any]:
    """What one launch passes: weight, bias, scale, shift and add in float32; `rest`: with total and
    residual. Its bytes an element are those that it must read from and write to device memory."""
    product = name in ("hold_product", "chunk_sums", "project_chunk")
    values = (group_norm_silu_product if product else group_norm_silu).VALUES
    pixels, groups = side**2, min(32, channels // 4)
    how = _groups.cut(batch, channels, pixels, groups, WIDTHS[dtype], last, values)
    held = name.startswith("hold")
    assert how.held == held, f"{name} is not what runs"
    sample = number(channels * pixels)
    step = (sample, number(channels), 1) if last else (sample, 1, number(pixels))
    view, wide = (aot.pointer(dtype), step), aot.pointer("fp64" if dtype == "fp64" else "fp32")
    vectors = ("scale", "shift", "add", "weight_dot", "bias_dot")
    given = dict.fromkeys((f"{vector}_step" for vector in vectors), number(2 * channels))
    given |= dict.fromkeys(_groups.UNSPECIALISED, "i32")
    given |= dict.fromkeys(("weight", "bias", *vectors), aot.pointer("fp32"))
    given |= {} if forward else dict.fromkeys(vectors[3:])
    given |= dict.fromkeys(("sums", "by_channel"), None if forward else wide)
    given |= dict.fromkeys(("total", "residual"), view if rest else aot.MISSING)
    given |= dict.fromkeys(("out", "x", "h", "given"), view)
    given |= {"stats": wide, "partial": wide, "pixels": number(pixels), "SILU": True}
    given |= {"FORWARD": forward, **how.constants}
    given["CHUNKS"] = _groups.triton.next_power_of_2(how.chunks)
    options = {option: given.pop(option) for option in ("num_warps", "maxnreg")}
    moved = 1 + product + rest if name != "chunk_statistics" else 1 + rest
    writes = 0 if name.startswith("chunk") else 1 + (rest and not product)
    return {
        "kernel": KERNELS[name], "given": given, "options": options, "how": how,
        "bytes": (moved + writes) * WIDTHS[dtype].itemsize,
    }  # fmt: skip


def variants() -> dict[str, dict[str, Any]]:
    """Every kernel, each dtype, and DDPM++'s shapes at batch 256; `fast …`: what speed is about."""
    found = {
        f"fast {channels}x{side}": launch("hold", 256, channels, side)
        for channels in (128, 256, 384)
        for side in (32, 16, 8)
    }
    found |= {
        "fast rest": launch("hold", 256, 128, 32, rest=True),
        "fast NCHW": launch("hold", 256, 128, 32, last=False),
        "batch 1": launch("hold", 1, 128, 32),
        "fp32": launch("hold", 256, 128, 32, "fp32", rest=True),
        "fp16": launch("hold", 256, 256, 16, "fp16"),
        "fp64": launch("hold", 256, 128, 16, "fp64", rest=True),
        "chunks 1": launch("chunk_statistics", 1, 128, 64),
        "chunks 2": launch("normalise_chunk", 1, 128, 64),
        "chunks rest 1": launch("chunk_statistics", 256, 128, 64, rest=True),
        "chunks rest 2": launch("normalise_chunk", 256, 128, 64, rest=True),
        "chunks fp32 1": launch("chunk_statistics", 256, 128, 128, "fp32"),
        "chunks fp32 2": launch("normalise_chunk", 256, 128, 128, "fp32"),
        "chunks NCHW 1": launch("chunk_statistics", 16, 128, 256, last=False),
        "chunks NCHW 2": launch("normalise_chunk", 16, 128, 256, last=False),
        "chunks fp64 1": launch("chunk_statistics", 1, 128, 64, "fp64"),
        "chunks fp64 2": launch("normalise_chunk", 1, 128, 64, "fp64"),
        "chunks vjp 1": launch("chunk_sums", 256, 384, 32),
        "chunks vjp 2": launch("project_chunk", 256, 384, 32),
        "chunks jvp 1": launch("chunk_sums", 1, 128, 64, forward=True),
        "chunks jvp 2": launch("project_chunk", 1, 128, 64, forward=True),
    }
    for forward in (False, True):
        name = "jvp" if forward else "vjp"
        found[f"{name} 128x32"] = launch("hold_product", 256, 128, 32, forward=forward)
        found[f"{name} fp32"] = launch("hold_product", 256, 256, 16, "fp32", forward=forward)
        found[f"{name} fp64"] = launch("hold_product", 256, 256, 8, "fp64", forward=forward)
    return found


def report(arch: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    chosen = variants()
    found = {}
    for name in names or chosen:
        v = chosen[name]
        given, how = v["given"], v["how"]
        warps, most = (v["options"][option] for option in ("num_warps", "maxnreg"))
        count = name.startswith("fast") and arch == 90
        taken = aot.measure(v["kernel"], given, warps, arch, count, maxnreg=most)
        lanes = given["PIXELS"] * given["GROUPS"] * given["DEPTH"]
        facts = {"warps": warps, "lanes": lanes, "bytes": v["bytes"], "slices": how.slices}
        found[name] = taken | facts | {"chunks": how.chunks}
    return found


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]), sys.argv[2:])))
