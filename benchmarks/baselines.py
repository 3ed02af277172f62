"""One step of the VP SDE's samplers in plain torch, written twice, and once for torch.compile.

`ScoreSDE` does what score_sde's ``get_pc_sampler`` does at every step: a time vector, a score
function, a class for the reverse SDE and an update object made anew, coefficients computed per
sample on tensors, every intermediate result a new tensor. It is written from the formulas of
Song et al. 2021 (eq. 6; appendices E and G), not copied. `Tuned` is what a careful user would write
instead: coefficients computed ahead, the state and the noise updated in place.

Their noise can be replaced, so that all implementations can be compared on the same numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BETA_MIN, BETA_MAX = 0.1, 20.0
STEPS = 1000  # N of score_sde's configurations
T_MIN = 1e-3
SNR = 0.16

Draw = Callable[[Tensor], Tensor]
"""Noise like a tensor, e.g. torch.randn_like."""
ScoreFn = Callable[[Tensor, Tensor], Tensor]


def per_sample(v: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 1]."""
    return v[:, None, None, None]


class SDE(ABC):
    """Abstract, as score_sde's are: that makes the class that every step defines dearer."""

    @property
    @abstractmethod
    def T(self) -> int: ...

    @abstractmethod
    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...


class VP(SDE):
    """dx = −½β(t) x dt + √β(t) dw, as score_sde evaluates it: on a vector of times."""

    def __init__(self) -> None:
        self.N = STEPS
        self.discrete_betas = torch.linspace(BETA_MIN / STEPS, BETA_MAX / STEPS, STEPS)
        self.alphas = 1.0 - self.discrete_betas

    @property
    def T(self) -> int:
        return 1

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = BETA_MIN + t * (BETA_MAX - BETA_MIN)
        return -0.5 * per_sample(beta) * x, torch.sqrt(beta)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_mean = -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN
        mean = torch.exp(per_sample(log_mean)) * x
        return mean, torch.sqrt(1.0 - torch.exp(2.0 * log_mean))

    def index(self, t: Tensor) -> Tensor:
        return (t * (self.N - 1) / self.T).long()

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        index = self.index(t)
        beta = self.discrete_betas.to(x.device)[index]
        alpha = self.alphas.to(x.device)[index]
        diffusion = torch.sqrt(beta)
        return per_sample(torch.sqrt(alpha)) * x - x, diffusion

    def reverse(self, score_fn: ScoreFn) -> "VP":
        """The reverse-time SDE, a class of its own at every call (as score_sde has it)."""
        steps, final_time = self.N, self.T
        forward_sde, forward_discretize = self.sde, self.discretize

        class ReverseVP(self.__class__):  # type: ignore[name-defined]
            def __init__(self) -> None:
                self.N = steps
                self.probability_flow = False

            @property
            def T(self) -> int:
                return final_time

            def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                drift, diffusion = forward_sde(x, t)
                score = score_fn(x, t)
                factor = 0.5 if self.probability_flow else 1.0
                return drift - per_sample(diffusion) ** 2 * score * factor, diffusion

            def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                drift, diffusion = forward_discretize(x, t)
                factor = 0.5 if self.probability_flow else 1.0
                reverse_drift = drift - per_sample(diffusion) ** 2 * score_fn(x, t) * factor
                return reverse_drift, diffusion

        reverse: VP = ReverseVP()
        return reverse


def score_function(sde: VP, network: nn.Module) -> ScoreFn:
    """What a network's output becomes: −ε̂/σ(t), or itself where the network gives the score.

    score_sde knows the first for VP and the second for VE; an analytic score under VP has nothing
    to convert, so none of that is charged to it.
    """

    def evaluate(x: Tensor, labels: Tensor) -> Tensor:
        network.eval()  # at every evaluation, as score_sde does
        out: Tensor = network(x, labels)
        return out

    def score_from_noise(x: Tensor, t: Tensor) -> Tensor:
        score = evaluate(x, t * 999)
        std = sde.marginal_prob(torch.zeros_like(x), t)[1]
        return -score / per_sample(std)

    return score_from_noise if network.predicts == "eps" else evaluate


