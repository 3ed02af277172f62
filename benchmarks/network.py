"""Times the network's blocks and a whole U-Net beside eager PyTorch and torch.compile.

python -m benchmarks.network          all of it, about a quarter of an hour on two cores
python -m benchmarks.network --quick  without torch.compile; prints, records nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import plain
from benchmarks.checkout import ROOT
from benchmarks.ddpmpp_eager import EagerDDPMpp
from benchmarks.machine import begin, facts
from benchmarks.markdown import with_goals
from benchmarks.measure import Measurement, measure, threads
from benchmarks.report import entry, table
from benchmarks.workloads import COMPILED, OURS, Case, Goal, Workload
from sbm_fast.nn import UNet
from sbm_fast.nn.conv import packed
from sbm_fast.nn.functional import group_norm_silu
from sbm_fast.nn.peer_weights import from_peer

EAGER, EAGER_NHWC, AUTOTUNED = "eager", "eager, channels_last", "torch.compile, max-autotune"
RECORD = ROOT / "benchmarks" / "results" / "network.json"
GROUPS, EPS = 32, 1e-6


@dataclass(frozen=True)
class Calls(Workload):
    """A step is one call of a function."""

    @abstractmethod
    def function(self, label: str) -> Callable[[], Tensor]:
        """What is called, for one of the implementations."""

    def case(self, label: str) -> Case:
        function = self.function(label)

        @torch.no_grad()
        def run() -> None:
            for _ in range(self.steps):
                function()

        return Case(lambda: None, run)


@dataclass(frozen=True)
class Normalisation(Calls):
    """GroupNorm and SiLU of an NHWC tensor; `film`: with a time vector added before, FiLM behind.

    All get the same tensors, in memory for their output that is new each call.
    """

    film: bool = False
    compiled: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        return (EAGER, *((COMPILED, AUTOTUNED) if self.compiled else ()), OURS)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(1)
        batch, channels = self.shape[:2]
        x = torch.randn(self.shape, generator=source).to(memory_format=torch.channels_last)
        given = {"x": 2 * x + 1, "weight": torch.randn(channels, generator=source)}
        given["bias"] = torch.randn(channels, generator=source)
        if self.film:
            for name in ("scale", "shift", "add"):
                given[name] = torch.randn(batch, channels, generator=source)
        return given

    def function(self, label: str) -> Callable[[], Tensor]:
        given, function = dict(self.tensors), plain.group_norm_silu
        x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
        if label == OURS:
            function = group_norm_silu
        elif label != EAGER:
            mode = "max-autotune" if label == AUTOTUNED else "default"
            function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        return lambda: function(x, GROUPS, weight, bias, EPS, **given)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Largest error against float64, relative to the largest value; 16 units of float32."""
        torch.compiler.reset()  # shapes of other workloads count against its limit
        given = {name: value.double() for name, value in self.tensors.items()}
        x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
        exact = plain.group_norm_silu(x, GROUPS, weight, bias, EPS, **given)
        return checked(self, exact, 16 * torch.finfo(torch.float32).eps, self.function)


@dataclass(frozen=True)
class Forward(Calls):
    """One call of DDPM++ for CIFAR-10 (61.8 M parameters), float32, weights packed for ours."""

    compiled: tuple[str, ...] = (COMPILED, AUTOTUNED)

    @property
    def labels(self) -> tuple[str, ...]:
        return (EAGER, EAGER_NHWC, *self.compiled, OURS)

    @cached_property
    def networks(self) -> tuple[EagerDDPMpp, torch.nn.Module]:
        return networks()

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(2)
        label = 999 * torch.rand(self.shape[0], generator=source)
        return torch.randn(self.shape, generator=source), label

    def function(self, label: str) -> Callable[[], Tensor]:
        eager, own = self.networks
        x, time = self.inputs
        if label == OURS:
            return lambda: own(x, time)
        if label == EAGER_NHWC:
            x = x.to(memory_format=torch.channels_last)
            eager = eager_nhwc()
        elif label != EAGER:
            mode = "max-autotune" if label == AUTOTUNED else "default"
            compiled = torch.compile(eager, fullgraph=True, dynamic=False, mode=mode)
            return lambda: compiled(x, time)
        return lambda: eager(x, time)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Largest difference to the float32 eager network's float64 self, relative; 1e-4."""
        torch.compiler.reset()
        x, time = self.inputs
        eager = self.networks[0]
        exact = eager.double()(x.double(), time)
        eager.float()
        return checked(self, exact, 1e-4, self.function)


_made: dict[str, Any] = {}
_packs = ExitStack()


def networks() -> tuple[EagerDDPMpp, torch.nn.Module]:
    """The eager network and ours with the same weights, none of them zero; ours packed for good,
    as they are in a sampler's run."""
    if "pair" not in _made:
        torch.manual_seed(0)
        eager, own = EagerDDPMpp().eval(), UNet.from_preset("ddpmpp_cifar10").eval()
        names = [peer.name for peer in own.peer_tensors()]
        theirs = dict(zip(names, eager.parameters(), strict=True))
        own.load_state_dict(from_peer(own, theirs))
        _packs.enter_context(packed(own))
        _made["pair"] = eager, own
    pair: tuple[EagerDDPMpp, torch.nn.Module] = _made["pair"]
    return pair


