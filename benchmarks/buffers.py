"""How many state-size buffers predictor–corrector sampling keeps alive beyond the network's own.

    python -m benchmarks.buffers     prints {"ours": …, "score_sde": …}

Two counts are made and the larger one is given. Torch's record of allocations shows the most that
torch held at any moment, inside an op too. The C library's count of its heap, read at every network
call, shows what was held outside torch as well (working memory of the kernels). It needs a process
of its own, because such memory is kept between calls. The network writes into a buffer that was
there before, so that nothing of it is counted.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.baselines import Langevin, ReverseDiffusion, ScoreSDE
from benchmarks.implementations import make_sampler
from benchmarks.workloads import Goal

SHAPE = (1024, 1, 8, 8)  # small enough that kernels may keep noise, large beside all tables
STEPS = 25
GOAL = Goal("score_sde", 4, 3)
"""Here the goal is the most that ours may hold."""


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def heap_bytes() -> int:
    """Bytes that are in use on this process's heap, large blocks included (glibc ≥ 2.33)."""
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Heap
    heap = function()
    return int(heap.uordblks + heap.hblkhd)


class OwnBuffer(nn.Module):
    """The score −x in a buffer made before; keeps the largest heap seen at a call."""

    predicts = "score"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out = torch.empty(shape)
        self.most = 0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.most = max(self.most, heap_bytes())
        return torch.neg(x, out=self.out)


def count(run: Callable[[], object], network: OwnBuffer, state_bytes: int) -> float:
    """State-size buffers while `run` runs: the larger of the two counts."""
    before, network.most = heap_bytes(), 0
    run()
    on_heap = (network.most - before) / state_bytes
    return max(round(on_heap, 1), float(torch_blocks(run, state_bytes)))


def torch_blocks(run: Callable[[], object], state_bytes: int) -> int:
    """The most blocks of at least half a state alive at once, each as its size over the state's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = most = 0
    for _, size in changes:
        alive += round(size / state_bytes) if abs(size) >= state_bytes // 2 else 0
        most = max(most, alive)
    return most


def count_here() -> dict[str, float]:
    """Ours: a run of a prepared sampler from its start. score_sde's: its loop, beyond x given."""
    tiny = (2, 1, 2, 2)
    make_sampler(OwnBuffer(tiny), True, tiny, STEPS)(seed=0)  # what is made once per process
    torch.randn(SHAPE).neg_()  # starts the threads
    network = OwnBuffer(SHAPE)
    start = torch.randn(SHAPE)
    sampler = make_sampler(network, True, SHAPE, STEPS)
    peer = ScoreSDE(network, [Langevin, ReverseDiffusion])

    def score_sde() -> None:
        peer.reset(start)
        peer.advance(2)
        del peer.x, peer.x_mean

    size = start.numel() * start.element_size()
    return {
        "ours": count(lambda: sampler(seed=0), network, size),
        "score_sde": count(score_sde, network, size),
    }


def pc_buffers() -> dict[str, float]:
    """`count_here` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.buffers"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    counts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return counts


if __name__ == "__main__":
    print(json.dumps(count_here()))
