"""Processes that share samples, and what each of them does; they import this by its name."""

import datetime
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import sbm_fast
from sbm_fast import distributed

N, D = 7, 3


def score(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Elementwise, so that the split of a batch leaves no rounding; sharper in some samples."""
    time = t.reshape(-1, 1).to(x.dtype)
    return -(x + 0.25 - shift) / (1.0 + time + 0.5 * x * x)


def conditioned(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return score(x, t, shift[:, None])


def data() -> Tensor:
    scale = torch.linspace(0.1, 3.0, N)[:, None]  # samples that need different numbers of steps
    return scale * torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def options() -> dict[str, Any]:
    return {"probes": 4, "exact": False, "seed": 5, "cond": {"shift": torch.linspace(-1, 1, N)}}


def model() -> sbm_fast.ScoreModel:
    return sbm_fast.ScoreModel(conditioned, predicts="score")


def _rank(rank: int, ranks: int, port: int, task: Callable[[], Any], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(task(), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(task: Callable[[], Any], folder: Path, count: int = 2) -> list[Any]:
    """What every rank's task returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (count, port, task, str(folder)), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def likelihood_task() -> dict[str, Tensor]:
    r = distributed.log_likelihood(model(), sbm_fast.VPSDE(), data(), **options())
    return {name: getattr(r, name) for name in ("log_prob", "stderr", "latent", "nfe", "columns")}


def several_task() -> list[Any]:
    drawn = distributed.log_likelihood(
        score, sbm_fast.VPSDE(), data(), probes=2, exact=False, rtol=1e-3
    )
    latent = distributed.encode(score, sbm_fast.VPSDE(), data(), rtol=1e-3)
    few = distributed.encode(score, sbm_fast.VPSDE(), data()[:1], rtol=1e-3)  # one rank has none
    grid = (data().clamp(-1, 1) * 4).round() / 4
    bits = distributed.bits_per_dim(score, sbm_fast.VPSDE(), grid, levels=9, seed=1, draws=2)
    return [drawn.seed, drawn.log_prob, latent, few, bits.log_prob, bits.mean, bits.mean_stderr]


def failing_task() -> str:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return score(x, t) / (0.0 if dist.get_rank() == 1 else 1.0) * 0.0

    try:
        distributed.encode(broken, sbm_fast.VPSDE(), data())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _message(**options: Any) -> str:
    try:
        distributed.log_likelihood(model(), sbm_fast.VPSDE(), data(), **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def ambiguous_task() -> str:
    return _message(cond={"shift": torch.zeros(3)})


def keys_task() -> str:
    return _message(keys=sbm_fast.noise.keys(0, 5), cond={"shift": torch.zeros(N)})
