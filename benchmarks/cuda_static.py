"""What can be said of the CUDA kernels without a GPU: calculated, not run on one.

python -m benchmarks.cuda_static [--out benchmarks/results/cuda_static.json]

For sm_80 and sm_90: registers, spills, stack and shared memory as ptxas reports them; the occupancy
these allow; and for the fast path of the step the instructions of its hot loop by the unit that
executes them, with the rates at which an H200 could retire them against the rate at which it could
move the 12 (10 with a bfloat16 network) bytes an element that the step must.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import sass
from benchmarks.checkout import ROOT, setup_module

CSRC = ROOT / "csrc"
RECORD = ROOT / "benchmarks" / "results" / "cuda_static.json"
CACHE = ROOT / "build" / "cubins"
ARCHS = ("sm_80", "sm_90")
CLAIM = "calculated from the compiler's output, not run on a GPU"


@dataclass(frozen=True)
class Limits:
    """One multiprocessor. Bytes, and results a clock for the units."""

    registers: int = 65536
    register_unit: int = 256  # per warp
    threads: int = 2048
    blocks: int = 32
    shared: int = 0
    shared_of_block: int = 0
    shared_reserved: int = 1024  # of every block, by the system
    shared_unit: int = 128


LIMITS = {
    "sm_80": Limits(shared=164 * 1024, shared_of_block=163 * 1024),
    "sm_90": Limits(shared=228 * 1024, shared_of_block=227 * 1024),
}
# Instructions a clock and multiprocessor, in threads.
UNITS = {
    "issue": 128,
    "FP32": 128,
    "FP64": 64,
    "XU": 16,
    "multiply": 64,
    "wide multiply": 32,
    "integer": 64,
}
H200 = {"multiprocessors": 132, "clock_hz": 1.755e9, "bytes_per_second": 4.3e12}
SOURCES = {
    "limits": "CUDA C++ Programming Guide, technical specifications of compute capability 8.0, 9.0",
    "units": (
        "the same, throughput of arithmetic instructions (9.0). IMAD.WIDE and IMAD.HI are counted "
        "at half the rate of IMAD and conversions other than I2FP/F2FP at the XU's: the guide says "
        "neither, and these are the slower readings"
    ),
    "H200": (
        "132 multiprocessors; 1.755 GHz, the clock that H100 SXM data are stated for (1.98 GHz is "
        "the highest); 4.3 TB/s: what others' copies reach of its 4.8 TB/s"
    ),
}


@dataclass
class Resources:
    """What ptxas says of one kernel; bytes but for registers."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    barriers: int = 0


def parse_ptxas(log: str) -> dict[str, Resources]:
    """Kernels by mangled name, from the messages of `ptxas -v`."""
    out: dict[str, Resources] = {}
    current: Resources | None = None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for", line):
            current = out.setdefault(found[1], Resources())
        elif found := re.search(r"Function properties for (\S+)", line):
            current = out.get(found[1])  # a function that is no kernel has none
        elif current is None:
            continue
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            current.stack, current.spill_stores, current.spill_loads = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found[1])
            for name, pattern in (("shared", r"(\d+) bytes smem"), ("barriers", r"(\d+) barriers")):
                if number := re.search(pattern, line):
                    setattr(current, name, int(number[1]))
    return out


