"""Compiles the Triton kernels for GPUs that need not be there and prints what they take, as JSON.

Run as a script, outside the interpreter: `python tests/kernels/aot.py 80 90`.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sbm_fast.kernels import _launch, affine_step, langevin_epsilon, noise

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = "aligned "  # before a type: divisible by 16, as a launch finds out by itself
DENSE = None
NCHW_IN_NHWC = ("i32", 1, "i32")  # strides (sample, channels, pixels) of channels_last

Specification = dict[str, Any]


def source(kernel: Any, given: Specification) -> ASTSource:
    """A launch's signature: types by name, tuples of them, anything else a constant."""
    signature, constants, attributes = {}, {}, {}

    def visit(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(visit(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, str) and re.fullmatch(rf"({ALIGNED})?(\*?[a-z]+\d+)", value):
            if value.startswith(ALIGNED):
                attributes[path] = [["tt.divisibility", 16]]
            return value.removeprefix(ALIGNED)
        constants[path] = value
        return "constexpr"

    for i, name in enumerate(inspect.signature(kernel.fn).parameters):
        signature[name] = visit(given[name], (i,))
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def measure(kernel: Any, given: Specification, warps: int, arch: int) -> dict[str, Any]:
    begin = time.perf_counter()
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(
        source(kernel, given), target=GPUTarget("cuda", arch, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [TOOLS / "cuobjdump", "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [TOOLS / "nvdisasm", "-c", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(v) for key, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return found | {
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "half_loads": len(re.findall(r"ld\.global\.v(?:2\.b32|4\.b16)", ptx)),
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        "converts": compiled.asm["ttgir"].count("ttg.convert_layout"),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?!.*\bNOP\b)\S", sass)),
        "seconds": time.perf_counter() - begin,
    }


def pointer(dtype: str) -> str:
    return f"{ALIGNED}*{dtype}"


def row_arguments(
    state: str = "fp32", network: str | None = "fp32", numel: object = f"{ALIGNED}i32", **change: Any
) -> Specification:
    """What a launch for dense tensors passes."""
    f = None if network is None else (pointer(network), DENSE)
    given = {
        "x": (pointer(state), DENSE), "network": f, "uncond": None, "guidance": None,
        "registers": None, "keys": pointer("i64"), "row": pointer("i32"), "coef": pointer(state),
        "field": pointer("i32"), "epsilon": None, "noise": None, "net_input": None,
        "net_time": pointer(state), "first_bad": pointer("i32"), "workspace": pointer(state),
        "numel": numel, "sizes": None, "tiles": "i32", "batch": "i32", "rows": "i32",
        "row_stride": "i32", "slot_stride": "i32", "REGISTERS": 0, "ON_CHIP": False,
        "COUPLED": True, "WIDE": False, "BLOCK": 1024,
    }  # fmt: skip
    return given | change


def variants() -> dict[str, tuple[Any, Specification, int]]:
    """Name → kernel, launch, warps. Those named `fast …` are the cases that speed is about."""
    step, chip, tiny = affine_step.step, _launch.ON_CHIP, {"BLOCK": 128}
    with_noise = {
        "keys": pointer("i64"), "draw": "i32", "stream": "i32", "numel": f"{ALIGNED}i32",
        "sizes": None, "tiles": "i32", "KIND": "normal", "WIDE": False, "BLOCK": 1024,
    }  # fmt: skip
    last = {"network": (pointer("bf16"), NCHW_IN_NHWC), "net_input": (pointer("bf16"), NCHW_IN_NHWC)}
    both = {"uncond": (pointer("bf16"), DENSE), "guidance": pointer("fp32")}
    held = {"registers": (pointer("fp32"), DENSE), "REGISTERS": 2}
    own = {"ON_CHIP": True, "BLOCK": chip}
    found = {
        "fast fill": (noise.fill, {"out": (pointer("fp32"), DENSE), **with_noise}, 4),
        "fast fill bf16": (noise.fill, {"out": (pointer("bf16"), DENSE), **with_noise}, 4),
        "fill strided": (
            noise.fill,
            {"out": ("*fp32", ("i32", "i32", 1)), **with_noise, "sizes": ("i32",), "WIDE": True},
            4,
        ),
        "words tiny": (
            noise.fill,
            {"out": ("*i32", DENSE), **with_noise, "numel": 1, "KIND": "words", **tiny},
            1,
        ),
        "keys": (
            noise.sample_keys,
            {"out": pointer("i64"), "BLOCK": 256}
            | dict.fromkeys(("seed_low", "seed_high", "first_low", "first_high", "count"), "i32"),
            4,
        ),
        "fast step": (step, row_arguments(), 4),
        "fast step bf16": (step, row_arguments(network="bf16"), 4),
        "fast step fp16": (step, row_arguments(network="fp16"), 4),
        "step start": (step, row_arguments(network=None), 4),
        "step fp64": (step, row_arguments("fp64"), 4),
        "step guided": (step, row_arguments(network="bf16", **both), 4),
        "step registers": (step, row_arguments(**held), 4),
        "step channels_last": (step, row_arguments(sizes=("i32",)) | last, 4),
        "step given noise": (step, row_arguments(noise=(pointer("fp32"), DENSE)), 4),
        "step tiny": (step, row_arguments(numel=1, **tiny), 1),
        "step wide": (step, row_arguments(numel="i64", WIDE=True), 4),
        "step epsilon": (step, row_arguments(epsilon=pointer("fp32")), 4),
        "step on chip": (step, row_arguments(epsilon=pointer("fp32"), **own), 16),
        "step on chip fp64": (step, row_arguments("fp64", epsilon=pointer("fp64"), **own), 16),
        "squares": (langevin_epsilon.tile_squares, row_arguments(), 4),
    }
    for state in ("fp32", "fp64"):
        arguments = row_arguments(state, epsilon=pointer(state))
        kernel = langevin_epsilon.sample_epsilon
        found[f"epsilon on chip {state}"] = (kernel, arguments | own, 16)
        found[f"epsilon of tiles {state}"] = (kernel, arguments, 4)
    return found


if __name__ == "__main__":
    chosen = variants()
    report = {
        f"{name} sm_{arch}": measure(*chosen[name], int(arch))
        for name in chosen
        for arch in sys.argv[1:]
    }
    print(json.dumps(report))
