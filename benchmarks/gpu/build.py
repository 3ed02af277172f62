"""Builds the checkout in place, without a network.

python -m benchmarks.gpu.build PART [--dry-run]

No pip: `setup.py build_ext --inplace` needs setuptools, ninja and the compilers only. A dry run
does not compile: it checks that the command line is understood.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.files import write_json

COMMAND = [sys.executable, "setup.py", "build_ext", "--inplace"]


def device_arch() -> str:
    """The device's own, e.g. "9.0+PTX"; empty where torch does not tell. Asked in a process."""
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='.')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return f"{done.stdout.strip()}+PTX" if done.returncode == 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("part", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    command = [*COMMAND, "--help"] if arguments.dry_run else COMMAND
    part: dict[str, object] = {"command": shlex.join(command), "compiled": not arguments.dry_run}
    write_json(arguments.part, part)
    begin = time.perf_counter()
    environment = dict(os.environ)
    if not arguments.dry_run and (arch := device_arch()):
        part["arch_list"] = environment["TORCH_CUDA_ARCH_LIST"] = arch
    part["warnings_as_errors"] = True
    done = subprocess.run(command, env=environment)
    if done.returncode:  # perhaps a compiler newer than ours, which warns of more
        part["warnings_as_errors"] = False
        done = subprocess.run(command, env=environment | {"SBM_FAST_WERROR": "0"})
    part["build_seconds"] = round(time.perf_counter() - begin, 1)
    write_json(arguments.part, part)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