def parse_max_threads(elf: str) -> dict[str, int]:
    """The block size that __launch_bounds__ allows, from `cuobjdump -elf`."""
    out: dict[str, int] = {}
    name = ""
    lines = elf.splitlines()
    for n, line in enumerate(lines):
        if found := re.match(r"\.nv\.info\.(\S+)", line):
            name = found[1]
        elif "EIATTR_MAX_THREADS" in line:
            value = re.search(r"Value:\s*(0x[0-9a-f]+)", " ".join(lines[n + 1 : n + 3]))
            if value and name:
                out[name] = int(value[1], 16)
    return out


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(
    limits: Limits, threads: int, registers: int, shared: int
) -> dict[str, int]:
    """How many blocks each resource allows; the smallest number counts."""
    warps = -(-threads // 32)
    of_warp = _up(max(registers, 1) * 32, limits.register_unit)
    shared_of_block = _up(shared + limits.shared_reserved, limits.shared_unit)
    return {
        "threads": limits.threads // (warps * 32),
        "registers": limits.registers // of_warp // warps,
        "shared": limits.shared // shared_of_block if shared <= limits.shared_of_block else 0,
        "blocks": limits.blocks,
    }


def predict(counts: dict[str, int], elements: int, bytes_per_element: float) -> dict[str, Any]:
    """Elements a second that an H200 could do by each resource, and which is the least."""
    clocks = float(H200["multiprocessors"]) * float(H200["clock_hz"])
    needs = {"issue": sum(counts.values())}
    needs |= {unit: counts.get(unit, 0) for unit in UNITS if unit != "issue"}
    # Plain and wide products share a unit.
    weighted = needs.pop("multiply") + 2 * needs.pop("wide multiply")
    rates = {unit: clocks * UNITS[unit] * elements / n for unit, n in needs.items() if n}
    if weighted:
        rates["multiply"] = clocks * UNITS["multiply"] * elements / weighted
    rates["memory"] = float(H200["bytes_per_second"]) / bytes_per_element
    least = min(rates, key=lambda unit: rates[unit])
    busiest = {unit: round(rates["memory"] / rate, 3) for unit, rate in rates.items()}
    return {
        "elements_per_second": {unit: float(f"{rate:.3g}") for unit, rate in rates.items()},
        "busy_at_memory_speed": busiest,
        "limited_by": least,
    }


def tool(name: str) -> str | None:
    """nvcc, cuobjdump or nvdisasm: in CUDA_HOME, in PATH, or in triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = [Path(h, "bin") for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if h]
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = [p / name for p in places if (p / name).is_file()]
    return str(found[0]) if found else shutil.which(name)


@dataclass(frozen=True)
class Compiled:
    source: str
    arch: str
    cubin: Path
    log: str


def compile_all(csrc: Path = CSRC, cache: Path = CACHE) -> list[Compiled]:
    """Every csrc/*.cu for every arch with the package's own flags; kept for the same sources.

    Raises: RuntimeError with nvcc's messages.
    """
    nvcc = tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc: not in CUDA_HOME, /usr/local/cuda or PATH")
    flags = setup_module().NVCC_FLAGS
    digest = hashlib.sha256(f"{nvcc} {flags}".encode())
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".h", ".cuh", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(cache.iterdir(), key=lambda p: p.stat().st_mtime)[:-3]:
        shutil.rmtree(old, ignore_errors=True)

    def one(source: Path, arch: str) -> Compiled:
        cubin = folder / f"{source.stem}.{arch}.cubin"
        log = cubin.with_suffix(".log")
        if not log.exists():
            command = [nvcc, *flags, f"-arch={arch}", "-Xptxas=-v", f"-I{csrc}", "-cubin"]
            run = subprocess.run(
                [*command, str(source), "-o", str(cubin)], capture_output=True, text=True
            )
            if run.returncode:
                raise RuntimeError(f"{source.name} for {arch}:\n{run.stdout}{run.stderr}")
            log.write_text(run.stdout + run.stderr)
        return Compiled(source.name, arch, cubin, log.read_text())

    jobs = [(s, a) for s in sorted(csrc.glob("*.cu")) for a in ARCHS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: one(*job), jobs))


def output_of(program: str | None, *arguments: str) -> str:
    if program is None:
        return ""
    return subprocess.run([program, *arguments], capture_output=True, text=True).stdout


def readable(names: Iterable[str]) -> dict[str, str]:
    """Kernels' names as they are written, without arguments and the file's own namespace."""
    names = list(names)
    filt = shutil.which("c++filt")
    if not names or filt is None:
        return {n: n for n in names}
    run = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True)
    out = {}
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|sbm::|_GLOBAL__N__\w+::|^void ", "", line)
        depth, end = 0, len(short)
        for n, letter in enumerate(short):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = n
                break
        out[name] = short[:end]
    return out


# The step's fast path: the kernel, the bytes of an element, and what a row does there that makes
# noise and reads x and F. Four elements are two Box–Muller pairs, each with a square root.
FAST = {
    "float32 network": (12, r"step<float, DenseIo, false, false", {"LDG.E.128": 2, "STG.E.128": 1}),
    "bfloat16 network": (
        10,
        r"step<float, DenseIo, false, false",
        {"LDG.E.128": 1, "LDG.E.64": 1, "STG.E.128": 1},
    ),
}
NORMALS = {"MUFU.RSQ": 2}
ELEMENTS = 4


def kernels_of(c: Compiled, program: str | None) -> dict[str, dict[str, Any]]:
    """Resources and occupancy of every kernel in one cubin, by readable name."""
    resources = parse_ptxas(c.log)
    names = readable(resources)
    threads = parse_max_threads(output_of(program, "-elf", str(c.cubin)))
    out = {}
    for mangled, r in resources.items():
        block = threads.get(mangled, 256)
        by = blocks_per_multiprocessor(LIMITS[c.arch], block, r.registers, r.shared)
        fits = min(by.values())
        out[names[mangled]] = asdict(r) | {
            "threads": block,
            "blocks_by": by,
            "blocks_per_multiprocessor": fits,
            "occupancy": round(fits * block / LIMITS[c.arch].threads, 3),
        }
    return out


def fast_path(c: Compiled, program: str | None) -> dict[str, Any]:
    """Instruction counts and predictions of the fast path's ways through one cubin."""
    code = sass.functions(output_of(program, "-c", str(c.cubin)))
    names = readable(code)
    out: dict[str, Any] = {}
    for title, (size, pattern, access) in FAST.items():
        for mangled, text in code.items():
            if not re.search(pattern, names[mangled]):
                continue
            found = sass.hot_way(text, NORMALS | access)
            if found is None:
                continue
            way, loop = found
            counts = sass.by_class(way)
            out[title] = {
                "kernel": names[mangled],
                "counted": "once round its loop" if loop else "the whole kernel",
                "instructions_per_element": round(len(way) / ELEMENTS, 2),
                "per_element": {k: round(n / ELEMENTS, 2) for k, n in counts.items()},
                "bytes_per_element": size,
            }
            if c.arch == "sm_90":
                out[title]["h200"] = predict(counts, ELEMENTS, size)
    return out


def record() -> dict[str, Any]:
    compiled = compile_all()
    elf, disassembler = tool("cuobjdump"), tool("nvdisasm")
    nvcc = output_of(tool("nvcc"), "--version").strip().splitlines()
    result: dict[str, Any] = {
        "claim": CLAIM,
        "command": "python -m benchmarks.cuda_static",
        "nvcc": nvcc[-1] if nvcc else "",
        "flags": setup_module().NVCC_FLAGS,
        "limits": {arch: asdict(limits) for arch, limits in LIMITS.items()},
        "units_per_clock": UNITS,
        "h200": H200,
        "sources": SOURCES,
        "kernels": {arch: {} for arch in ARCHS},
        "dynamic_shared": (
            "not in these figures: every step keeps its samples' coefficients there, one with "
            "norms in one launch also 4 KiB of noise a tile"
        ),
        "fast_path": {arch: {} for arch in ARCHS},
    }
    for c in compiled:
        result["kernels"][c.arch] |= kernels_of(c, elf)
        result["fast_path"][c.arch] |= fast_path(c, disassembler)
    if disassembler is None:
        result["fast_path"] = "no nvdisasm in CUDA_HOME, PATH or triton's wheel: not counted"
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"CUDA kernels: {result['claim']}", ""]
    lines.append(
        f"{'kernel':<58}{'arch':<7}{'regs':>5}{'spill':>6}{'stack':>6}{'smem':>7}{'occ':>6}"
    )
    for arch, kernels in result["kernels"].items():
        for name, k in sorted(kernels.items()):
            spill = k["spill_stores"] + k["spill_loads"]
            lines.append(
                f"{name[:57]:<58}{arch:<7}{k['registers']:>5}{spill:>6}{k['stack']:>6}"
                f"{k['shared']:>7}{k['occupancy']:>6.2f}"
            )
    if isinstance(result["fast_path"], str):
        return "\n".join([*lines, "", result["fast_path"]])
    for arch, paths in result["fast_path"].items():
        for title, path in paths.items():
            lines += ["", f"{title}, {arch}: {path['kernel']}, {path['counted']}"]
            units = ", ".join(f"{k} {n:g}" for k, n in path["per_element"].items())
            lines.append(f"  {path['instructions_per_element']:g} instructions an element: {units}")
            if "h200" in path:
                h = path["h200"]
                rates = ", ".join(f"{k} {r:.2e}" for k, r in h["elements_per_second"].items())
                lines.append(f"  H200, elements/s allowed by: {rates}; least: {h['limited_by']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RECORD)
    out: Path = parser.parse_args().out
    result = record()
    print(table(result))
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
