"""The probability-flow ODE of a score model, in a coordinate of unit scale.

dx/dt = f x − ½ g² ∇ log p_t(x) (Song et al. 2021, eq. 13) is, over λ = ln(σ/m) and for the state
u = x/h with h = √(σ² + m² σ_d²), one ODE for every SDE (`parameterization.flow`). An SDE only says
where on it to begin and to end, and what x is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sbm_fast import parameterization
from sbm_fast.backend import Kernels
from sbm_fast.model import ScoreModel
from sbm_fast.noise import PROBE
from sbm_fast.ops._row import per_sample
from sbm_fast.process import SDE
from sbm_fast.row_step import check_outputs
from sbm_fast.schedule import time_grid, time_range
from sbm_fast.stages import Instant

if TYPE_CHECKING:
    from sbm_fast.divergence import Divergence


@dataclass(frozen=True)
class End:
    """An end of the flow: time t of the SDE, λ = ln(σ/m), and x = scale · u."""

    t: float
    position: float
    scale: float


class ProbabilityFlow:
    """A model's probability-flow ODE between two times of an SDE.

    Args:
        model: the network; it must have been trained at the noise levels in between.
        sde: the SDE whose times t_min < t_max these are; a ladder's are levels.
        t_min, t_max: None: the SDE's own.

    Attributes:
        data, prior: the `End`s at t_min and t_max.

    Raises:
        ValueError, TypeError: naming t_min or t_max, or t where the network was not trained.
    """

    def __init__(
        self, model: ScoreModel, sde: SDE, t_min: float | None = None, t_max: float | None = None
    ) -> None:
        high, low = time_range(sde, t_max, t_min, strict=True)
        if high <= low:
            raise ValueError(f"t_min: expected less than t_max = {high:g}, got {low:g}")
        for t in (low, high):
            model.match(sde, t)
        self.model, self.sde = model, sde
        self._own = sde if model.sde is None else model.sde
        self.data, self.prior = self._end(low), self._end(high)

    def _end(self, t: float) -> End:
        m, sigma = float(self.sde.mean_scale(t)), float(self.sde.std(t))
        scale = math.hypot(sigma, m * self.model.sigma_data)
        return End(t, math.log(float(self.sde.nsr(t))), scale)

    def at(self, position: Tensor) -> Instant:
        """Coefficients, c_in and labels at λ, float64 tensor of any shape; stays on its device."""
        nsr = torch.exp(position)
        t, m = self._own.level(nsr)
        form = parameterization.flow(self.model.predicts, m, nsr, self.model.sigma_data)
        coef = torch.stack([form.x, form.F, form.F * form.c_in], dim=-1)
        # The divergence of pure signal and of pure noise differ by d; the known one is that of
        # signal, −d r²/(σ_d² + r²).
        known = nsr**2 / (self.model.sigma_data**2 + nsr**2)
        return Instant(coef, form.c_in, self.model.labels(t, nsr), known)

    def grid(self, steps: int | None, schedule: Any, default: int) -> list[float]:
        """λ of a fixed grid from data to prior: `steps` equal steps, or those of a schedule
        (`sbm_fast.schedule.time_grid`)."""
        low, high = self.data, self.prior
        if schedule is None:
            count = default if steps is None else int(steps)
            line = torch.linspace(low.position, high.position, count + 1, dtype=torch.float64)
            return line.tolist()
        points = None if steps is None else steps + 1
        if isinstance(schedule, str) and points is None:
            points = default + 1
        times = time_grid(self.sde, points, schedule, t_max=high.t, t_min=low.t)
        return [math.log(self.sde.nsr(float(t))) for t in reversed(times)]

    def time_of(self, position: float) -> float:
        """t of the SDE at λ."""
        low, high = self.sde.nsr_range
        return float(self.sde.time_at_nsr(min(max(math.exp(position), low), high)))


class FlowSystem:
    """The flow of N samples as a `stages.System`, with the divergence along the way if asked.

    Args:
        flow: the ODE.
        keys: int64 [N], of the probes.
        cond: conditioning of the network; tensors whose first dimension is N belong to the samples.
        guidance: [N] weights of classifier-free guidance, or None.
        divergence: how the trace is found; None leaves it out.
    """

    def __init__(
        self,
        flow: ProbabilityFlow,
        keys: Tensor,
        kernels: Kernels,
        net_dtype: torch.dtype,
        cond: Mapping[str, Any] | None = None,
        guidance: Tensor | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        self.flow, self.net_dtype, self._kernels = flow, net_dtype, kernels
        self.unscaled = flow.model.predicts == "edm"
        self._divergence = divergence
        self.columns = 0 if divergence is None else divergence.columns
        self.integrals_steer = divergence is not None and divergence.kind == "exact"
        self._label_dtype = torch.float64 if net_dtype == torch.float64 else torch.float32
        self._all = _Samples(keys, dict(cond or {}), dict(flow.model.null_cond or {}), guidance)
        self._now = self._all
        self.seconds_network = 0.0

    def select(self, samples: Tensor) -> None:
        """See `System.select`."""
        self._now = self._all.select(samples)

    def at(self, t: Tensor) -> Instant:
        """See `System.at`; t is λ."""
        return self.flow.at(t)

    def slope(
        self, at: Instant, u: Tensor, inputs: Tensor, out: Tensor, integrals: bool
    ) -> Tensor | None:
        """See `System.slope`: du/dλ, and its divergence where `integrals`."""
        network, keys = self._network(at.label.to(self._label_dtype)), self._now.keys
        if integrals and self._divergence is not None:
            return self._divergence.slope(network, inputs, u, keys, at.coef, out)
        begin = time.perf_counter()
        f = network(inputs)
        self.seconds_network += time.perf_counter() - begin
        self._kernels.hutchinson_(out, None, u, f, None, keys, at.coef, 0, PROBE, False)
        return None

    def _network(self, label: Tensor) -> Callable[[Tensor], Tensor]:
        model, now = self.flow.model, self._now

        def network(inputs: Tensor) -> Tensor:
            outputs = [model.net(inputs, label, **now.cond)]
            if now.guidance is not None:
                outputs.append(model.net(inputs, label, **now.null_cond))
            if model.variance is not None:
                outputs = [out.narrow(1, 0, inputs.shape[1]) for out in outputs]
            check_outputs(outputs, inputs, None)
            if now.guidance is None:
                return outputs[0]
            f, f_u = outputs
            return f_u + per_sample(now.guidance, f).to(f.dtype) * (f - f_u)

        return network

    def not_finite(self, samples: Tensor, t: Tensor, nfe: Tensor) -> str:
        """See `System.not_finite`."""
        first = int(torch.argmin(nfe))
        return (
            f"model: its outputs, or their derivatives, are not finite for {len(samples)} "
            f"samples, first for sample {int(samples[first])} after {int(nfe[first])} evaluations "
            f"(t = {self.flow.time_of(float(t[first])):.6g})"
        )


@dataclass(frozen=True)
class _Samples:
    """What belongs to the samples that a slope is for."""

    keys: Tensor
    cond: dict[str, Any]
    null_cond: dict[str, Any]
    guidance: Tensor | None

    def select(self, samples: Tensor) -> _Samples:
        count = len(self.keys)

        def own(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: v[samples] if isinstance(v, Tensor) and v.dim() > 0 and len(v) == count else v
                for name, v in values.items()
            }

        return replace(
            self,
            keys=self.keys[samples],
            cond=own(self.cond),
            null_cond=own(self.null_cond),
            guidance=None if self.guidance is None else self.guidance[samples],
        )
