"""Exact log-likelihood along the probability-flow ODE."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbm_fast.divergence import Divergence
from sbm_fast.encoding import Journey
from sbm_fast.process import count
from sbm_fast.sde import EDMSDE, Ladder, as_sde
from sbm_fast.solver import Solver

ESTIMATORS = ("hutchinson", "xtrace")
T_MIN = 1e-5
"""Where the density is taken by default when times end at 1, as in score_sde."""
EXACT_UP_TO = 64
"""The largest dimension whose trace is taken exactly by default."""
MOST_EXACT = 4096
"""The largest whose trace is taken exactly at all: as many products an evaluation."""


@dataclass(frozen=True, eq=False)
class LikelihoodResult:
    """Log-densities of N samples; float64 but for the latents.

    Attributes:
        log_prob: [N] log p_{t_min}(x) in nats; NaN for a sample that did not finish.
        stderr: [N] its standard error over the probes: 0 for the exact trace, NaN for a single
            estimate, which says nothing of its error. XTrace's estimates share their vectors, so
            their spread falls short where the products are many: for 64 dimensions its 95 %
            intervals cover 94 % with 8 products, 85 % with 32 (docs/likelihood.md).
        latent: [N, …] the state at t_max in the SDE's own scale.
        nfe: int64 [N] network evaluations, each with its products unless its integrand has no
            weight.
        finished: bool [N]; False where `max_nfe` stopped a sample, `latent` being where it was.
        columns: [Q, N] the log-density from each estimate of the trace alone; `log_prob` is their
            mean.
        seed: the seed that gave the probes; None when `keys` were given.
        trace: "exact", "hutchinson" or "xtrace"; product: "vjp" or "jvp", how it was taken.
        backend: the kernels that ran.
        seconds: wall time of the solve.
    """

    log_prob: Tensor
    stderr: Tensor
    latent: Tensor
    nfe: Tensor
    finished: Tensor
    columns: Tensor
    seed: int | None
    trace: str
    product: str
    backend: str
    seconds: float


def log_likelihood(
    model: object,
    sde: object,
    x: Tensor,
    *,
    probes: int = 1,
    exact: bool | None = None,
    estimator: str = "hutchinson",
    gaussian: bool = False,
    product: str = "auto",
    solver: str = "dopri5",
    steps: int | None = None,
    schedule: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    prior: Any = None,
    t_min: float | None = None,
    t_max: float | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int | None = None,
    keys: Tensor | None = None,
    first_sample: int = 0,
    first_probe: int = 0,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> LikelihoodResult:
    """log p(x) of data under the model's probability-flow ODE (Song et al. 2021, sec. 4.3, eq. 39).

        log p_{t_min}(x) = log p_{t_max}(x(t_max)) + ∫ div(dx/dt) dt

    The trace in the divergence is exact, or estimated as the mean of v·Jv over random probes v
    (Hutchinson 1990; Grathwohl et al. 2019) that stay the same over the solve. The state and its
    steps do not depend on the probes.

    Args:
        model: a `ScoreModel`, a network of this package, or a callable (x, t) → score; it is
            differentiated by its input.
        sde: the SDE whose times t_min and t_max are.
        x: data [N, …], any shape, taken as the state at t_min.
        probes: number K of probes; with two or more there is a standard error.
        exact: the exact trace, by a product for every dimension (`probes` is not used then), up to
            4096 of them; None: where a sample has at most 64.
        estimator: "hutchinson", or "xtrace" (Epperly et al. 2024), whose K products (even, ≥ 4) go
            to K/2 vectors and to the range they span.
        gaussian: normal probes instead of signs ±1, which have the smaller variance.
        product: "vjp" (reverse mode), "jvp" (forward mode, keeps no activations), or "auto": the
            first where the network can be differentiated so, else the second.
        solver, steps, schedule, rtol, atol, max_nfe, batch_size: see `sbm_fast.solver.Solver`.
        prior: the law at t_max: an object with log_prob(x [N, …]) → [N], or such a function; None:
            N(0, sde.prior_std² I).
        t_min: None: 1e-5, or the SDE's own where its time is a noise level or an index.
        t_max: None: the SDE's own.
        cond: keyword arguments for the network; tensors of first dimension N belong to the samples.
        seed, keys, first_sample: give each sample its probes, as in `sbm_fast.sample`.
        first_probe: number of the first probe; others are independent of these.
        dtype: of the state; log-densities are summed in float64 always. float64 makes the traces'
            sums float64 too.
        net_dtype, device, backend, progress: as in `sbm_fast.sample`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; a network that
            cannot be differentiated; outputs that are not finite, with evaluation, time and sample.

    Warns of samples that reached max_nfe.

    >>> import torch, sbm_fast
    >>> r = sbm_fast.log_likelihood(lambda x, t: -x, sbm_fast.VPSDE(), torch.zeros(3, 2))
    >>> bool((r.log_prob + 1.8379).abs().max() < 1e-3)
    True
    """
    settings = Solver(solver, steps, schedule, rtol, atol, max_nfe, batch_size, progress)
    run = as_sde(sde)
    # Where time is a noise level or an index, 1e-5 is nothing special.
    if t_min is None and run.t_max == 1.0 and not isinstance(run, (EDMSDE, Ladder)):
        t_min = T_MIN
    journey = Journey.of(model, sde, t_min, t_max, dtype, net_dtype, device, backend)
    data = journey.samples("x", x)
    own_keys, seed = journey.keys(len(data), seed, keys, first_sample)
    log_prior = _log_prior(prior, journey.flow.sde.prior_std)
    dimension = math.prod(data.shape[1:])
    divergence = _divergence(
        journey, dimension, probes, exact, estimator, gaussian, product, first_probe
    )
    begin = time.perf_counter()
    solution, _ = journey.carry(data, own_keys, settings, cond=cond, divergence=divergence)
    flow = journey.flow
    volume = dimension * math.log(flow.prior.scale / flow.data.scale)
    at_prior = log_prior(solution.u)
    _check_prior(at_prior, solution.finished)
    columns = torch.where(solution.finished, at_prior + volume + solution.integrals, torch.nan)
    return LikelihoodResult(
        log_prob=columns.mean(0),
        stderr=_stderr(columns, divergence.kind),
        latent=solution.u,
        nfe=solution.nfe,
        finished=solution.finished,
        columns=columns,
        seed=seed,
        trace=divergence.kind,
        product=divergence.products,
        backend=journey.kernels.name,
        seconds=time.perf_counter() - begin,
    )


def _divergence(
    journey: Journey,
    dimension: int,
    probes: int,
    exact: bool | None,
    estimator: str,
    gaussian: bool,
    product: str,
    first_probe: int,
) -> Divergence:
    if exact is not None and not isinstance(exact, bool):
        raise TypeError(f"exact: expected True, False or None, got {exact!r}")
    count("first_probe", first_probe, least=0)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {ESTIMATORS}, got {estimator!r}")
    if exact and dimension > MOST_EXACT:
        raise ValueError(
            f"exact: a sample has {dimension} dimensions, as many products an evaluation as the "
            f"exact trace takes; expected at most {MOST_EXACT}, or exact=False with probes"
        )
    if exact is None:
        exact = dimension <= EXACT_UP_TO and estimator == "hutchinson"
    return Divergence(
        "exact" if exact else estimator,
        probes=probes,
        gaussian=gaussian,
        product=product,
        first_draw=first_probe,
        kernels=journey.kernels,
    )


def _check_prior(log_prior: Tensor, finished: Tensor) -> None:
    bad = torch.nonzero(log_prior.isnan() & finished).flatten()
    if len(bad):
        raise ValueError(
            f"prior: its log-density is NaN for {len(bad)} samples, first for sample {int(bad[0])}"
        )


def _stderr(columns: Tensor, trace: str) -> Tensor:
    count = len(columns)
    if trace == "exact":
        return 0.0 * columns[0]  # NaN where the sample did not finish
    if count < 2 or columns.numel() == 0:
        return torch.full_like(columns[0], torch.nan)
    return columns.std(dim=0, correction=1) / math.sqrt(count)


def _log_prior(prior: Any, std: float) -> Callable[[Tensor], Tensor]:
    """x [N, …] → float64 [N]."""
    if prior is None:
        return lambda x: normal_log_density(x, std)
    density = getattr(prior, "log_prob", prior)
    if not callable(density):
        raise TypeError(f"prior: expected log_prob(x) -> [N] or an object with it, got {prior!r}")

    def checked(x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(0, dtype=torch.float64)
        with torch.no_grad():
            value = density(x.clone())
        if not isinstance(value, Tensor) or tuple(value.shape) != (len(x),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"prior: expected one log-density for each sample, shape ({len(x)},), got {got}; "
                "torch.distributions.Independent sums over a sample"
            )
        return value.double()

    return checked


def normal_log_density(x: Tensor, std: float) -> Tensor:
    """log N(x; 0, std² I) per sample, float64 [N]."""
    dimension = math.prod(x.shape[1:])
    flat = x.reshape(len(x), dimension).double() / std
    return -0.5 * (flat**2).sum(1) - dimension * (math.log(std) + 0.5 * math.log(2 * math.pi))
