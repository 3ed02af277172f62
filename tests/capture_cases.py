"""A recorder that needs no GPU, and the samplers that are recorded."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sampling_cases as cases
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sbm_fast import DDPMSchedule, Sampler, ScoreModel
from sbm_fast.backend import Kernels
from sbm_fast.capture import Capture
from sbm_fast.methods import DynamicThreshold
from sbm_fast.ops.affine_step import affine_step_

SHAPE = (4, 3, 5)


class Tape(TorchDispatchMode):
    """Notes every op with the tensors it was called on; a replay calls them again.

    It is to memory what a CUDA graph is: what existed before is read and written where it lies,
    Python numbers are those of the recording, and intermediates are made anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    @classmethod
    def is_infra_mode(cls) -> bool:  # or torch.compile would refuse to run under it
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        made: dict[int, Tensor] = {}
        for func, args, kwargs, noted in self.calls:
            args, kwargs = tree_map_only(Tensor, lambda t: made.get(id(t), t), (args, kwargs))
            out = func(*args, **kwargs)
            for before, now in zip(tree_leaves(noted), tree_leaves(out), strict=True):
                made[id(before)] = now


class TapeRecorder:
    """A `Recorder` of tapes; `fail` is raised instead of what a recording would give."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.fail: Exception | None = None

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, step: Callable[[], None]) -> Tape:
        with Tape() as tape:
            step()
        if self.fail is not None:
            raise self.fail
        self.tapes.append(tape)
        return tape


def recorded(sampler: Sampler) -> TapeRecorder:
    """Makes a sampler on the CPU replay tapes; its step is the op, whose insides no tape sees."""
    recorder = TapeRecorder()
    sampler.kernels = Kernels("op", affine_step_)
    sampler._capture = Capture(recorder)
    return recorder


class Labelled(nn.Module):
    """A network with a weight and a label for each sample."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.8, device=device))

    def forward(self, x: Tensor, t: Tensor, label: Tensor, factor: float = 1.0) -> Tensor:
        shift = factor * label.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return cases.network(x * self.scale.to(x.dtype), t) + shift


def guided_model(device: str = "cpu") -> ScoreModel:
    null = torch.full((1,), -0.3, device=device)
    return ScoreModel(Labelled(device), null_cond={"label": null})


LADDER = DDPMSchedule.linear(12)


def learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([cases.network(x, t), torch.tanh(x)], dim=1)


LEARNED = ScoreModel(learned, "eps", sde=LADDER, time="index", variance="learned_range")


def row_input_sampler(kind: str, **more: Any) -> Sampler:
    if kind == "learned variance":
        more = {"method": "ddpm", "variance": "learned", **more}
        return Sampler(LEARNED, LADDER, SHAPE, **more)
    threshold = DynamicThreshold(0.8, minimum=0.1)
    return cases.sampler("ddim", SHAPE, **{"clip_denoised": threshold, **more})


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors on "cuda" that have no values, also where torch was built without CUDA.

    There the tensors' device has no guard, and indexing asks for one; that of "meta" does nothing.
    """
    cuda, meta = 1, 14  # c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, name)
    missing = guards[cuda] is None
    if missing:
        guards[cuda] = guards[meta]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        if missing:
            guards[cuda] = None


def pair(name: str = "em", net: Any = cases.network, **more: Any) -> tuple[Any, Any, Any]:
    """(loop, replaying sampler, its recorder)"""
    loop, replay = (cases.sampler(name, SHAPE, net, **more) for _ in range(2))
    return loop, replay, recorded(replay)
