"""A row as a CUDA graph: recorded once for each kind of row, replayed over the rows.

A graph reads and writes fixed addresses. So a `Capture` has a memory of its own; a run copies its
state in when it is advanced and back out when it stops, and everything else that changes between
calls (keys, guidance, conditioning, the row) enters by copies into tensors too. A run therefore
owns what it returns, and any number of runs of one sampler can be alive; they take turns.

Nothing is recorded that a replay would not repeat: before the recording the network runs twice,
once held to its contract and once under `HostReads`.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from sbm_fast.row_step import OTHER_VIEW, RowStep

if TYPE_CHECKING:
    from sbm_fast.run import Run

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
"""Conditioning that is no tensor and can't change behind a graph's back."""


class Graph(Protocol):
    """What was recorded; `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Where steps are recorded."""

    def turn(self) -> AbstractContextManager[None]:
        """Holds while one run has the memory; its work comes after that of the run before."""

    def aside(self) -> AbstractContextManager[None]:
        """Where a step runs before it is recorded."""

    def record(self, step: Callable[[], None]) -> Graph:
        """The graph of what `step` launches; anything may be in its memory afterwards."""


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`; one pool of memory for all graphs of a sampler.

    They share it because they run one after the other and leave their results outside of it.
    """

    _invalid: tuple[Any, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    @contextmanager
    def aside(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            stream.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()  # what is cached outside can't be used in the graph's pool
        graph, failure = torch.cuda.CUDAGraph(), None
        with self.aside(), _no_autocast_cache():
            # Other threads may go on allocating: an error of theirs is none of the capture's.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            except BaseException as error:
                failure = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._recover(graph)
                failure = failure or error
        if failure is not None:
            raise failure
        return graph

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what `capture_end` leaves open when the capture was invalidated.

        That is the allocator's turn to the pool, and, before torch 2.13, the generator's capture,
        which the next capture that succeeds ends.
        """
        CudaRecorder._invalid += (graph,)  # the pinned memory's allocator goes on pointing to it
        with suppress(Exception):  # a private function; it refuses where the turn has ended
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        one, sound = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        sound.capture_begin(capture_error_mode="thread_local")
        one.zero_()
        sound.capture_end()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Casts of weights that autocast keeps would be read by the graph after they are freed."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(enabled)


class NotCapturable(RuntimeError):
    """What a graph can't hold."""


class HostReads(TorchDispatchMode):
    """Refuses ops by which the host reads a device's values, or copies its own there.

    A capture would fail at them and torch would need repair after it, or, worse, they would be
    replayed from memory that is gone (unpinned memory, before torch 2.12).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile passes such modes by, so a compiled network runs as it is."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(tensor.device == self._device for tensor in given)
        if here and _depends_on_values(func, given):
            raise NotCapturable(f"it makes the host read a tensor's values ({func})")
        if here and func is torch.ops.aten.lift_fresh.default:  # the last act of torch.tensor
            raise NotCapturable(f"it makes a tensor on {self._device} out of Python numbers")
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            kinds = {tensor.device.type for tensor in (*given, out)}
            if "cpu" in kinds and len(kinds) > 1:
                raise NotCapturable(f"it copies a tensor between the CPU and {self._device}")
        return out


def _depends_on_values(func: Any, given: list[Tensor]) -> bool:
    if func is torch.ops.aten.index.Tensor:  # tagged for its masks only
        return any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
    tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
    return any(tag in func.tags for tag in tags)


class Conditioning:
    """Keyword arguments of a network as a graph reads them: tensors of its own and constants."""

    def __init__(self, name: str, given: Mapping[str, Any], device: torch.device) -> None:
        self._name = name
        leaves, structure = tree_flatten_with_path(dict(given))
        self._held = {keystr(path): self._kept(keystr(path), v, device) for path, v in leaves}
        self.value: dict[str, Any] = tree_unflatten(list(self._held.values()), structure)

    def _kept(self, key: str, value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_like(value, device=device, requires_grad=False).copy_(value)
        if not isinstance(value, CONSTANTS):
            raise ValueError(
                f"{self._name}{key}: a CUDA graph follows tensors only; expected a tensor, a "
                f"number, a string or None, got {type(value).__name__}"
            )
        return value

    def copy_(self, given: Mapping[str, Any]) -> None:
        """Takes over new values; ValueError naming the key that is not as it was captured."""
        leaves = {keystr(path): value for path, value in tree_flatten_with_path(dict(given))[0]}
        if leaves.keys() != self._held.keys():
            raise ValueError(
                f"{self._name}: was captured with {sorted(self._held)}, got {sorted(leaves)}; "
                "use another Sampler"
            )
        for key, value in leaves.items():
            if not _fits(self._held[key], value):
                raise ValueError(
                    f"{self._name}{key}: was captured as {_words(self._held[key])}, got "
                    f"{_words(value)}; only a tensor's values can change, so give a tensor or use "
                    "another Sampler"
                )
        for key, held in self._held.items():
            if isinstance(held, Tensor):
                held.copy_(leaves[key])


def _fits(held: Any, value: Any) -> bool:
    if isinstance(held, Tensor):
        same = isinstance(value, Tensor) and held.dtype == value.dtype
        return same and held.shape == value.shape
    return type(held) is type(value) and bool(held == value)


def _words(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class Recording:
    """The graphs of one table, guided or not, and all that they read and write."""

    def __init__(self, run: Run) -> None:
        device = run.memory.x.device
        with torch.inference_mode(False):  # later calls may be outside of it
            self.cond = Conditioning("cond", run.cond, device)
            self.null_cond = Conditioning("null_cond", _null_cond(run), device)
            memory = run.memory.twin()
            row = torch.zeros_like(memory.first_bad)
            self.step = run.row_step(memory, row, self.cond.value, self.null_cond.value)
        self.graphs: dict[bool, Graph] = {}

    def load(self, run: Run) -> None:
        """Puts the run's state, keys, guidance and conditioning into the memory."""
        self.cond.copy_(run.cond)
        self.null_cond.copy_(_null_cond(run))
        self.step.refresh()
        self.step.memory.copy_(run.memory.state())
        self.step.row.fill_(run.row)

    def graph(self, norm: bool, recorder: Recorder) -> Graph:
        """The graph of an evaluating row, recorded where the state stands when it is first used."""
        if norm not in self.graphs:
            step = self.step
            kept = {name: held.clone() for name, held in step.memory.state().items()}
            row = step.row.clone()

            def restore() -> None:
                step.memory.copy_(kept)
                step.row.copy_(row)

            try:
                self.graphs[norm] = _record(step, norm, recorder, restore)
            finally:
                restore()
        return self.graphs[norm]


