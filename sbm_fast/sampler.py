"""Running a plan: `sample`, `Sampler`, and a `Run` that can be stopped and taken up again."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sbm_fast import noise as noise_module
from sbm_fast.adaptive import has_no_plan, sample_adaptive
from sbm_fast.arguments import (
    check_cuda_graph,
    check_dtype,
    full_shape,
    graph_asked_for,
    guidance_weights,
    initial_state,
    placement,
    warn_about,
)
from sbm_fast.backend import Kernels, choose_backend
from sbm_fast.capture import Capture, CudaRecorder
from sbm_fast.methods import FROM_DATA, DynamicThreshold, make_plan
from sbm_fast.model import ScoreModel, as_score_model
from sbm_fast.plan import NORMS, Plan, X
from sbm_fast.run import NoiseHook, Run, Step, Table
from sbm_fast.run_state import check_guidance, check_state, check_values
from sbm_fast.sample_info import SampleInfo
from sbm_fast.sde import SDE, as_sde

__all__ = ["Run", "SampleInfo", "Sampler", "Step", "sample"]

Callback = Callable[[Step], None]


class Sampler:
    """A sampler prepared once and called many times.

    Takes the arguments of `sample` that don't change between calls; `sampler(seed=…)` samples.
    `sampler.start(…)` gives a `Run` to go through step by step, `sampler.resume(state)` takes one
    up where it was left.

    With cuda_graph=True the first call records one row (network, guidance, update, advance of time)
    as a CUDA graph, and every row of every later call is its replay: new seeds, x_init, guidance
    weights and tensors in `cond` are copied into the graph's memory; their shapes and all other
    values in `cond` must stay. What the network does in Python is done while recording only, and
    with the precision flags of that moment. Runs own their states and results; they take turns.
    """

    def __init__(
        self,
        model: object,
        sde: object,
        shape: Sequence[int] | None = None,
        *,
        method: str | Plan = "pc",
        steps: int | None = None,
        num_samples: int = 16,
        cond: Mapping[str, Any] | None = None,
        guidance: float | Tensor | None = None,
        t_max: float | None = None,
        t_min: float | None = None,
        schedule: Any = None,
        denoise: str | bool | None = None,
        clip_denoised: float | DynamicThreshold | None = None,
        compat: str | None = None,
        dtype: torch.dtype = torch.float32,
        net_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        cuda_graph: bool | str = "auto",
        **method_options: Any,
    ) -> None:
        self.sde: SDE = as_sde(sde)
        self.model: ScoreModel = as_score_model(model, self.sde)
        self.shape = full_shape(shape, num_samples, self.model)
        check_dtype("dtype", dtype, (torch.float32, torch.float64))
        self.dtype = dtype
        self.device, self.net_dtype = placement(self.model, device, net_dtype, dtype)
        self.kernels: Kernels = choose_backend(backend, self.device)
        captures = check_cuda_graph(cuda_graph, self.device, self.kernels)
        self._capture = Capture(CudaRecorder(self.device)) if captures else None
        self.cond, self.guidance = cond, guidance
        # The peer's own SDE object knows its N, which `as_sde` has no place for.
        self._plan_arguments = dict(
            sde=sde,
            method=method,
            steps=steps,
            t_max=t_max,
            t_min=t_min,
            schedule=schedule,
            denoise=denoise,
            clip_denoised=clip_denoised,
            compat=compat,
            **method_options,
        )
        self._tables: dict[bool, Table] = {}
        self._own_plan = method if isinstance(method, Plan) else None
        if self._own_plan is not None:
            whole = [k for k, v in self._plan_arguments.items() if v is not None]
            if extra := sorted(set(whole) - {"sde", "method"}):
                raise ValueError(f"{extra[0]}: the plan given as method has settled this already")
        warn_about(self.plan, self.net_dtype, math.prod(self.shape[1:]))

    @property
    def plan(self) -> Plan:
        """The table that runs: the one given as method, else the one for no x_init (for one, where
        the method starts from data)."""
        own, method = self._own_plan, self._plan_arguments["method"]
        from_data = isinstance(method, str) and method in FROM_DATA
        return self._table(from_data if own is None else _begins_given(own)).plan

    def _table(self, given_start: bool) -> Table:
        if given_start not in self._tables:
            plan = self._own_plan or self._written_plan(given_start)
            if self._own_plan is not None and _begins_given(plan) != given_start:
                need = "begins from a given state" if not given_start else "draws its own start"
                raise ValueError(f"x_init: the plan given as method {need}")
            batch = self.shape[0]
            self._tables[given_start] = Table.of(plan, given_start, batch, self.dtype, self.device)
        return self._tables[given_start]

    def _written_plan(self, given_start: bool) -> Plan:
        arguments: dict[str, Any] = self._plan_arguments
        return make_plan(model=self.model, given_start=given_start, **arguments)

    def start(
        self,
        *,
        seed: int | None = None,
        keys: Tensor | None = None,
        first_sample: int = 0,
        cond: Mapping[str, Any] | None = None,
        guidance: float | Tensor | None = None,
        x_init: Tensor | None = None,
        noise: NoiseHook | None = None,
    ) -> Run:
        """A run that stands before its first row. Arguments as in `sample`."""
        batch = self.shape[0]
        if keys is None:
            seed = noise_module.fresh_seed() if seed is None else seed
            keys = noise_module.keys(seed, batch, first_sample, self.device)
        else:
            noise_module.check_keys(keys, batch, seed, first_sample)
            keys = keys.to(self.device).contiguous()
        if noise is not None and not callable(noise):
            raise TypeError(f"noise: expected a callable, got {type(noise).__name__}")
        table = self._table(x_init is not None)
        plan = table.plan
        if first_sample and (plan.norm == NORMS.index("batch_mean")).any():
            raise ValueError(
                'norm: "batch_mean" couples the samples of a batch, so a shard '
                f'(first_sample={first_sample}) would differ from the whole; use norm="sigma"'
            )
        x = initial_state(x_init, self.shape, self.dtype, self.device, plan.start_scale)
        return self._run(table, x, keys, seed, cond, guidance, noise)

    def resume(
        self,
        state: Mapping[str, Tensor],
        *,
        cond: Mapping[str, Any] | None = None,
        guidance: float | Tensor | None = None,
        noise: NoiseHook | None = None,
    ) -> Run:
        """The run whose `Run.state()` was kept; it goes on to the bit as if it had never stopped.

        The state holds neither `cond` nor the `noise` hook: give here what `start` was given, or
        the run goes on with the sampler's cond and the counter-based noise. Guidance is in it, but
        must be given again too; other weights hold from here on.

        Raises: ValueError when the state is not one of this sampler (shape, dtype, plan), or when
            guidance was forgotten, or given to a run that had none.
        """
        check_state(state, self.dtype, self.shape)
        table = self._table(bool(state["given_start"].item()))
        if int(state["plan"].item()) != int(table.fingerprint().item()):
            raise ValueError("state: was kept from another plan than this sampler's")
        check_values(state, table.plan.rows)
        x = torch.empty(self.shape, dtype=self.dtype, device=self.device).copy_(state["x"])
        keys = state["keys"].to(self.device).contiguous()
        noise_module.check_keys(keys, self.shape[0], None, 0)
        run = self._run(table, x, keys, None, cond, guidance, noise)
        check_guidance(state["guidance"], run.memory.guidance, given=guidance is not None)
        row = int(state["row"].item())
        run.restore(row, state["registers"], state["first_bad"])
        return run

    def __call__(
        self,
        *,
        seed: int | None = None,
        keys: Tensor | None = None,
        first_sample: int = 0,
        cond: Mapping[str, Any] | None = None,
        guidance: float | Tensor | None = None,
        x_init: Tensor | None = None,
        noise: NoiseHook | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_info: bool = False,
    ) -> Any:
        """Samples; the tensor, or (tensor, SampleInfo) with `return_info`."""
        run = self.start(
            seed=seed,
            keys=keys,
            first_sample=first_sample,
            cond=cond,
            guidance=guidance,
            x_init=x_init,
            noise=noise,
        )
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
        begin = time.perf_counter()
        run.advance(progress=progress, callback=callback)
        x = run.result()
        seconds = time.perf_counter() - begin
        if not return_info:
            return x
        on_cpu = self.device.type == "cpu"
        return x, SampleInfo(
            nfe=run.nfe,
            seed=run.seed,
            seconds=seconds,
            seconds_network=run.seconds_network if on_cpu else math.nan,
            seconds_sampler=seconds - run.seconds_network if on_cpu else math.nan,
            backend=self.kernels.name,
            plan=run.plan,
        )

    def _run(
        self,
        table: Table,
        x: Tensor,
        keys: Tensor,
        seed: int | None,
        cond: Mapping[str, Any] | None,
        guidance: float | Tensor | None,
        noise: NoiseHook | None,
    ) -> Run:
        cond = self.cond if cond is None else cond
        if cond is not None and not isinstance(cond, Mapping):
            raise TypeError(
                f"cond: expected a dict of keyword arguments, got {type(cond).__name__}"
            )
        if noise is not None and self._capture is not None:
            raise ValueError(
                "noise: a CUDA graph makes its own noise and calls nothing between rows; use "
                "cuda_graph=False with a noise hook"
            )
        guidance = self.guidance if guidance is None else guidance
        weights = None if guidance is None else guidance_weights(guidance, x, self.model)
        return Run(self, table, x, keys, seed, dict(cond or {}), weights, noise, self._capture)


def _begins_given(plan: Plan) -> bool:
    return bool(plan.coef[0, 0, X] != 0)


def sample(
    model: object,
    sde: object,
    shape: Sequence[int] | None = None,
    *,
    method: str | Plan = "pc",
    steps: int | None = None,
    seed: int | None = None,
    keys: Tensor | None = None,
    first_sample: int = 0,
    num_samples: int = 16,
    cond: Mapping[str, Any] | None = None,
    guidance: float | Tensor | None = None,
    x_init: Tensor | None = None,
    t_max: float | None = None,
    t_min: float | None = None,
    schedule: Any = None,
    denoise: str | bool | None = None,
    clip_denoised: float | DynamicThreshold | None = None,
    noise: NoiseHook | None = None,
    compat: str | None = None,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    cuda_graph: bool | str = "auto",
    progress: bool = False,
    callback: Callback | None = None,
    return_info: bool = False,
    **method_options: Any,
) -> Any:
    """Samples from a score model.

    Args:
        model: a `ScoreModel`, a network of this package, or any callable (x, t) → score, with t
            float [B] in (0, T]. It gets the same tensor objects in every row (copy what it keeps),
            and a module is put into eval mode only when it is the model itself.
        sde: the SDE to sample under (`VESDE`, `VPSDE`, `SubVPSDE`, `EDMSDE`, `NCSNLadder`,
            `DDPMSchedule`, or score_sde's own objects).
        shape: of the result, batch included; None: (num_samples, *model.sample_shape).
        method: "em", "reverse_diffusion", "ancestral", "pc", "ald", "langevin", "ode", "ddpm",
            "ddim", "ddim_inversion", "edm", "dpmpp_2m", "dpmpp_2m_sde"; its own options follow as
            keyword arguments (see `sbm_fast.methods`). Or a `Plan` of your own
            (`sbm_fast.methods.PlanBuilder`, `Plan.load`).
        steps: steps of the method's main recursion.
        seed: gives sample b the key of global index first_sample + b, so that the same sample
            comes out of any batch. None: drawn from torch's default generator.
        keys: int64 [B], instead of seed and first_sample.
        cond: keyword arguments for the network.
        guidance: classifier-free guidance weight w, a number or [B]: F_u + w·(F_c − F_u); 1 is
            no guidance. Needs the model's null_cond.
        x_init: the state at t_max in the SDE's own scale, instead of the prior. For
            "ddim_inversion" the data: the state at t_min, which it carries up to t_max.
        t_max, t_min, schedule: where the trajectory runs (see `sbm_fast.schedule.time_grid`).
        denoise: "mean" drops the last noise, "tweedie" spends one more evaluation, False does
            neither, None is what the method's paper does.
        clip_denoised: L clamps the denoised estimate to ±L; `DynamicThreshold` finds the bound in
            each sample. Under guidance the guided estimate. Refused with the data-dependent norms
            of "pc" (L only) and with DDIM's rederive_eps=False (`DynamicThreshold` only).
        noise: (draw, stream) → tensor of `shape`, used instead of the counter-based noise.
        compat: "score_sde", "ddpm" or "edm": that peer's grid, order, norms and last step.
        dtype: of the state, torch.float32 or torch.float64.
        net_dtype: of the network's input; None: that of its parameters, else dtype.
        device: None: that of the model's parameters, else torch's default.
        backend: "auto", "cuda" and "cpu" (compiled), "triton" or "eager" (plain torch, any
            device); see `sbm_fast.doctor()`.
        cuda_graph: True records a row on its first use as a CUDA graph and replays it for every
            later one (see `Sampler`); "auto" and False do not.
        progress: show a progress bar.
        callback: called with a `Step` after every row.
        return_info: return (samples, `SampleInfo`).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; a network
            output that is not finite is reported with step, time and sample.

    >>> import sbm_fast
    >>> x = sbm_fast.sample(lambda x, t: -x, sbm_fast.VPSDE(), (4, 2), steps=50, seed=0)
    """
    if has_no_plan(method, method_options):
        refused = {
            "steps": steps,
            "schedule": schedule,
            "denoise": None if denoise is False else denoise,
            "clip_denoised": clip_denoised,
            "noise": noise,
            "compat": compat,
            "cuda_graph": graph_asked_for(cuda_graph) or None,
            "callback": callback,
        }
        return sample_adaptive(
            model,
            sde,
            shape,
            num_samples=num_samples,
            draws=(seed, keys, first_sample),
            cond=cond,
            guidance=guidance,
            x_init=x_init,
            times=(t_min, t_max),
            refused=refused,
            dtype=dtype,
            net_dtype=net_dtype,
            device=device,
            backend=backend,
            progress=progress,
            return_info=return_info,
            **method_options,
        )
    sampler = Sampler(
        model,
        sde,
        shape,
        method=method,
        steps=steps,
        num_samples=num_samples,
        t_max=t_max,
        t_min=t_min,
        schedule=schedule,
        denoise=denoise,
        clip_denoised=clip_denoised,
        compat=compat,
        dtype=dtype,
        net_dtype=net_dtype,
        device=device,
        backend=backend,
        cuda_graph=cuda_graph,
        **method_options,
    )
    return sampler(
        seed=seed,
        keys=keys,
        first_sample=first_sample,
        cond=cond,
        guidance=guidance,
        x_init=x_init,
        noise=noise,
        progress=progress,
        callback=callback,
        return_info=return_info,
    )
