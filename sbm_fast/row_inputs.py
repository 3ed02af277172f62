"""What a row cannot say is made of the network's output before the row reads it.

A row's coefficients are the same for all elements of a sample. Two things are not, and enter the
step as tensors instead:

- **learned variance** (Nichol & Dhariwal 2021, eq. 15): the network's output has twice the
  channels, the mean's F and then v ∈ [−1, 1]; with v' = (v + 1)/2 the row's noise becomes
  z·exp((1 − v') l_0 + v' l_1), (l_0, l_1) = ``Plan.log_std``, and is handed to the step as `noise`;
- **dynamic threshold** (Saharia et al. 2022, sec. 2.3): with s = quantile of |D| in each sample,
  held in [minimum, maximum], D_s = clamp(D, ±s)/s replaces D. F becomes the F' whose D that is,
  F' = (D_s − p·x)/q = F + (D_s − D)/q: where nothing changes, F' is F to the bit.

Guidance is folded into F before the threshold: guide first, then clamp. v is that of the
conditional output. A NaN or infinity in F, or in v where a row reads it, stays one in what the step
reads, so that it is reported. All numbers are gathered by the device tensor `row`; nothing is read
back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sbm_fast.ops._row import per_sample
from sbm_fast.plan import H0, F, Plan, X, Z

if TYPE_CHECKING:
    from sbm_fast.model import ScoreModel

Step = Callable[..., None]
"""`affine_step_` of a backend."""

Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""(network, uncond, guidance, noise) of a step."""


class RowInputs:
    """Makes (network, uncond, guidance, noise) of a row from what the network gave.

    Attributes:
        output_shape: the shape that the network's output must have.
    """

    def __init__(self, plan: Plan, model: ScoreModel, step: Step, x: Tensor) -> None:
        doubled = model.variance is not None
        self._channels = x.shape[1] if doubled else None
        self.output_shape = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if doubled else x.shape
        self._variance = _LearnedVariance(plan, step, x) if plan.log_std.any() else None
        self._threshold = _Threshold(plan, step, x) if plan.threshold.any() else None

    @classmethod
    def of(cls, plan: Plan, model: ScoreModel, step: Step, x: Tensor) -> RowInputs | None:
        """For a state like x [B, …]; None where every row reads the network's output as it is.

        Raises: ValueError naming `model` or `shape` where the network has no variance that the
        plan asks for, or the state no channels.
        """
        if plan.log_std.any() and model.variance is None:
            raise ValueError(
                "model: the plan reads a learned variance; expected a "
                "ScoreModel(…, variance='learned_range'), whose output has twice the channels"
            )
        if model.variance is not None and x.dim() < 2:
            raise ValueError(
                f"shape: variance={model.variance!r} doubles dimension 1 of the network's output, "
                f"expected (batch, channels, …), got {tuple(x.shape)}"
            )
        if model.variance is None and not plan.threshold.any():
            return None
        return cls(plan, model, step, x)

    def inputs(
        self,
        x: Tensor,
        network: Tensor | None,
        uncond: Tensor | None,
        guidance: Tensor | None,
        keys: Tensor,
        row: Tensor,
        noise: Tensor | None,
    ) -> Inputs:
        """What the step reads at `row` int32 [B]; start rows (network None) change nothing.

        Arguments as in `affine_step_`, with the network's outputs in `output_shape`.
        """
        if network is None:
            return network, uncond, guidance, noise
        if self._channels is not None:
            network, v = network.split(self._channels, dim=1)
            uncond = None if uncond is None else uncond.narrow(1, 0, self._channels)
            if self._variance is not None:
                v = self._variance.read(v, row)
                network = network + 0 * v  # what is not finite in v must show in F
                noise = self._variance.noise(v, keys, row, noise)
        if self._threshold is not None:
            network = self._threshold.network(x, network, uncond, guidance, keys, row)
            uncond = guidance = None
        return network, uncond, guidance, noise


