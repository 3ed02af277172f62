"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbm_fast.sde import SDE
from sbm_fast.training.ema import EMA
from sbm_fast.training.losses import Weighting, dsm


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What `train` returns: losses of the steps, held-out loss of the averaged weights, seconds."""

    losses: list[float] = field(repr=False)
    held_out_loss: float | None
    seconds: float


def train(
    model: nn.Module,
    sde: SDE,
    data: Tensor,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    lr_warmup: int = 100,
    grad_clip: float = 1.0,
    ema_decay: float = 0.999,
    weighting: Weighting = "variance",
    held_out: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Minimise `dsm` over ``data`` [n, ...] by Adam; ``model`` ends with the averaged weights.

    The learning rate rises linearly over ``lr_warmup`` steps and falls along a half cosine to 0.
    Batches go through a fresh permutation of the data in each epoch. Equal arguments and equal
    initial weights give equal results on the same machine with the same number of threads.

    Args:
        model: see `as_score_model`; it is trained in place and left in eval mode.
        steps, batch_size: optimisation steps and samples in each.
        betas: of Adam.
        grad_clip: largest norm of the gradient.
        ema_decay, weighting: see `EMA` and `dsm`.
        held_out: data for the final loss; None: no such loss.
        seed: of the permutations, the perturbation noise and dropout.
        progress: show a bar.

    Raises:
        ValueError: ``steps`` or ``batch_size`` is below 1, or there are fewer data than a batch.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    if steps < 1 or not 1 <= batch_size <= len(data):
        raise ValueError(
            f"steps must be >= 1 and batch_size in 1..{len(data)} (the data), "
            f"got {steps} and {batch_size}"
        )
    start = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    ema = EMA(model, ema_decay)
    order = _Batches(data, batch_size, seed)
    losses: list[float] = []
    model.train()
    # Dropout draws from torch's generator: seed it here, and leave the caller's as it was.
    with torch.random.fork_rng(devices=[]), tqdm(total=steps, disable=not progress) as bar:
        torch.manual_seed(seed)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, steps, lr_warmup)
            loss = dsm(model, sde, order.next(), seed=seed, step=step, weighting=weighting)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            optimizer.step()
            ema.update(model)
            bar.update()
            if step % 20 == 0:
                recent = losses[-100:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
    ema.copy_to(model)
    model.eval()
    final = None if held_out is None else held_out_loss(model, sde, held_out, weighting=weighting)
    return TrainResult(losses, final, time.perf_counter() - start)


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """min(1, (step+1)/warmup) · ½ (1 + cos(π step/steps))."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def held_out_loss(
    model: Any,
    sde: SDE,
    data: Tensor,
    *,
    repeats: int = 20,
    seed: int = 1,
    weighting: Weighting = "variance",
) -> float:
    """Mean of `dsm` over ``data`` and ``repeats`` draws of noise and time (steps 0, 1, ...)."""
    losses = [
        dsm(model, sde, data, seed=seed, step=step, weighting=weighting) for step in range(repeats)
    ]
    return float(torch.stack(losses).double().mean())


class _Batches:
    """Endless batches: permutations of the data one after another; the rest of each is dropped."""

    def __init__(self, data: Tensor, batch_size: int, seed: int) -> None:
        self.data, self.batch_size = data, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.data), generator=self.generator)
        now, self.order = self.order.split([self.batch_size, len(self.order) - self.batch_size])
        return self.data[now.to(self.data.device)]
