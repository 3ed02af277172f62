"""Networks and methods that the sampler tests run."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import EDMSDE, VESDE, VPSDE, DDPMSchedule, NCSNLadder, Sampler, SubVPSDE
from sbm_fast.methods import DynamicThreshold
from sbm_fast.sde import SDE

VP, VE = VPSDE(), VESDE(0.01, 5.0)
NCSN, DDPM = NCSNLadder.geometric(5.0, 0.05, 6), DDPMSchedule.linear(40)

METHODS: dict[str, tuple[str, SDE, dict[str, Any]]] = {
    "em": ("em", VP, {"steps": 6}),
    "em sub-VP": ("em", SubVPSDE(), {"steps": 6}),
    "reverse diffusion": ("reverse_diffusion", VE, {"steps": 6}),
    "ancestral": ("ancestral", DDPM, {"steps": 6}),
    "pc sigma": ("pc", VE, {"steps": 5, "corrector_steps": 2}),
    "pc per sample": ("pc", VP, {"steps": 5, "norm": "per_sample"}),
    "pc sqrt d": ("pc", VE, {"steps": 5, "norm": "sqrt_d"}),
    "pc batch mean": ("pc", VE, {"steps": 5, "norm": "batch_mean"}),
    "ald": ("ald", NCSN, {"inner_steps": 2}),
    "langevin": ("langevin", VP, {"steps": 6, "t": 0.5}),
    "ode heun": ("ode", VP, {"steps": 4, "solver": "heun"}),
    "ode rk4": ("ode", VP, {"steps": 3, "solver": "rk4"}),
    "ddim": ("ddim", VP, {"steps": 6, "eta": 0.7}),
    "ddim clipped": ("ddim", VP, {"steps": 6, "clip_denoised": 0.5}),
    "ddpm": ("ddpm", DDPM, {"steps": 6, "variance": "beta_tilde"}),
    "ddpm thresholded": ("ddpm", DDPM, {"steps": 6, "clip_denoised": DynamicThreshold(0.8, 0.3)}),
    "edm": ("edm", EDMSDE(), {"steps": 5, "S_churn": 20.0}),
    "2m": ("dpmpp_2m", VP, {"steps": 6}),
    "2m sde clipped": ("dpmpp_2m_sde", VE, {"steps": 6, "clip_denoised": 0.5}),
}
ALONE = [name for name in METHODS if name != "pc batch mean"]  # no coupling within a batch


def network(x: Tensor, t: Tensor) -> Tensor:
    """Something smooth, elementwise and made of exactly rounded operations."""
    time = t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return -(x + 0.25) / (1.0 + time + 0.1 * x * x)


class Net(nn.Module):
    """A network with parameters, modes and a class label."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8, dtype=dtype))
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | float = 0.0) -> Tensor:
        assert not any(m.training for m in self.modules())
        self.seen.append((x.dtype, t.dtype))
        shift = torch.as_tensor(label, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return network(x * self.scale, t.to(x.dtype)) + shift


def sampler(name: str, shape: tuple[int, ...], net: Any = network, **more: Any) -> Sampler:
    method, sde, options = METHODS[name]
    return Sampler(net, sde, shape, method=method, **{**options, **more})


def score_of_mixture(
    means: np.ndarray, std: float, sde: SDE, weights: np.ndarray | None = None
) -> sbm_fast.ScoreModel:
    """The exact score of Σ_k w_k N(μ_k, std²) under `sde`, for flat or image samples."""
    centre = torch.tensor(means, dtype=torch.float32)  # [K, d]
    w = np.full(len(means), 1 / len(means)) if weights is None else weights
    log_w = torch.tensor(np.log(w), dtype=torch.float32)

    def score(x: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        m, sigma = float(sde.mean_scale(time)), float(sde.std(time))
        variance = (m * std) ** 2 + sigma**2
        flat = x.flatten(1)
        mu = m * centre
        # |x − μ|² up to a term that all components share
        logits = (flat @ mu.T - 0.5 * (mu**2).sum(1)) / variance + log_w
        mean = torch.softmax(logits, dim=1) @ mu
        return ((mean - flat) / variance).reshape(x.shape)

    return sbm_fast.ScoreModel(score, predicts="score", time="t")
