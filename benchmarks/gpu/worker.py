"""One phase's process: goes through the cases of a module and writes the part after each.

python -m benchmarks.gpu.worker PHASE PART [--dry-run]

A module has `cases(context)`: names and generators of entries. An entry of the same name takes the
place of the one before, so a case can give what it has before it goes on to something slow.
"""

import argparse
import gc
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.context import Case, Context, clocks, describe
from benchmarks.gpu.files import write_json


def work(cases: dict[str, Case], context: Context, part: Path) -> bool:
    """Runs every case; True when none failed, nor anything compared in one."""
    record: dict[str, Any] = {
        "planned": list(cases),
        "clocks_before": clocks(context),
        "entries": {},
        "failures": {},
    }

    def write() -> None:
        record["left_out"] = [name for name in cases if name not in seen]
        write_json(part, record)

    seen: set[str] = set()
    write()
    for name, case in cases.items():
        begin = time.perf_counter()
        print(f"-- {name}", flush=True)
        try:
            for entry in case(context):
                taken = {"seconds_taken": round(time.perf_counter() - begin, 1)}
                record["entries"][name] = entry | taken
                write()
        except Exception as error:
            traceback.print_exc()
            record["failures"][name] = describe(error)
        seen.add(name)
        write()
        gc.collect()
        if context.on_gpu:
            torch.cuda.empty_cache()
    record["clocks_after"] = clocks(context)
    write()
    return not record["failures"] and not any(
        entry.get("failed") for entry in record["entries"].values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("phase")
    parser.add_argument("part", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    try:
        context = Context.of(arguments.dry_run)
    except RuntimeError as error:
        write_json(arguments.part, {"failures": {"start": describe(error)}})
        sys.exit(str(error))
    if context.dry_run:
        # The import of the compiler alone takes longer than the rest.
        torch.compile = lambda function, **options: function
    module = importlib.import_module(f"benchmarks.gpu.{arguments.phase}")
    sys.exit(0 if work(module.cases(context), context, arguments.part) else 1)


if __name__ == "__main__":
    main()
