"""The tables of README and docs, made from the records in benchmarks/results.

python -m benchmarks.readme          prints them
python -m benchmarks.readme --write  puts them into README.md and docs/*.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import cuda_static, divergence, likelihood_tables, markdown, network, triton_static
from benchmarks.checkout import ROOT
from benchmarks.gpu import readme as gpu
from benchmarks.report import RECORD as CPU_RECORD

README = ROOT / "README.md"
LIKELIHOOD = ROOT / "docs" / "likelihood.md"
NETWORK = ROOT / "docs" / "network.md"


def sections() -> dict[Path, dict[str, str]]:
    """By file, what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""
    of_likelihoods = likelihood_tables.sections()
    of_network = {"network": network.markdown(_read(network.RECORD))}
    of_norms = {"group norm static": triton_static.table(_read(triton_static.RECORD))}
    profile = {"network profile": network.profile_table(_read(network.RECORD))}
    in_readme = {
        "speed": markdown.table(_read(CPU_RECORD)),
        "likelihood": of_likelihoods.pop("likelihood"),
        **of_network,
        "gpu": gpu.markdown(),
        "cuda static": static_figures(_read(cuda_static.RECORD)),
    }
    of_likelihoods |= divergence.sections()
    return {README: in_readme, LIKELIHOOD: of_likelihoods, NETWORK: of_network | profile | of_norms}


def static_figures(record: dict[str, Any]) -> str:
    """The hot loop of the step for sm_90: what the compiler made of it, and what that predicts."""
    lines = [
        "| network output | registers | spills | blocks of 256 threads an SM | instructions an "
        "element | of the issue rate at copy speed | predicted limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for output, loop in record["fast_path"]["sm_90"].items():
        kernel = record["kernels"]["sm_90"][loop["kernel"]]
        busy = loop["h200"]["busy_at_memory_speed"]["issue"]
        lines.append(
            f"| {output.removesuffix(' network')} | {kernel['registers']} | "
            f"{kernel['spill_stores'] + kernel['spill_loads']} | "
            f"{kernel['blocks_per_multiprocessor']} | {loop['instructions_per_element']:g} | "
            f"{busy:.0%} | {loop['h200']['limited_by']} |"
        )
    nvcc = record["nvcc"].partition("/")[0].removeprefix("Build ")
    note = f"Calculated for sm_90 from the disassembly, not run on a GPU: `{record['command']}`"
    note += (
        ". Once round the loop; what a block does before it is not counted (docs/performance.md)"
    )
    return "\n".join([*lines, "", f"{note}, nvcc {nvcc}."])


def with_section(document: str, name: str, text: str) -> str:
    """A document with one section replaced; ValueError where its marks are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, mark, rest = document.partition(begin)
    if not mark or end not in rest:
        raise ValueError(f"no section between {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for path, parts in sections().items():
        if not write:
            print("\n\n".join(parts.values()))
            continue
        text = path.read_text(encoding="utf-8")
        for name, section in parts.items():
            text = with_section(text, name, section)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
