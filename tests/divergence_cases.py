"""Networks and matrices whose divergence is taken."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sbm_fast import noise
from sbm_fast.backend import choose_backend
from sbm_fast.divergence import Divergence

CPU = torch.device("cpu")
KERNELS = choose_backend("auto", CPU)
SHAPE = (3, 2, 2)
KINDS = [("hutchinson", 1), ("hutchinson", 3), ("hutchinson", 18), ("exact", 1), ("xtrace", 8)]
Network = Callable[[Tensor], Tensor]


def made(kind: str = "hutchinson", probes: int = 1, **options: object) -> Divergence:
    return Divergence(kind, probes, kernels=KERNELS, **options)  # type: ignore[arg-type]


def columns(
    divergence: Divergence,
    network: Network,
    x: Tensor,
    *,
    coef: Tensor | None = None,
    keys: Tensor | None = None,
    **options: object,
) -> Tensor:
    """The divergence's columns; by default those of tr J itself."""
    keys = noise.keys(5, len(x)) if keys is None else keys
    if coef is None:
        coef = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).repeat(len(x), 1)
    state = x if x.dtype in (torch.float32, torch.float64) else x.float()
    out = torch.full_like(state, math.nan)
    return divergence.slope(network, x, state, keys, coef, out, **options)  # type: ignore[arg-type]


def matrices(batch: int, *, rank: int | None = None, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Matrices [B, d, d] that are not symmetric."""
    generator = torch.Generator().manual_seed(1)
    d = math.prod(shape)
    parts = (
        torch.randn(batch, d, d if rank is None else rank, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    left, right = parts
    return left @ right.mT / d + (torch.eye(d) if rank is None else 0.0)


def linear(a: Tensor) -> Network:
    """x -> A x in x's dtype, sample by sample."""

    def network(x: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", a.to(x.dtype), x.reshape(len(x), -1)).reshape(x.shape)

    return network


def states(
    batch: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> Tensor:
    return noise.normal(9, (batch, *shape)).to(dtype)


def curved(x: Tensor) -> Tensor:
    """Mixes neighbours, by elementwise operations alone: equal samples give equal bits."""
    flat = x.flatten(1)
    return (flat.roll(1, 1) * flat.cos() + 0.3 * flat.roll(-1, 1) ** 2 - flat).reshape(x.shape)


class Convolutions(nn.Module):
    """What networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.silu(self.norm(self.enter(x))))