def eager_nhwc() -> EagerDDPMpp:
    if "nhwc" not in _made:
        twin = EagerDDPMpp().eval()
        twin.load_state_dict(networks()[0].state_dict())
        _made["nhwc"] = twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network: EagerDDPMpp = _made["nhwc"]
    return network


def checked(
    workload: Normalisation | Forward,
    exact: Tensor,
    bound: float,
    function: Callable[[str], Callable[[], Tensor]],
) -> dict[str, float]:
    errors = {}
    for label in workload.labels:
        error = (function(label)().double() - exact).abs().max() / exact.abs().max()
        errors[label] = float(error)
        assert errors[label] <= bound, f"{workload.title}: {label} is off by {error:.2g}"
    return errors


@torch.no_grad()
def profiled(workload: Forward, calls: int = 3) -> list[dict[str, Any]]:
    """The operations of our forward, by their share of its time: what remains and how much."""
    function = workload.function(OURS)
    with threads(workload.threads):
        function()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(calls):
                function()
    events = recorded.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    shares = [
        {
            "op": event.key,
            "calls": event.count / calls,
            "share": event.self_cpu_time_total / whole,
        }
        for event in events
    ]
    return sorted(shares, key=lambda entry: -float(entry["share"]))[:12]


NORM, FILM, FORWARD = "GroupNorm + SiLU", "add + GroupNorm + FiLM + SiLU", "DDPM++ forward"
SHAPES = (4, 128, 32, 32), (4, 256, 16, 16), (64, 64, 8, 8)
OF_NORM = Goal(EAGER, 3, 5), Goal(COMPILED, 2.5, 4)
OF_FILM = Goal(EAGER, 4, 5), Goal(COMPILED, 2.5, 4)
WORKLOADS: tuple[Normalisation | Forward, ...] = (
    *(Normalisation(NORM, shape, 2, 50, 31, OF_NORM) for shape in SHAPES),
    *(Normalisation(FILM, shape, 2, 50, 31, OF_FILM, film=True) for shape in SHAPES),
    Forward(FORWARD, (1, 3, 32, 32), 2, 2, 15, (Goal(EAGER, 1.4, 2),)),
    Forward(FORWARD, (8, 3, 32, 32), 2, 1, 9, (Goal(EAGER, 1.4, 2),)),
)


def quick(workload: Normalisation | Forward) -> Normalisation | Forward:
    if isinstance(workload, Normalisation):
        return replace(workload, compiled=False)
    return replace(workload, compiled=())


def markdown(record: dict[str, Any]) -> str:
    """The table of README and docs."""
    others = (EAGER, EAGER_NHWC, COMPILED, AUTOTUNED)
    lines = [
        f"| | ours, ms | {' | '.join(f'{other} ÷ ours' for other in others)} |",
        f"|---|---|{'---|' * len(others)}",
    ]
    for workload in record["workloads"]:
        results = workload["results"]
        name = f"{workload['name']} {'×'.join(map(str, workload['shape']))}"
        cells = [
            with_goals(f"{results[other]['ratio']:.2f}×", results[other], "g")
            if other in results
            else ""
            for other in others
        ]
        lines.append(f"| {name} | {results[OURS]['median'] * 1e3:.3g} | {' | '.join(cells)} |")
    machine, threads = record["machine"], record["workloads"][0]["threads"]
    note = (
        f"float32, {threads} threads, medians of interleaved runs in one process, in brackets goal "
        f"/ moonshot: `{record['command']}` on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['instruction_set']}, torch {machine['versions']['torch']}, Python "
        f"{machine['versions']['python']}, {machine['versions']['compiler']}."
    )
    return "\n".join([*lines, "", note])


def profile_table(record: dict[str, Any]) -> str:
    """What remains beside the convolutions in a forward of ours."""
    batches = record["profile"]
    lines = [f"| operation | {' | '.join(batches)} |", f"|---|{'---|' * len(batches)}"]
    cells: dict[str, dict[str, str]] = {}
    for batch, entries in batches.items():
        for found in entries:
            text = f"{found['share']:.1%} ({found['calls']:g} calls)"
            cells.setdefault(found["op"], {})[batch] = text
    for op, by_batch in cells.items():
        row = [by_batch.get(batch, "") for batch in batches]
        lines.append(f"| `{op}` | {' | '.join(row)} |")
    return "\n".join([*lines, "", f"Shares of one forward of DDPM++, `{record['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="no torch.compile; no record")
    parser.add_argument("--only", default="", help="workloads whose title holds this; no record")
    arguments = parser.parse_args()
    only_eager: bool = arguments.quick
    busy = begin()
    measurements: list[Measurement] = []
    for workload in WORKLOADS:
        if arguments.only not in workload.title:
            continue
        print(f"measuring {workload.title} …", file=sys.stderr, flush=True)
        measurements.append(measure(quick(workload) if only_eager else workload))
    print(table(measurements))
    if only_eager or arguments.only:
        return
    record = {
        "command": "python -m benchmarks.network",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts(),
        "cores_busy_before": round(busy, 2),
        "workloads": [entry(m) for m in measurements],
        "profile": {
            f"batch {w.shape[0]}": profiled(w) for w in WORKLOADS if isinstance(w, Forward)
        },
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {RECORD}")


if __name__ == "__main__":
    main()
