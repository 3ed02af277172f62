"""Sampling methods: each writes its published algorithm as the rows of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sbm_fast.methods.builder import Evaluation, Lin, PlanBuilder
from sbm_fast.methods.clipping import Clip, DynamicThreshold
from sbm_fast.methods.compat import PEER
from sbm_fast.methods.ddim import ddim, ddim_inversion
from sbm_fast.methods.ddpm import ddpm
from sbm_fast.methods.dpmpp import dpmpp_2m, dpmpp_2m_sde
from sbm_fast.methods.edm import edm
from sbm_fast.methods.euler_maruyama import em
from sbm_fast.methods.langevin import ald, langevin
from sbm_fast.methods.ode import ode
from sbm_fast.methods.predictor_corrector import ancestral, pc, reverse_diffusion
from sbm_fast.methods.setup import Denoise, Setup, nearest
from sbm_fast.model import as_score_model
from sbm_fast.sde import as_sde

if TYPE_CHECKING:
    from sbm_fast.methods.setup import Schedule
    from sbm_fast.plan import Plan

METHODS: dict[str, Callable[..., Plan]] = {
    "em": em,
    "reverse_diffusion": reverse_diffusion,
    "ancestral": ancestral,
    "pc": pc,
    "ald": ald,
    "langevin": langevin,
    "ode": ode,
    "ddpm": ddpm,
    "ddim": ddim,
    "ddim_inversion": ddim_inversion,
    "edm": edm,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
"""Name → function; the keyword arguments of the function are the method's options."""

FROM_DATA = ("ddim_inversion",)
"""Methods that start from data instead of noise: they cannot run without an x_init."""

__all__ = [
    "FROM_DATA",
    "METHODS",
    "DynamicThreshold",
    "Evaluation",
    "Lin",
    "PlanBuilder",
    "Setup",
    "make_plan",
]


def make_plan(
    method: str,
    model: object,
    sde: object,
    *,
    steps: int | None = None,
    t_max: float | None = None,
    t_min: float | None = None,
    schedule: Schedule | None = None,
    denoise: Denoise | None = None,
    clip_denoised: Clip | None = None,
    compat: str | None = None,
    given_start: bool = False,
    **method_options: Any,
) -> Plan:
    """Write the plan of a method for a model under an SDE.

    Args:
        method: a key of :data:`METHODS`.
        model: a ScoreModel, or what ``as_score_model`` takes.
        sde: the SDE to run under, or what ``as_sde`` takes.
        steps: steps of the main recursion, None: the method's default.
        t_max, t_min: range of times, None: the SDE's.
        schedule: kind of time grid, or the times themselves.
        denoise: "mean" (drop the last noise), "tweedie" (one more evaluation), False, or None for
            what the method's paper does.
        clip_denoised: L > 0 clamps the denoised estimate to ±L; a `DynamicThreshold` finds its
            bound in each sample.
        compat: the peer whose grid, order, norms and last step are reproduced. With one of
            score_sde's own SDE objects, ``steps`` is then its N where it is not given.
        given_start: the state at t_max is given instead of drawn from the prior.
        method_options: keyword arguments of the method's function.

    Raises:
        ValueError: unknown method (with the nearest name) and values out of range.
        TypeError: an option that the method does not have (with the nearest name).
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: unknown method {method!r}; {nearest(str(method), [*METHODS])}")
    function = METHODS[method]
    options = [p for p in inspect.signature(function).parameters if p != "run"]
    if isinstance(compat, str) and compat == PEER and steps is None:
        steps = getattr(sde, "N", None)  # score_sde's own SDE objects carry the number of steps
    common = {"steps": steps, "schedule": schedule}
    given = {key: value for key, value in common.items() if value is not None} | method_options
    for name in given:
        if name not in options:
            raise TypeError(f"{name}: no option of method {method!r}; {nearest(name, options)}")
    run_sde = as_sde(sde)
    run = Setup(
        model=as_score_model(model, run_sde),
        sde=run_sde,
        method=method,
        t_max=t_max,
        t_min=t_min,
        denoise=denoise,
        clip=clip_denoised,
        compat=compat,
        given_start=bool(given_start),
    )
    return function(run, **given)
