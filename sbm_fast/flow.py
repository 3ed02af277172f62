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

import numpy as np
import torch
from torch import Tensor

from sbm_fast import parameterization
from sbm_fast.backend import Kernels
from sbm_fast.ladder import Ladder
from sbm_fast.model import ScoreModel
from sbm_fast.noise import PROBE
from sbm_fast.ops._row import per_sample
from sbm_fast.process import SDE, TOLERANCE
from sbm_fast.row_step import INPUT_CHANGED, check_outputs, checked_output
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
        if sde.nsr(low) == 0:
            raise ValueError(
                f"t_min: there is no noise at t = {low:g} of {type(sde).__name__} (σ/m = 0), where "
                "the flow has no end; expected more"
            )
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
        """λ of a fixed grid from data to prior: `steps` equal steps, or the times of a schedule
        (`sbm_fast.schedule.time_grid`).

        Raises: ValueError, TypeError naming schedule or steps, also for times that do not begin at
        t_max and end at t_min.
        """
        low, high = self.data, self.prior
        n = default if steps is None else steps
        if schedule is None:
            return np.linspace(low.position, high.position, n + 1).tolist()
        if isinstance(schedule, str):
            if steps is None and isinstance(self.sde, Ladder):
                n = min(n, round(high.t - low.t))
            times = time_grid(self.sde, n + 1, schedule, t_max=high.t, t_min=low.t)
        else:
            times = time_grid(self.sde, None, schedule, t_max=high.t, t_min=low.t)
            if steps is not None and len(times) != steps + 1:
                raise ValueError(
                    f"schedule: steps={steps} needs {steps + 1} times, got {len(times)}"
                )
        if not np.allclose(times[[0, -1]], (high.t, low.t), rtol=TOLERANCE, atol=0):
            raise ValueError(
                f"schedule: expected times from t_max = {high.t:g} to t_min = {low.t:g}, got "
                f"{times[0]:g} to {times[-1]:g}"
            )
        inner = [math.log(self.sde.nsr(float(t))) for t in times[-2:0:-1]]
        return [low.position, *inner, high.position]

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
        label, keys = at.label.to(self._label_dtype), self._now.keys
        network = self._network(label)
        if integrals and self._divergence is not None:
            return self._divergence.slope(network, inputs, u, keys, at.coef, out)
        begin, versions = time.perf_counter(), (inputs._version, label._version)
        f = network(inputs)
        if (inputs._version, label._version) != versions:
            raise ValueError(INPUT_CHANGED)
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
                outputs = [_prediction(out, inputs) for out in outputs]
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


def _prediction(out: object, inputs: Tensor) -> Tensor:
    """The half of a learned variance's output that predicts, else ValueError naming `model`."""
    if inputs.dim() < 2:
        raise ValueError(
            "model: a learned variance doubles dimension 1 of the network's output; expected "
            f"samples with channels, got a state of shape {tuple(inputs.shape)}"
        )
    batch, channels, *sizes = inputs.shape
    return checked_output(out, inputs, (batch, 2 * channels, *sizes)).narrow(1, 0, channels)


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