class _LearnedVariance:
    """z of a row, scaled by element; z comes from a step that writes x' = z."""

    def __init__(self, plan: Plan, step: Step, x: Tensor) -> None:
        reads = (plan.coef[:, :, Z] != 0).any(axis=1) & plan.evaluates
        self._step, self._z = step, torch.zeros_like(x)
        self._table = _rows_of(plan, {Z: reads.astype(np.float64)}, x)
        self._log_std = torch.tensor(plan.log_std, dtype=x.dtype, device=x.device)
        self._reads_v = torch.tensor(plan.log_std.any(axis=1), device=x.device)

    def read(self, v: Tensor, row: Tensor) -> Tensor:
        """v; 0 where the row does not read it, so that no one asks what it is there."""
        return torch.where(per_sample(_gather(self._reads_v, row), v), v, 0.0)

    def noise(self, v: Tensor, keys: Tensor, row: Tensor, noise: Tensor | None) -> Tensor:
        z = self._z
        if noise is None:
            self._step(
                z, None, None, None, None, keys, row, *self._table, None, None, None, None, None
            )
        else:
            z = noise.to(z.dtype)
        bounds = _gather(self._log_std, row)
        low, high = (per_sample(bound, z) for bound in bounds.unbind(1))
        # Copied into one layout, so that exp takes the same path for every memory format.
        share = (torch.empty_like(self._z).copy_(v) + 1) * 0.5
        return z * torch.exp(low + share * (high - low))


class _Threshold:
    """F' of a row; F with guidance and D come from steps that write x' = F and x' = p x + q F."""

    def __init__(self, plan: Plan, step: Step, x: Tensor) -> None:
        p, q, _ = plan.denoiser.T
        quantile, least, most = plan.threshold.T
        on = quantile > 0
        self._step, self._f, self._d = step, torch.zeros_like(x), torch.zeros_like(x)
        self._folded = _rows_of(plan, {F: plan.evaluates.astype(np.float64)}, x)
        self._denoised = _rows_of(plan, {X: np.where(on, p, 0), F: np.where(on, q, 0)}, x)

        elements = math.prod(x.shape[1:])
        self._flat = (x.shape[0], elements)
        position = np.where(on, quantile, 1.0) * (elements - 1)
        below = np.floor(position)
        # Only the values above the lowest quantile are looked at, in falling order.
        self._top = int(elements - below.min())
        from_top = np.stack([elements - 1 - below, np.maximum(elements - 2 - below, 0)], axis=1)
        self._index = torch.tensor(from_top, dtype=torch.int64, device=x.device)
        columns = np.stack([position - below, least, most, np.where(on, q, 1.0)], axis=1)
        self._lanes = torch.tensor(columns, dtype=x.dtype, device=x.device)
        self._on = torch.tensor(on, device=x.device)

    def network(
        self,
        x: Tensor,
        network: Tensor,
        uncond: Tensor | None,
        guidance: Tensor | None,
        keys: Tensor,
        row: Tensor,
    ) -> Tensor:
        unread = (None, None, None, None, None)
        f, d = self._f, self._d
        self._step(f, network, uncond, guidance, None, keys, row, *self._folded, *unread)
        d.copy_(x)
        self._step(d, f, None, None, None, keys, row, *self._denoised, *unread)
        fraction, least, most, q = _gather(self._lanes, row).unbind(1)
        values = d.abs().reshape(self._flat).topk(self._top, dim=1).values
        values = values.gather(1, _gather(self._index, row))
        below, above = values.unbind(1)
        quantile = below + fraction * (above - below)
        s = per_sample(torch.minimum(torch.maximum(quantile, least), most), d)
        changed = f + (torch.clamp(d, -s, s) / s - d) / per_sample(q, d)
        return torch.where(per_sample(_gather(self._on, row), d), changed, f)


def _gather(table: Tensor, row: Tensor) -> Tensor:
    """Every sample's row of a table; finished samples (row R) get the last one, to no effect."""
    return table.index_select(0, row.clamp(0, len(table) - 1))


def _rows_of(plan: Plan, weights: dict[int, np.ndarray], x: Tensor) -> tuple[Tensor, Tensor]:
    """The device table of the plan's rows with x' = Σ weight·source in place of its updates."""
    coef = np.zeros((plan.rows, 2, H0))
    for source, weight in weights.items():
        coef[:, 0, source] = weight
    nothing = np.zeros(plan.rows, dtype=np.int64)
    own = replace(
        plan, coef=coef, slot=nothing - 1, norm=nothing, log_std=np.empty(0), threshold=np.empty(0)
    )
    return own.pack(x.dtype, x.device)
