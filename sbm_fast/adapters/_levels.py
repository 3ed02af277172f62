"""One network per noise level, as the first score models were trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbm_fast.ladder import Ladder, NCSNLadder
from sbm_fast.model import ScoreModel


class Levels(nn.Module):
    """Sends every sample to the network of its level: (x [B, …], index [B], **cond) → like x.

    Where all samples stand on one level, as in every lock-step run, its network gets x as it is;
    otherwise each network that is asked for gets its samples, and those rows of every tensor in
    ``cond`` whose first dimension is the batch.

    The host reads the indices to choose the networks. Where it cannot (while a CUDA graph is
    recorded, on fake or meta tensors) that is an error: run with ``cuda_graph=False``.

    Args:
        networks: callables, one per level by increasing noise.
        label: whether they take (x, label); otherwise they take x alone.
    """

    def __init__(self, networks: Sequence[Callable[..., Tensor]], *, label: bool) -> None:
        super().__init__()
        self.networks = list(networks)
        self.label = label
        self.trained = nn.ModuleList(net for net in networks if isinstance(net, nn.Module))

    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        """The networks' outputs at the levels ``label``.

        Raises:
            ValueError: a label lies between two levels or outside of them.
            RuntimeError: the labels cannot be read on the host.
        """
        levels = self._levels(label)
        if not len(levels):
            return torch.empty_like(x)
        if (levels == levels[0]).all():
            return self._call(int(levels[0]), x, label, cond)
        output = None
        for level in np.unique(levels):
            rows = torch.as_tensor(np.flatnonzero(levels == level), device=x.device)
            some = {key: _rows(value, rows, len(x)) for key, value in cond.items()}
            part = self._call(int(level), x[rows], label[rows], some)
            if output is None:
                output = part.new_empty((len(x), *part.shape[1:]))
            output = output.index_copy(0, rows, part)
        assert output is not None
        return output

    def _levels(self, label: Tensor) -> np.ndarray[Any, Any]:
        recording = label.is_cuda and torch.cuda.is_current_stream_capturing()
        if recording or label.is_meta or type(label) is not Tensor:
            raise RuntimeError(
                "label: one network per level is chosen on the host, which cannot read the labels "
                "while a CUDA graph is recorded or shapes are traced; use cuda_graph=False"
            )
        labels = label.detach().cpu().double().numpy()
        levels = np.rint(labels)
        wrong = (levels != labels) | (levels < 0) | (levels >= len(self.networks))
        if wrong.any():
            raise ValueError(
                f"label: expected a level, 0 … {len(self.networks) - 1}, got {labels[wrong][0]:g}; "
                "a network per level knows its own level only: run under the ladder itself"
            )
        return levels.astype(np.int64)

    def _call(self, level: int, x: Tensor, label: Tensor, cond: Mapping[str, Any]) -> Tensor:
        network = self.networks[level]
        return network(x, label, **cond) if self.label else network(x, **cond)


def levels(
    networks: Sequence[Callable[..., Tensor]],
    ladder: object,
    *,
    predicts: str = "score",
    label: bool = False,
    sample_shape: Sequence[int] | None = None,
    null_cond: Mapping[str, Any] | None = None,
) -> ScoreModel:
    """A `ScoreModel` of one network per noise level (Song & Ermon 2019 began there).

    Args:
        networks: x → F(x), or (x, label) → F(x) with ``label=True``. With a ladder in the order of
            its levels, by increasing noise; with a list of σ in the order of that list.
        ladder: `NCSNLadder` or `DDPMSchedule`; or one σ for each network, in any order.
        predicts, sample_shape, null_cond: as in `ScoreModel`.
        label: whether the networks take the index of the level too.

    Raises:
        TypeError: a network is not callable, or the ladder is neither.
        ValueError: there are not as many networks as levels; errors of `NCSNLadder`.
    """
    if not isinstance(networks, (list, tuple, nn.ModuleList)) or not all(map(callable, networks)):
        raise TypeError(f"networks: expected a list of callables, got {type(networks).__name__}")
    if not isinstance(ladder, Ladder):
        sigmas = np.asarray(ladder, dtype=np.float64)
        ladder = NCSNLadder(sigmas)
        if len(networks) == len(sigmas):
            networks = [networks[i] for i in np.argsort(sigmas).tolist()]
    if len(networks) != ladder.levels:
        raise ValueError(
            f"networks: expected one for each of {ladder.levels} levels, got {len(networks)}"
        )
    return ScoreModel(
        Levels(networks, label=label),
        predicts=predicts,
        time="index",
        sde=ladder,
        sample_shape=sample_shape,
        null_cond=null_cond,
    )


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
    return value[rows] if whole else value