class Update:
    """What predictors and correctors share: made anew at every step."""

    def __init__(self, sde: VP, score_fn: ScoreFn, draw: Draw) -> None:
        self.forward_sde, self.score_fn, self.draw = sde, score_fn, draw


class Predictor(Update):
    def __init__(self, sde: VP, score_fn: ScoreFn, draw: Draw) -> None:
        super().__init__(sde, score_fn, draw)
        self.reverse_sde = sde.reverse(score_fn)


class EulerMaruyama(Predictor):
    """x' = x + [f x − g² s] Δt + g √|Δt| z, Δt = −1/N."""

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        dt = -1.0 / self.reverse_sde.N
        z = self.draw(x)
        drift, diffusion = self.reverse_sde.sde(x, t)
        mean = x + drift * dt
        return mean + per_sample(diffusion) * np.sqrt(-dt) * z, mean


class ReverseDiffusion(Predictor):
    """x' = (2 − √(1−β_i)) x + β_i s + √β_i z."""

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion = self.reverse_sde.discretize(x, t)
        z = self.draw(x)
        mean = x - drift
        return mean + per_sample(diffusion) * z, mean


class Langevin(Update):
    """x' = x + ε s + √(2ε) z, ε = 2 α_i (r ‖z‖/‖s‖)² with norms averaged over the batch."""

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sde = self.forward_sde
        alpha = sde.alphas.to(t.device)[sde.index(t)]
        score = self.score_fn(x, t)
        z = self.draw(x)
        score_norm = torch.norm(score.reshape(score.shape[0], -1), dim=-1).mean()
        noise_norm = torch.norm(z.reshape(z.shape[0], -1), dim=-1).mean()
        step = (SNR * noise_norm / score_norm) ** 2 * 2 * alpha
        mean = x + per_sample(step) * score
        return mean + per_sample(torch.sqrt(step * 2)) * z, mean


class ScoreSDE:
    """Steps of score_sde's sampling loop: updates of the given kinds at each time, in order."""

    def __init__(
        self, network: nn.Module, updates: list[type[Update]], draw: Draw | None = None
    ) -> None:
        self.sde, self.network, self.updates = VP(), network, updates
        self.draw: Draw = torch.randn_like if draw is None else draw
        self.i = STEPS

    def reset(self, x: Tensor) -> None:
        self.x, self.i = x.clone(), 0
        self.times = torch.linspace(1, T_MIN, STEPS, device=x.device)

    @property
    def left(self) -> int:
        return STEPS - self.i

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        for i in range(self.i, self.i + steps):
            t = self.times[i]
            vec_t = torch.ones(self.x.shape[0], device=t.device) * t
            for kind in self.updates:
                score_fn = score_function(self.sde, self.network)
                update: Any = kind(self.sde, score_fn, self.draw)
                self.x, self.x_mean = update(self.x, vec_t)
        self.i += steps


def euler_maruyama_coefficients(dtype: torch.dtype) -> Tensor:
    """[N, 3]: factors of x, of the network's ε̂ and of z at each step, from float64."""
    t = torch.linspace(1, T_MIN, STEPS).double()
    beta = BETA_MIN + t * (BETA_MAX - BETA_MIN)
    std = torch.sqrt(-torch.expm1(-0.5 * t**2 * (BETA_MAX - BETA_MIN) - t * BETA_MIN))
    columns = [1 + beta / (2 * STEPS), -beta / STEPS / std, torch.sqrt(beta / STEPS)]
    return torch.stack(columns, dim=1).to(dtype)


def corrector_coefficients(dtype: torch.dtype) -> Tensor:
    """[N, 4]: Langevin's 2 r² α_i, then the predictor's factors of x, s and z, from float64."""
    beta = torch.linspace(BETA_MAX / STEPS, BETA_MIN / STEPS, STEPS, dtype=torch.float64)
    columns = [2 * SNR**2 * (1 - beta), 2 - torch.sqrt(1 - beta), beta, torch.sqrt(beta)]
    return torch.stack(columns, dim=1).to(dtype)


