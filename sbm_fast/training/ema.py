"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Average of a module's parameters; the averaged network samples better than the last one.

        theta' <- d_n theta' + (1 - d_n) theta ,   d_n = min(decay, (1 + n) / (10 + n))

    with n = 0, 1, ... the updates made before; ``warmup=False`` keeps d_n = decay (Song & Ermon
    2020, technique 5; the warm-up is score_sde's). Floating buffers follow the same formula, others
    are copied.

    Args:
        module: what to average; the average starts as a copy of it.
        decay: in [0, 1).
        warmup: shorter memory at the start, so that the initial weights are forgotten.

    Raises:
        ValueError: ``decay`` is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._average = {key: value.detach().clone() for key, value in module.state_dict().items()}

    def next_decay(self) -> float:
        """d_n of the next update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the present weights of ``module`` into the average.

        Raises:
            ValueError: ``module`` has other weights than the averaged one.
        """
        now = self._matching(module)
        weight = 1 - self.next_decay()
        floating = [key for key, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self._average[k] for k in floating], [now[k] for k in floating], weight
        )
        for key in now.keys() - set(floating):
            self._average[key].copy_(now[key])
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the weights of ``module`` by the average.

        Raises:
            ValueError: ``module`` has other weights than the averaged one.
        """
        for key, value in self._matching(module).items():
            value.copy_(self._average[key])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Within the block ``module`` has the averaged weights, afterwards its own again."""
        own = {key: value.detach().clone() for key, value in module.state_dict().items()}
        self.copy_to(module)
        try:
            yield
        finally:
            module.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: average, updates made, decay, warmup."""
        names = ("decay", "warmup", "updates")
        return {"average": dict(self._average), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.decay, self.warmup = state["decay"], state["warmup"]
        self.updates = state["updates"]
        self._average = {key: value.clone() for key, value in state["average"].items()}

    def _matching(self, module: nn.Module) -> dict[str, Tensor]:
        now = module.state_dict()
        different = now.keys() ^ self._average.keys()
        different |= {k for k in now.keys() - different if now[k].shape != self._average[k].shape}
        if different:
            raise ValueError(f"module must be the averaged one; {min(different)!r} does not match")
        return now
