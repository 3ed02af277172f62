"""What `CudaRecorder` asks of torch.cuda, in which order, also when a capture fails."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sbm_fast.capture import CudaRecorder

REAL = torch.cuda.CUDAGraph


class Cuda:
    """torch.cuda as the recorder uses it; notes the calls. Steps raise to invalidate a capture."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: Any = self.Stream()
        self.invalid = False
        log, cuda = self.log, self

        class Graph:
            def capture_begin(self, **options: Any) -> None:
                inspect.signature(REAL.capture_begin).bind(self, **options)
                assert options["capture_error_mode"] == "thread_local"
                assert not torch.is_autocast_cache_enabled() or "pool" not in options
                log.append("begin in pool" if "pool" in options else "begin")

            def capture_end(self) -> None:
                log.append("end")
                if cuda.invalid:
                    cuda.invalid = False
                    raise RuntimeError("the capture was invalidated")

        self.CUDAGraph = Graph

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.waits: list[Any] = []

        def wait_stream(self, other: Any) -> None:
            self.waits.append(other)

        def wait_event(self, event: Any) -> None:
            self.waits.append(event)

    class Event:
        def record(self, stream: Any) -> None:
            self.recorded = stream

    def current_stream(self, device: Any) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> object:
        return object()

    def synchronize(self, device: Any) -> None:
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.log.append("empty")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: fake.log.append("end pool"),
        raising=False,
    )  # fmt: skip
    monkeypatch.setattr(CudaRecorder, "_invalid", ())
    return fake


def logged(cuda: Cuda, before: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def step() -> None:
        cuda.log.append("step")
        before()

    return step


def test_a_recording(cuda: Cuda) -> None:
    recorder, outer = CudaRecorder(torch.device("cpu")), cuda.current
    graph = recorder.record(logged(cuda))
    assert isinstance(graph, cuda.CUDAGraph)
    assert cuda.log == ["synchronize", "empty", "begin in pool", "step", "end"]
    assert cuda.current is outer and outer.waits == [recorder._stream]
    assert recorder._stream.waits == [outer] and torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_raises_ends_the_capture(cuda: Cuda, raised: type[BaseException]) -> None:
    def fail() -> None:
        raise raised("from the network")

    recorder, outer = CudaRecorder(torch.device("cpu")), cuda.current
    with pytest.raises(raised, match="from the network"):
        recorder.record(logged(cuda, fail))
    assert cuda.log[-2:] == ["step", "end"] and cuda.current is outer


@pytest.mark.parametrize("raises", [True, False])
def test_an_invalidated_capture_is_repaired(cuda: Cuda, raises: bool) -> None:
    """The allocator leaves the pool, and a capture that succeeds ends the generator's."""

    def fail() -> None:
        cuda.invalid = True
        if raises:
            raise RuntimeError("from the network")

    recorder, outer = CudaRecorder(torch.device("cpu")), cuda.current
    pool = recorder._pool
    with pytest.raises(RuntimeError, match="from the network" if raises else "was invalidated"):
        recorder.record(logged(cuda, fail))
    assert cuda.log[-6:] == ["begin in pool", "step", "end", "end pool", "begin", "end"]
    assert cuda.current is outer and torch.is_autocast_cache_enabled()
    assert recorder._pool is not pool and len(CudaRecorder._invalid) == 1


def test_turns_follow_one_another(cuda: Cuda) -> None:
    recorder = CudaRecorder(torch.device("cpu"))
    streams = [cuda.Stream(), cuda.Stream()]
    for stream in streams:
        cuda.current = stream
        with recorder.turn():
            pass
        assert stream.waits == [recorder._done] and recorder._done.recorded is stream
