"""Compiles the Triton kernels for GPUs that need not be there and prints what they take, as JSON.

Run as a script, outside the interpreter: `python tests/kernels/aot.py 90 [names …]`.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from sbm_fast.kernels import _launch, affine_step, error_norm, hutchinson, langevin_epsilon, noise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = "aligned "  # before a type: divisible by 16, as a launch finds out by itself
DENSE = None
MISSING = (None, None)
NCHW_IN_NHWC = ("i32", 1, "i32")  # strides (sample, channels, pixels) of channels_last

Specification = dict[str, Any]


def source(kernel: Any, given: Specification) -> ASTSource:
    """A launch's signature: types by name, tuples of them, anything else a constant."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature, constants, attributes = {}, {}, {}

    def visit(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(visit(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, str) and re.fullmatch(rf"({ALIGNED})?(\*?[a-z]+\d+)", value):
            if value.startswith(ALIGNED) and names[path[0]] not in _launch.UNSPECIALISED:
                attributes[path] = [["tt.divisibility", 16]]
            return value.removeprefix(ALIGNED)
        constants[path] = value
        return "constexpr"

    for i, name in enumerate(names):
        signature[name] = visit(given[name], (i,))
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def measure(
    kernel: Any, given: Specification, warps: int, arch: int, count: bool = False, **options: int
) -> dict[str, Any]:
    """With `count`, the instructions too, for which the code must be disassembled."""
    begin = time.perf_counter()
    compiled = triton.compile(
        source(kernel, given),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, **_launch.ARITHMETIC, **options},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [TOOLS / "cuobjdump", "-res-usage", *(("-sass",) if count else ()), cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(v) for key, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return found | {
        "shared": compiled.metadata.shared,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", usage, re.M)),
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "half_loads": len(re.findall(r"ld\.global\.v2\.b32", ptx)),
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        "converts": compiled.asm["ttgir"].count("ttg.convert_layout"),
        "seconds": time.perf_counter() - begin,
    }


def pointer(dtype: str) -> str:
    return f"{ALIGNED}*{dtype}"


def row_arguments(
    state: str = "fp32",
    network: str | None = "fp32",
    numel: object = f"{ALIGNED}i32",
    **change: Any,
) -> Specification:
    """What a launch for dense tensors passes."""
    f = MISSING if network is None else (pointer(network), DENSE)
    given = {
        "x": (pointer(state), DENSE), "network": f, "uncond": MISSING, "guidance": None,
        "registers": MISSING, "keys": pointer("i64"), "row": pointer("i32"), "coef": pointer(state),
        "field": pointer("i32"), "epsilon": None, "noise": MISSING, "net_input": MISSING,
        "net_time": pointer(state), "first_bad": pointer("i32"), "workspace": pointer(state),
        "numel": numel, "sizes": (1,), "tiles": "i32", "batch": "i32", "rows": "i32",
        "row_stride": "i32", "slot_stride": "i32", "REGISTERS": 0, "ON_CHIP": False,
        "COUPLED": True, "WIDE": False, "BLOCK": 1024,
    }  # fmt: skip
    return given | change


def flow_arguments(
    state: str = "fp32", network: str = "fp32", wide: str = "fp64", **change: Any
) -> Specification:
    """What launches of the probability flow's ops pass for dense tensors."""
    f, of_state = (pointer(network), DENSE), (pointer(state), DENSE)
    given = {
        "drift": of_state, "divergence": pointer(wide), "sums": None, "x": of_state, "network": f,
        "product": f, "keys": pointer("i64"), "coef": pointer("fp64"), "draw": "i32",
        "stream": "i32", "numel": f"{ALIGNED}i32", "sizes": (1,), "tiles": "i32", "batch": "i32",
        "sample_step": "i32", "column_step": "i32", "product_step": f"{ALIGNED}i32",
        "out": pointer(state), "registers": of_state, "weights": pointer("fp64"),
        "register_step": f"{ALIGNED}i32", "STAGES": 8,
        "GAUSSIAN": False, "ON_CHIP": False, "WIDE": False, "BLOCK": 1024,
    }  # fmt: skip
    given |= dict.fromkeys(("atol_low", "atol_high", "rtol_low", "rtol_high"), "i32")
    return given | change


def flow_variants() -> dict[str, tuple[Any, Specification, int]]:
    tiles, own = {"sums": pointer("fp64")}, {"ON_CHIP": True, "BLOCK": _launch.ON_CHIP}
    given = flow_arguments
    channels_last = {"product": ("*bf16", NCHW_IN_NHWC), "sizes": ("i32",)}
    narrow = given("fp32", "fp32", "fp32", GAUSSIAN=True, sums=pointer("fp32"))
    return {
        "fast slope": (hutchinson.slope, given(**tiles), 4),
        "fast slope on chip": (hutchinson.slope, given(**own), 16),
        "slope bf16": (hutchinson.slope, given("fp32", "bf16", **tiles), 4),
        "slope gaussian fp32": (hutchinson.slope, narrow, 4),
        "slope fp64": (hutchinson.slope, given("fp64", "fp64", GAUSSIAN=True, **tiles), 4),
        "slope channels_last": (hutchinson.slope, given(**tiles | channels_last), 4),
        "slope without products": (hutchinson.slope, given(product=MISSING, divergence=None), 4),
        "slope wide": (hutchinson.slope, given(numel="i64", WIDE=True, **tiles), 4),
        "divergence of sums": (hutchinson.divergence_of_sums, given(**tiles), 4),
        "fast error": (error_norm.error, given(sums=pointer("fp32")), 4),
        "fast error on chip": (error_norm.error, given(**own), 16),
        "error fp64": (error_norm.error, given("fp64", **tiles), 4),
        "error on chip fp64": (error_norm.error, given("fp64", **own), 16),
        "error of sums": (error_norm.error_of_sums, given(sums=pointer("fp32")), 4),
    }


def variants() -> dict[str, tuple[Any, Specification, int]]:
    """Name → kernel, launch, warps: every kernel and dtype, and every branch of their constants.

    The cases that speed is about are called `fast …`.
    """
    step, tiny = affine_step.step, {"BLOCK": 128, "numel": 1}
    fill = {
        "keys": pointer("i64"), "draw": "i32", "stream": "i32", "numel": f"{ALIGNED}i32",
        "sizes": (1,), "tiles": "i32", "KIND": "normal", "WIDE": False, "BLOCK": 1024,
    }  # fmt: skip
    bf16, last = (pointer("bf16"), DENSE), (pointer("bf16"), NCHW_IN_NHWC)
    halves = ("seed_low", "seed_high", "first_low", "first_high")
    of_keys = {"out": pointer("i64"), "count": "i32", "BLOCK": 256, **dict.fromkeys(halves, "i32")}
    guided = {"uncond": bf16, "guidance": pointer("fp32")}
    held = {"registers": (pointer("fp32"), DENSE), "REGISTERS": 2}
    wide = {"numel": "i64", "WIDE": True}
    own = {"ON_CHIP": True, "BLOCK": _launch.ON_CHIP}
    given = {"noise": (pointer("fp32"), DENSE)}
    strided = {"out": ("*bf16", ("i32", "i32", 1)), "sizes": ("i32",), "WIDE": True}

    def row(*arguments: Any, **change: Any) -> Specification:
        return row_arguments(*arguments, **change)

    found = {
        "fast fill": (noise.fill, fill | {"out": (pointer("fp32"), DENSE)}, 4),
        "fill strided": (noise.fill, fill | strided | {"KIND": "uniform"}, 4),
        "words tiny": (noise.fill, fill | tiny | {"out": ("*i32", DENSE), "KIND": "words"}, 1),
        "keys": (noise.sample_keys, of_keys, 4),
        "fast step": (step, row(), 4),
        "fast step bf16": (step, row(network="bf16"), 4),
        "step fp16 epsilon": (step, row(network="fp16", epsilon=pointer("fp32")), 4),
        "step fp64": (step, row("fp64"), 4),
        "step guided registers": (step, row(network="bf16", **guided, **held), 4),
        "step channels_last": (step, row(sizes=("i32",), net_input=last) | {"network": last}, 4),
        "step start tiny": (step, row(network=None, **tiny), 1),
        "step wide given": (step, row(**wide, **given), 4),
    }
    for state in ("fp32", "fp64"):
        of_epsilon = row(state, epsilon=pointer(state))
        kernel = langevin_epsilon.sample_epsilon
        found[f"step on chip {state}"] = (step, of_epsilon | own, 16)
        found[f"squares {state}"] = (langevin_epsilon.tile_squares, row(state), 4)
        found[f"epsilon on chip {state}"] = (kernel, of_epsilon | own, 16)
        found[f"epsilon of tiles {state}"] = (kernel, of_epsilon | {"COUPLED": state == "fp32"}, 4)
    return found | flow_variants()


def report(arch: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    chosen = variants()
    return {name: measure(*chosen[name], arch) for name in names or chosen}


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]), sys.argv[2:])))
