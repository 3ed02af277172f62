"""Between data and latents along the probability flow: `encode`, `interpolate`, and what
likelihoods and the adaptive sampler share with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.arguments import check_dtype, placement, warn_caller
from sbm_fast.backend import Kernels, choose_backend
from sbm_fast.flow import FlowSystem, ProbabilityFlow
from sbm_fast.model import ScoreModel, as_score_model
from sbm_fast.module_state import eval_mode, frozen
from sbm_fast.nn.conv import packed
from sbm_fast.ode import Solution
from sbm_fast.process import count
from sbm_fast.sde import as_sde
from sbm_fast.solver import Solver

if TYPE_CHECKING:
    from sbm_fast.divergence import Divergence


@dataclass(frozen=True)
class Journey:
    """A model's flow between two times, on a device: what every solve along it needs.

    Arguments as in `sbm_fast.log_likelihood`.
    """

    model: ScoreModel
    flow: ProbabilityFlow
    device: torch.device
    dtype: torch.dtype
    net_dtype: torch.dtype
    kernels: Kernels

    @classmethod
    def of(
        cls,
        model: object,
        sde: object,
        t_min: float | None,
        t_max: float | None,
        dtype: torch.dtype,
        net_dtype: torch.dtype | None,
        device: torch.device | str | None,
        backend: str,
    ) -> Journey:
        run = as_sde(sde)
        score_model = as_score_model(model, run)
        check_dtype("dtype", dtype, (torch.float32, torch.float64))
        place, net_dtype = placement(score_model, device, net_dtype, dtype)
        flow = ProbabilityFlow(score_model, run, t_min, t_max)
        return cls(score_model, flow, place, dtype, net_dtype, choose_backend(backend, place))

    def samples(self, name: str, x: object) -> Tensor:
        """x [N, …] in the state's dtype on the device; errors name it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating tensor (samples, …), got {got}")
        if x.layout is not torch.strided or x.device.type == "meta":
            raise TypeError(
                f"{name}: expected a dense tensor with values, got {x.layout}, {x.device}"
            )
        expected = self.model.sample_shape
        if x.dim() < 1 or (expected is not None and tuple(x.shape[1:]) != tuple(expected)):
            inner = "…" if expected is None else ", ".join(map(str, expected))
            raise ValueError(f"{name}: expected shape (samples, {inner}), got {tuple(x.shape)}")
        x = x.detach().to(self.device, self.dtype, memory_format=torch.contiguous_format)
        if not torch.isfinite(x).all():
            flat = torch.isfinite(x).reshape(len(x), -1).all(1)
            bad = int(torch.argmin(flat.int()))
            raise ValueError(f"{name}: holds values that are not finite, first in sample {bad}")
        return x

    def keys(
        self, n: int, seed: int | None, keys: Tensor | None, first_sample: int
    ) -> tuple[Tensor, int | None]:
        """(keys of n samples, the seed that gave them)."""
        if keys is not None:
            noise.check_keys(keys, n, seed, first_sample)
            return keys.to(self.device).contiguous(), None
        seed = noise.fresh_seed() if seed is None else seed
        return noise.keys(seed, n, first_sample, self.device), seed

    def carry(
        self,
        x: Tensor,
        keys: Tensor,
        solver: Solver,
        *,
        cond: Mapping[str, Any] | None = None,
        guidance: Tensor | None = None,
        divergence: Divergence | None = None,
        to_prior: bool = True,
    ) -> tuple[Solution, FlowSystem]:
        """x [N, …] to the other end of the flow."""
        if cond is not None and not isinstance(cond, Mapping):
            raise TypeError(
                f"cond: expected a dict of keyword arguments, got {type(cond).__name__}"
            )
        system = FlowSystem(
            self.flow, keys, self.kernels, self.net_dtype, cond, guidance, divergence
        )
        net = self.model.net
        with _plain_mode(), eval_mode(net), frozen(net), packed(net):
            solution = solver.carry(system, x, self.kernels, to_prior=to_prior)
        left = int((~solution.finished).sum())
        if left:
            warn_caller(
                f"max_nfe: {left} of {len(x)} samples were left on the way after "
                f"{int(solution.nfe.max())} evaluations"
            )
        return solution, system


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """No gradients but where they are asked for, also under the caller's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def encode(
    model: object,
    sde: object,
    x: Tensor,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    schedule: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    t_min: float | None = None,
    t_max: float | None = None,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: bool = False,
    return_info: bool = False,
) -> Any:
    """Data to latents: the probability-flow ODE from t_min to t_max (Song et al. 2021, sec. 4.3).

    `sample(model, sde, method="ode", solver=…, x_init=latent, t_min=…)` with the same t_min takes
    them back.

    Args:
        x: data [N, …], taken as the state at t_min in the SDE's own scale.
        solver, steps, schedule, rtol, atol, max_nfe, batch_size: see `sbm_fast.solver.Solver`.
        the others: as in `sbm_fast.log_likelihood`.
        return_info: return (latents, `Solution`), which says what it took.

    Returns: [N, …], the state at t_max in the SDE's own scale.

    Raises: ValueError, TypeError naming the argument; warns of samples that reached max_nfe, which
    are given as they were left.
    """
    settings = Solver(solver, steps, schedule, rtol, atol, max_nfe, batch_size, progress)
    journey = Journey.of(model, sde, t_min, t_max, dtype, net_dtype, device, backend)
    data = journey.samples("x", x)
    keys, _ = journey.keys(len(data), 0, None, 0)  # nothing is drawn
    solution, _ = journey.carry(data, keys, settings, cond=cond)
    return (solution.u, solution) if return_info else solution.u


def interpolate(
    model: object,
    sde: object,
    x_a: Tensor,
    x_b: Tensor,
    num: int = 8,
    *,
    cond: Mapping[str, Any] | None = None,
    solver: str = "dopri5",
    steps: int | None = None,
    schedule: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    t_min: float | None = None,
    t_max: float | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Data on the way from x_a to x_b: both are encoded, their latents are interpolated on a great
    circle (Song et al. 2021, sec. D.3), and every point is decoded.

        z_w = (sin((1−w) θ) z_a + sin(w θ) z_b)/sin θ,   θ the angle between z_a and z_b

    Args:
        x_a, x_b: one sample each, without the batch.
        num: points, ends included (w = 0, 1/(num−1), …, 1).
        cond: conditioning, the same for all points: tensors whose first dimension is 1 are
            repeated for each, others are given as they are.
        the others: as in `encode`.

    Returns: [num, …].

    Raises: ValueError, TypeError naming the argument.
    """
    count("num", num, least=2)
    settings = Solver(solver, steps, schedule, rtol, atol, max_nfe, batch_size, progress)
    journey = Journey.of(model, sde, t_min, t_max, dtype, net_dtype, device, backend)
    for name, x in (("x_a", x_a), ("x_b", x_b)):
        if isinstance(x, Tensor) and x.shape != getattr(x_a, "shape", None):
            raise ValueError(f"{name}: expected the shape of x_a, {tuple(x_a.shape)}")
        journey.samples(name, x[None] if isinstance(x, Tensor) else x)
    ends = journey.samples("x_a", torch.stack([x_a, x_b.to(x_a)]))
    keys, _ = journey.keys(num, 0, None, 0)  # nothing is drawn
    of_ends, of_points = _repeated(cond, 2), _repeated(cond, num)
    latents, _ = journey.carry(ends, keys[:2], settings, cond=of_ends)
    points = _great_circle(latents.u[0], latents.u[1], num)
    solution, _ = journey.carry(points, keys, settings, cond=of_points, to_prior=False)
    return solution.u


def _repeated(cond: Any, n: int) -> Any:
    """Conditioning of one sample for n; ValueError for what would be taken apart among them."""
    if not isinstance(cond, Mapping):
        return cond
    for name, v in cond.items():
        if isinstance(v, Tensor) and v.dim() > 0 and len(v) == n:
            raise ValueError(
                f"cond: is the same for all points, so the first dimension of {name!r} must not be "
                f"their number; expected 1, got {n}"
            )
    return {
        name: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) and v.shape[:1] == (1,) else v
        for name, v in cond.items()
    }


def _great_circle(a: Tensor, b: Tensor, num: int) -> Tensor:
    va, vb = a.double().flatten(), b.double().flatten()
    cosine = (va @ vb) / (va.norm() * vb.norm()).clamp_min(1e-300)
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    w = torch.linspace(0.0, 1.0, num, dtype=torch.float64, device=a.device)[:, None]
    if torch.sin(angle) < 1e-6:  # one direction, or opposite ones: no circle is singled out
        points = (1 - w) * va + w * vb
    else:
        points = (torch.sin((1 - w) * angle) * va + torch.sin(w * angle) * vb) / torch.sin(angle)
    return points.reshape(num, *a.shape).to(a.dtype)