class Tuned:
    """The same steps with hoisted coefficients, in place, into buffers made once."""

    def __init__(
        self,
        network: nn.Module,
        corrector: bool,
        draw: Draw | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.corrector, self.draw = network, corrector, draw
        make = corrector_coefficients if corrector else euler_maruyama_coefficients
        self.coefficients = make(torch.float64).tolist()
        self.dtype = dtype
        self.i = STEPS

    def reset(self, x: Tensor) -> None:
        self.x, self.z, self.i = x.clone(), torch.empty_like(x), 0
        self.generator = torch.Generator(x.device).manual_seed(0)
        times = torch.linspace(1, T_MIN, STEPS, dtype=self.dtype, device=x.device)
        self.labels = times[:, None].expand(STEPS, len(x)) * (1 if self.corrector else 999)

    @property
    def left(self) -> int:
        return STEPS - self.i

    def noise(self) -> Tensor:
        if self.draw is not None:
            return self.draw(self.x)
        return self.z.normal_(generator=self.generator)

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        for i in range(self.i, self.i + steps):
            *scale, a, b, d = self.coefficients[i]
            if scale:
                self.correct(scale[0], self.labels[i])
            out = self.network(self.x, self.labels[i])
            self.x.mul_(a).add_(out, alpha=b).add_(self.noise(), alpha=d)
        self.i += steps

    def correct(self, scale: float, labels: Tensor) -> None:
        score, z = self.network(self.x, labels), self.noise()
        ratio = mean_norm(z) / mean_norm(score)
        epsilon = ratio * ratio * scale
        self.x.addcmul_(score, epsilon).addcmul_(z, (2 * epsilon).sqrt())


def mean_norm(v: Tensor) -> Tensor:
    """Mean over the batch of ‖v_b‖."""
    return torch.linalg.vector_norm(v.view(len(v), -1), dim=1).mean()


def euler_maruyama_step(x: Tensor, out: Tensor, row: Tensor, z: Tensor | None) -> None:
    """One step for torch.compile; its noise is drawn inside unless given."""
    noise = torch.randn_like(x) if z is None else z
    x.copy_(row[0] * x + row[1] * out + row[2] * noise)


def corrector_step(x: Tensor, row: Tensor, z: tuple[Tensor, Tensor] | None) -> None:
    """One predictor–corrector iteration with the score −x, for torch.compile."""
    z1, z2 = (torch.randn_like(x), torch.randn_like(x)) if z is None else z
    score = -x
    ratio = mean_norm(z1) / mean_norm(score)
    epsilon = ratio * ratio * row[0]
    y = x + epsilon * score + torch.sqrt(2 * epsilon) * z1
    x.copy_(row[1] * y - row[2] * y + row[3] * z2)


class Compiled:
    """A whole step, noise included, as one graph of torch.compile (inductor, default mode)."""

    def __init__(self, network: nn.Module, corrector: bool, draw: Draw | None = None) -> None:
        self.network, self.corrector, self.draw = network, corrector, draw
        step = corrector_step if corrector else euler_maruyama_step
        self.step: Callable[..., None] = torch.compile(step, fullgraph=True, dynamic=False)
        make = corrector_coefficients if corrector else euler_maruyama_coefficients
        # Rows of 16 bytes: inductor copies inputs on a GPU that are aligned to less.
        self.coefficients = make(torch.float32)
        missing = 4 - self.coefficients.shape[1]
        self.coefficients = nn.functional.pad(self.coefficients, (0, missing))
        self.i = STEPS

    def reset(self, x: Tensor) -> None:
        self.x, self.i = x.clone(), 0
        self.rows = self.coefficients.to(x.device).unbind(0)
        self.labels = 999 * torch.linspace(1, T_MIN, STEPS, device=x.device)

    @property
    def left(self) -> int:
        return STEPS - self.i

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        for i in range(self.i, self.i + steps):
            if self.corrector:
                z = None if self.draw is None else (self.draw(self.x), self.draw(self.x))
                self.step(self.x, self.rows[i], z)
            else:
                out = self.network(self.x, self.labels[i])
                self.step(self.x, out, self.rows[i], self.draw and self.draw(self.x))
        self.i += steps


class FixedNoise(nn.Module):
    """A network that costs nothing: it predicts the same noise always. Not a model of anything."""

    predicts = "eps"

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.register_buffer("out", out)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.out  # type: ignore[return-value]


class NormalScore(nn.Module):
    """The score −x of standard normal data, exact under VP at every t: one op."""

    predicts = "score"

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return -x
