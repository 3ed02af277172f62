"""What the laboratory does, most important first, and how long each part may take."""

import sys
from dataclasses import dataclass

TITLES = {
    "build": "build from the checkout",
    "machine": "the machine: bandwidth, launch cost, torch.randn",
    "conformance": "tests marked gpu",
    "em": "Euler–Maruyama update",
    "pc": "predictor–corrector pair in a CUDA graph",
    "noise": "normals",
    "group_norm": "GroupNorm with SiLU, bfloat16 channels_last",
    "network": "the network: rates under it, DDPM++ forward",
    "network_compiled": "DDPM++ forward under torch.compile",
}
MOST = {
    "build": 180,
    "machine": 40,
    "conformance": 110,
    "em": 80,
    "pc": 90,
    "noise": 30,
    "group_norm": 90,
    "network": 70,
    "network_compiled": 200,
}
"""Seconds. Their sum is more than there is: a phase that needs less leaves the rest to others.

The last one, of those that are run, may take all that is left."""


@dataclass(frozen=True)
class Phase:
    """One process.

    Attributes:
        command: its arguments; `{part}` stands for the JSON file that it keeps writing.
        most: seconds after which it is ended.
        least: seconds without which it is not begun.
        log: the file in the laboratory's folder that its output goes to.
    """

    name: str
    title: str
    command: tuple[str, ...]
    most: float
    least: float = 10.0
    log: str = "lab.log"


def all_phases(dry_run: bool) -> tuple[Phase, ...]:
    """Every phase in its order."""
    own = {"build": "benchmarks.gpu.build", "conformance": "benchmarks.gpu.conformance"}
    logs = {"build": "build.log", "conformance": "tests.log"}
    phases = []
    for name, title in TITLES.items():
        module = (own[name],) if name in own else ("benchmarks.gpu.worker", name)
        dry = ("--dry-run",) if dry_run else ()
        command = (sys.executable, "-m", *module, "{part}", *dry)
        least = 2.0 if dry_run else 10.0
        phases.append(Phase(name, title, command, MOST[name], least, logs.get(name, Phase.log)))
    return tuple(phases)
