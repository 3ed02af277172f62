"""What this installation can do, and for each thing it cannot, why."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

import sbm_fast
from sbm_fast import _load
from sbm_fast.ops._library import WITHOUT_TWIN, cuda_compiled, triton_missing

__all__ = ["Report", "backends", "doctor"]


@dataclass(frozen=True)
class Report:
    """An installation's state; `str()` of it is what `sbm-fast doctor` prints."""

    versions: dict[str, str]
    """Of sbm_fast, python, torch, numpy and triton; "not installed" for a missing triton."""
    package: Path
    """The folder that sbm_fast was imported from."""
    compiled: bool
    reason: str
    """Why there is no compiled part; empty when there is one."""
    library: Path | None
    """The compiled ops' file."""
    build: dict[str, object]
    """Compiler, flags, torch built against, instruction sets; empty without a compiled part."""
    cpu_level: str
    """The instruction set that the CPU kernels use here; "unknown" without a compiled part."""
    threads: int
    """How many threads torch, and with it every kernel here, uses."""
    gpu: str
    """The first CUDA device's name; "none" without one."""
    backends: dict[str, str]
    """Each backend's reason for being off; empty for one that works."""
    plain_on_cuda: str
    """Why plain torch stands in on GPUs for the ops that have no CUDA kernel; empty where it does
    not, or where no CUDA kernels were compiled."""

    def __str__(self) -> str:
        versions = dict(self.versions)
        lines = [f"sbm_fast  {versions.pop('sbm_fast')} at {self.package}"]
        lines.append("with      " + ", ".join(f"{k} {v}" for k, v in versions.items()))
        if self.compiled:
            simd = self.build["simd"]
            assert isinstance(simd, list)
            lines.append(f"compiled  yes: {self.library}")
            lines.append(
                f"          by {self.build['compiler']} against torch {self.build['torch']}, "
                f"for {', '.join(simd)}{' and CUDA' if self.build['cuda'] else ''}"
            )
        else:
            lines.append(f"compiled  no: {self.reason}")
        lines.append(f"CPU       {self.cpu_level}, {self.threads} threads")
        lines.append(f"GPU       {self.gpu}")
        for name, reason in self.backends.items():
            lines.append(f"backend   {name:<7} {f'off: {reason}' if reason else 'available'}")
        if self.plain_on_cuda:
            ops = ", ".join(sorted(WITHOUT_TWIN))
            lines.append(f"          cuda runs {ops} on plain torch: {self.plain_on_cuda}")
        return "\n".join(lines)


def backends() -> dict[str, str]:
    """Each backend's reason for being off on this machine, empty for one that works."""
    return {name: why_off(name) for name in ("cpu", "eager", "cuda", "triton")}


def why_off(backend: str) -> str:
    """One backend's reason for being off on this machine, without a look at the others."""
    _load.load()
    if backend == "cuda":
        return _cuda_off()
    if backend == "triton":
        return _triton_off()
    return _load.REASON if backend == "cpu" else ""


def _cuda_off() -> str:
    if not _load.COMPILED:
        return _load.REASON
    if not cuda_compiled():
        return (
            "the compiled part has no CUDA kernels: no nvcc was found when it was built, or "
            "SBM_FAST_CUDA=0 was set"
        )
    return _no_device()


def _triton_off() -> str:
    from sbm_fast.kernels import interpreted  # found once the compiled part was looked for

    missing = triton_missing()
    if missing or interpreted():
        return missing
    device = _no_device()
    return f"{device}, and TRITON_INTERPRET=1 is not set" if device else ""


def _no_device() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, was built without CUDA"
    return "torch finds no CUDA device"


def doctor() -> Report:
    """Looks at the installation and the machine; changes nothing."""
    _load.load()
    host = _load.host
    return Report(
        versions={
            "sbm_fast": sbm_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "triton": _version_of("triton"),
        },
        package=_load.PACKAGE,
        compiled=_load.COMPILED,
        reason=_load.REASON,
        library=_load.library(),
        build=host.build_info() if host else {},
        cpu_level=host.cpu_level() if host else "unknown",
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        backends=backends(),
        plain_on_cuda=triton_missing() if cuda_compiled() else "",
    )


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
