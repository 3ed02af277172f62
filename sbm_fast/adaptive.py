"""`sample(…, method="ode", solver="dopri5")`: the probability flow from prior to data with steps
that follow each sample's own error."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.arguments import full_shape, guidance_weights, initial_state
from sbm_fast.encoding import Journey
from sbm_fast.methods.setup import nearest
from sbm_fast.runge_kutta import is_adaptive
from sbm_fast.sample_info import SampleInfo
from sbm_fast.solver import Solver

OPTIONS = ("solver", "rtol", "atol", "max_nfe", "batch_size")
"""Of `Solver`, for method "ode" with an adaptive solver."""


def has_no_plan(method: object, options: Mapping[str, Any]) -> bool:
    """Whether these are the probability flow with an adaptive solver."""
    return isinstance(method, str) and method == "ode" and is_adaptive(options.get("solver"))


def sample_adaptive(
    model: object,
    sde: object,
    shape: Sequence[int] | None,
    *,
    num_samples: int,
    draws: tuple[int | None, Tensor | None, int],
    cond: Mapping[str, Any] | None,
    guidance: float | Tensor | None,
    x_init: Tensor | None,
    times: tuple[float | None, float | None],
    refused: Mapping[str, Any],
    dtype: torch.dtype,
    net_dtype: torch.dtype | None,
    device: torch.device | str | None,
    backend: str,
    progress: bool,
    return_info: bool,
    **options: Any,
) -> Any:
    """Samples; the tensor, or (tensor, `SampleInfo`).

    Args:
        draws: (seed, keys, first_sample); times: (t_min, t_max); refused: arguments that mean
            nothing here, None unless given.
        options: see `Solver`.
        the others: as in `sbm_fast.sample`.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{name}: no option of an adaptive solver; {nearest(name, [*OPTIONS])}")
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"{name}: solver {options['solver']!r} follows each sample's own error, without a "
                f"plan; expected none, got {value!r}"
            )
    settings = Solver(options.pop("solver"), progress=progress, **options)
    journey = Journey.of(model, sde, *times, dtype, net_dtype, device, backend)
    sizes = full_shape(shape, num_samples, journey.model)
    keys, seed = journey.keys(sizes[0], *draws)
    x = initial_state(x_init, sizes, journey.dtype, journey.device, 1.0)
    if x_init is None:
        end, run = journey.flow.prior.t, journey.flow.sde
        std = run.prior_std if end == run.t_max else float(run.std(end))
        noise.normal(None, sizes, keys=keys, stream=noise.PRIOR, out=x)
        x.mul_(std)
    weights = None if guidance is None else guidance_weights(guidance, x, journey.model)
    begin = time.perf_counter()
    solution, system = journey.carry(x, keys, settings, cond=cond, guidance=weights, to_prior=False)
    seconds = time.perf_counter() - begin
    if not return_info:
        return solution.u
    nfe = solution.nfe if weights is None else 2 * solution.nfe
    network = system.seconds_network if journey.device.type == "cpu" else math.nan
    return solution.u, SampleInfo(
        nfe=int(nfe.max()) if len(nfe) else 0,
        seed=seed,
        seconds=seconds,
        seconds_network=network,
        seconds_sampler=seconds - network,
        backend=journey.kernels.name,
        plan=None,
        nfe_of=nfe,
    )
