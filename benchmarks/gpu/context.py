"""Where a phase runs and at what size."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")
Shape = tuple[int, ...]

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"


@dataclass(frozen=True)
class Context:
    """`dry_run`: on the CPU, in tiny sizes, to go through the code. Its times mean nothing, and
    what torch.compile is given runs as it stands.
    """

    device: torch.device
    dry_run: bool

    @classmethod
    def of(cls, dry_run: bool) -> "Context":
        """RuntimeError without a GPU, unless it is a dry run."""
        if not dry_run and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --dry-run goes through it on a CPU")
        return cls(torch.device("cpu" if dry_run else "cuda"), dry_run)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: V, tiny: V) -> V:
        return tiny if self.dry_run else full

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def random(self, shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals, the same in every process on this device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)


Entry = dict[str, Any]
Entries = Iterator[Entry]
Case = Callable[[Context], Entries]
"""Yields an entry of the record, and may yield it again when it knows more."""


def describe(error: BaseException) -> str:
    """Its kind and the first lines of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]


def clocks(context: Context) -> dict[str, str]:
    """As nvidia-smi reads them now; nothing is set."""
    return nvidia_smi(CLOCKS) if context.on_gpu else {}


def nvidia_smi(fields: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields.split(","), values, strict=False))
