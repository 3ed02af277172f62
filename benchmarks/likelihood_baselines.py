"""log p by the probability-flow ODE as others compute it, under the VP SDE.

`ScoreSDE` is what score_sde's ``get_likelihood_fn`` does (Song et al. 2021, app. D.2): SciPy's RK45
over the whole flattened batch and its log-densities in float64 on the CPU, and at every evaluation
one forward for the drift and, for the divergence, another forward and a backward. `Torchdiffeq` is
what a careful user would write: one forward and one backward, dopri5 on tensors. Both step in t on
x and share the step between all samples of a batch. Written from the formulas, not copied.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torchdiffeq
from scipy import integrate
from torch import Tensor, nn

from benchmarks.baselines import BETA_MAX, BETA_MIN, VP, ScoreFn, per_sample

T_MIN, T_MAX = 1e-5, 1.0


@dataclass(frozen=True)
class Outcome:
    """Log-densities [K, N] by each probe alone, and drift evaluations of every sample [N]."""

    columns: Tensor
    nfe: Tensor


def edm_score(network: nn.Module) -> ScoreFn:
    """∇ log p_t(x) from a network with EDM's preconditioning, at times [B] of the VP SDE.

    m and σ are taken from float64: 1 − e^(−B) in float32, as score_sde has it, is wrong by percents
    at t = 1e-5, which would be an error of the baseline's.
    """
    sigma_data = float(network.sigma_data)

    def score(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        b = BETA_MIN * t + 0.5 * t**2 * (BETA_MAX - BETA_MIN)
        m, sigma = torch.exp(-0.5 * b), torch.sqrt(-torch.expm1(-b))
        h = torch.sqrt(sigma**2 + (m * sigma_data) ** 2)
        levels = (1 / h, m * sigma_data / (h * sigma), 0.25 * torch.log(sigma / m))
        c_in, scale, label = (level.to(x.dtype) for level in levels)
        out = network(x * per_sample(c_in), label)
        return per_sample(scale) * out - per_sample(c_in) ** 2 * x

    return score


def drift(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """f x − ½ g² s, with the objects that score_sde makes at every call."""
    network.eval()
    reverse = VP().reverse(edm_score(network))
    reverse.probability_flow = True
    velocity: Tensor = reverse.sde(x, t)[0]
    return velocity


def divergence(network: nn.Module, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """v·Jv per sample: a forward of its own, and a backward."""
    with torch.enable_grad():
        x.requires_grad_(True)
        inner = torch.sum(drift(network, x, t) * v)
        product = torch.autograd.grad(inner, x)[0]
    x.requires_grad_(False)
    return torch.sum(product * v, dim=tuple(range(1, x.dim())))


def log_prior(z: Tensor) -> Tensor:
    """log N(z; 0, I), float64 [B]."""
    return torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).flatten(1).sum(1)


@dataclass(frozen=True)
class ScoreSDE:
    """K probes are K solves, since one solve carries one probe."""

    network: nn.Module
    tolerance: float = 1e-5

    @torch.no_grad()
    def batch(self, x: Tensor, probes: Tensor) -> Outcome:
        """x [B, …], probes [K, B, …]."""
        solves = [self._solve(x, v) for v in probes]
        nfe = torch.full((len(x),), sum(count for _, count in solves))
        return Outcome(torch.stack([log_prob for log_prob, _ in solves]), nfe)

    def _solve(self, x: Tensor, v: Tensor) -> tuple[Tensor, int]:
        shape, batch = x.shape, len(x)

        def ode(t: float, y: np.ndarray) -> np.ndarray:
            sample = torch.from_numpy(y[:-batch].reshape(shape)).to(x.device).type(torch.float32)
            times = torch.ones(batch, device=x.device) * t
            velocity = drift(self.network, sample, times)
            change = divergence(self.network, sample, times, v)
            return np.concatenate([velocity.cpu().numpy().reshape(-1), change.cpu().numpy()])

        start = np.concatenate([x.cpu().numpy().reshape(-1), np.zeros(batch)])
        solution = integrate.solve_ivp(
            ode, (T_MIN, T_MAX), start, rtol=self.tolerance, atol=self.tolerance, method="RK45"
        )
        end = torch.from_numpy(solution.y[:, -1])
        return log_prior(end[:-batch].reshape(shape)) + end[-batch:], int(solution.nfev)


@dataclass(frozen=True)
class Torchdiffeq:
    """dopri5 with its defaults, so the log-densities join its error norm; K probes in one solve."""

    network: nn.Module
    tolerance: float = 1e-5

    @torch.no_grad()
    def batch(self, x: Tensor, probes: Tensor) -> Outcome:
        """x [B, …], probes [K, B, …], both in the dtype of the state."""
        nfe = 0

        def ode(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal nfe
            nfe += 1
            sample = state[0].detach()
            with torch.enable_grad():
                sample.requires_grad_(True)
                velocity = drift(self.network, sample, t.expand(len(sample)))
                products = [
                    torch.autograd.grad(velocity, sample, v, retain_graph=k + 1 < len(probes))[0]
                    for k, v in enumerate(probes)
                ]
            change = (torch.stack(products) * probes).flatten(2).sum(2)
            return velocity.detach(), change

        times = torch.tensor([T_MIN, T_MAX], dtype=torch.float64)
        start = (x, torch.zeros(probes.shape[:2], dtype=x.dtype))
        z, change = torchdiffeq.odeint(
            ode, start, times, rtol=self.tolerance, atol=self.tolerance, method="dopri5"
        )
        return Outcome(log_prior(z[-1]) + change[-1].double(), torch.full((len(x),), nfe))


def in_batches(method: ScoreSDE | Torchdiffeq, x: Tensor, probes: Tensor, size: int) -> Outcome:
    """The method on one batch after the other."""
    parts = [
        method.batch(*part) for part in zip(x.split(size), probes.split(size, dim=1), strict=True)
    ]
    columns = torch.cat([part.columns for part in parts], dim=1)
    return Outcome(columns, torch.cat([part.nfe for part in parts]))