def _record(step: RowStep, norm: bool, recorder: Recorder, restore: Callable[[], None]) -> Graph:
    try:
        with recorder.aside():
            step(norm, check=True)
    except RuntimeError as error:
        if OTHER_VIEW not in str(error):
            raise
        raise ValueError(f"model: its output does not fit: {error}") from error
    restore()
    try:
        with recorder.aside(), HostReads(step.row.device):
            step(norm)
        restore()
        return recorder.record(partial(step, norm))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = getattr(step.net, "__qualname__", type(step.net).__name__)
        what = str(error).partition("\n")[0]
        raise ValueError(
            f"cuda_graph: the network {name} can't be captured: {what}; change it or use "
            "cuda_graph=False"
        ) from error


def _null_cond(run: Run) -> dict[str, Any]:
    return {} if run.memory.guidance is None else run.null_cond


def _addresses(net: object) -> list[tuple[int, int]]:
    """Where a module's weights and buffers lie."""
    if not isinstance(net, torch.nn.Module):
        return []
    plain = (Tensor, torch.nn.Parameter)  # others may have no memory of their own
    held = chain(net.parameters(), net.buffers())
    return [(id(t), t.data_ptr() if type(t) in plain else 0) for t in held]


def _kinds(net: object) -> dict[str, str]:
    """Dtype and device of a module's parameters."""
    named = net.named_parameters() if isinstance(net, torch.nn.Module) else ()
    return {name: f"{p.dtype} on {p.device}" for name, p in named}


class Capture:
    """The recordings of one sampler; its runs go through them in turns."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recordings: dict[tuple[bool, bool], Recording] = {}
        self._weights: list[tuple[int, int]] = []
        self._kinds: dict[str, str] = {}
        self._lock, self._holder = threading.Lock(), 0

    def rows(self, run: Run, end: int) -> Generator[int, None, None]:
        """Runs the rows of `run` before `end` and yields each when it is launched.

        Raises: ValueError naming `cond`, `null_cond`, `model` or `cuda_graph`; RuntimeError when
        this thread is advancing another run of the same sampler.
        """
        plan = run.plan
        with self._lent_to(run) as recording:
            for row in range(run.row, end):
                if plan.evaluates[row]:
                    recording.graph(bool(plan.norm[row]), self._recorder).replay()
                else:
                    recording.step.start()
                run.row = row + 1
                yield row

    @contextmanager
    def _lent_to(self, run: Run) -> Iterator[Recording]:
        if self._holder == threading.get_ident():
            raise RuntimeError(
                "advance: another run of this sampler is being advanced, and their CUDA graph has "
                "one memory; advance it afterwards or use another Sampler"
            )
        with self._lock, self._recorder.turn():
            self._holder, own = threading.get_ident(), run.memory
            try:
                recording = self._recording(run)
                recording.load(run)
                run.memory = recording.step.memory
                yield recording
            finally:
                self._holder = 0
                if run.memory is not own:
                    own.copy_(run.memory.state())
                    run.memory = own

    def _recording(self, run: Run) -> Recording:
        weights = _addresses(run.net)
        if weights != self._weights:  # they were replaced: the graphs would read freed memory
            self._check_kinds(run.net)
            for recording in self._recordings.values():
                recording.graphs.clear()
            self._weights = weights
        kind = run.given_start, run.memory.guidance is not None
        if kind not in self._recordings:
            self._recordings[kind] = Recording(run)
        return self._recordings[kind]

    def _check_kinds(self, net: object) -> None:
        """The recordings' memory is made for the network's dtype and device as they were."""
        kinds = _kinds(net)
        for name, kind in kinds.items() if self._recordings else ():
            before = self._kinds.get(name, kind)
            if kind != before:
                raise ValueError(
                    f"model: expected {name} to be {before} as it was recorded, got {kind}; use "
                    "another Sampler"
                )
        self._kinds = kinds
