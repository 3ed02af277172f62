"""The samplers as their papers print them: plain loops over D, s and ε, with explicit noise.

Every loop takes a world (m, σ, f, g²), a denoiser D(x, t) and noise z(), and returns the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from plan_reference import Array, Mixture, World


class Denoiser:
    """D, s, ε of exact data at time t; clipped where ``clip`` is given. Counts its calls."""

    def __init__(self, world: World, data: Mixture, clip: float | None = None) -> None:
        self.world, self.data, self.clip, self.calls = world, data, clip, 0

    def raw(self, x: Array, m: float, sigma: float) -> Array:
        self.calls += 1
        return self.data.posterior_mean(x, m, sigma)

    def __call__(self, x: Array, m: float, sigma: float) -> Array:
        out = self.raw(x, m, sigma)
        return out if self.clip is None else np.clip(out, -self.clip, self.clip)

    def score(self, x: Array, t: float) -> Array:
        m, sigma = self.world.level(t)
        return (m * self(x, m, sigma) - x) / sigma**2


Z = Callable[[], Array]


def em(den: Denoiser, z: Z, times: Array, x: Array, denoise: object) -> Array:
    w = den.world
    for i in range(len(times) - 1):
        t, dt = times[i], times[i + 1] - times[i]
        mean = x + (w.f(t) * x - w.g2(t) * den.score(x, t)) * dt
        last = i == len(times) - 2
        x = mean if last and denoise == "mean" else mean + np.sqrt(w.g2(t)) * np.sqrt(-dt) * z()
    return den(x, *w.level(times[-1])) if denoise == "tweedie" else x


def chain(w: World, times: Array) -> list[tuple[float, float, float, float, float]]:
    """(t, k, β, σ', σ) down to the clean level."""
    levels = [w.level(t) for t in times] + [(1.0, 0.0)]
    out = []
    for i, t in enumerate(times):
        (m, sigma), (m_next, sigma_next) = levels[i], levels[i + 1]
        out.append((t, m / m_next, sigma**2 - (m / m_next * sigma_next) ** 2, sigma_next, sigma))
    return out


def pc(
    den: Denoiser,
    z: Z,
    times: Array,
    x: Array,
    *,
    predictor: str,
    corrector: str = "none",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norm: str = "sigma",
    variance: str = "posterior",
    denoise: object = "mean",
) -> Array:
    """Song et al. 2021, Algorithms 2–5; ``times`` has an end point more for predictor em."""
    w = den.world
    steps = chain(w, times)
    if predictor == "em":
        steps = steps[:-1]
    for i, (t, k, beta, sigma_next, sigma) in enumerate(steps):
        drop = i == len(steps) - 1 and denoise == "mean"
        for j in range(corrector_steps if corrector != "none" else 0):
            s = den.score(x, t)
            quiet = drop and predictor == "none" and j == corrector_steps - 1
            if norm == "sigma":
                eps = 2 * k**2 * (snr * sigma) ** 2
                x = x + eps * s
                x = x if quiet else x + np.sqrt(2 * eps) * z()
            else:
                noise = z()
                eps = 2 * k**2 * (snr * _ratio(norm, noise, s)) ** 2
                x = x + eps * s + np.sqrt(2 * eps) * noise
        if predictor == "em":
            dt = times[i + 1] - t
            x = x + (w.f(t) * x - w.g2(t) * den.score(x, t)) * dt
            x = x if drop else x + np.sqrt(-w.g2(t) * dt) * z()
        elif predictor == "reverse_diffusion":
            x = x - (k - 1) * x + beta * den.score(x, t)
            x = x if drop else x + np.sqrt(beta) * z()
        elif predictor == "ancestral":
            x = (x + beta * den.score(x, t)) / k
            std = np.sqrt(beta) if variance == "large" else np.sqrt(sigma_next**2 * beta / sigma**2)
            x = x if drop or std == 0 else x + std * z()
    if denoise == "tweedie":
        x = den(x, *w.level(times[-1]))
    return x


def _ratio(norm: str, noise: Array, s: Array) -> Array | float:
    z_norm = np.sqrt((noise**2).sum(axis=1, keepdims=True))
    s_norm = np.sqrt((s**2).sum(axis=1, keepdims=True))
    if norm == "batch_mean":
        return z_norm.mean() / s_norm.mean()
    return (z_norm if norm == "per_sample" else np.sqrt(noise.shape[1])) / s_norm


def ald(
    den: Denoiser, z: Z, times: Array, y: Array, inner: int, step: float, denoise: object
) -> Array:
    """NCSN Algorithm 1 on y = x/m."""
    w = den.world
    sigmas = [w.nsr(t) for t in times]
    for i, sigma in enumerate(sigmas):
        alpha = step * sigma**2 / sigmas[-1] ** 2
        for j in range(inner):
            m = w.m(times[i])
            s = (den(m * y, *w.level(times[i])) - y) / sigma**2
            y = y + alpha * s
            if not (denoise == "mean" and i == len(sigmas) - 1 and j == inner - 1):
                y = y + np.sqrt(2 * alpha) * z()
    if denoise == "tweedie":
        m = w.m(times[-1])
        s = (den(m * y, *w.level(times[-1])) - y) / sigmas[-1] ** 2
        y = y + sigmas[-1] ** 2 * s
    return y


def langevin(
    den: Denoiser, z: Z, t: float, x: Array, steps: int, delta: float, denoise: object
) -> Array:
    for i in range(steps):
        x = x + delta / 2 * den.score(x, t)
        if not (denoise == "mean" and i == steps - 1):
            x = x + np.sqrt(delta) * z()
    return den(x, *den.world.level(t)) if denoise == "tweedie" else x


def ode(den: Denoiser, times: Array, x: Array, solver: str, denoise: object = False) -> Array:
    w = den.world

    def slope(x: Array, t: float) -> Array:
        return w.f(t) * x - 0.5 * w.g2(t) * den.score(x, t)

    for t, t_next in pairwise(times):
        h = t_next - t
        k1 = slope(x, t)
        if solver == "euler":
            x = x + h * k1
        elif solver == "heun":
            x = x + h / 2 * (k1 + slope(x + h * k1, t_next))
        else:
            k2 = slope(x + h / 2 * k1, t + h / 2)
            k3 = slope(x + h / 2 * k2, t + h / 2)
            k4 = slope(x + h * k3, t_next)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return den(x, *w.level(times[-1])) if denoise == "tweedie" else x


def ddim(
    den: Denoiser, z: Z, times: Array, x: Array, eta: float, *, rederive: bool = True
) -> Array:
    w = den.world
    for i, t in enumerate(times):
        m, sigma = w.level(t)
        raw = den.raw(x, m, sigma)
        d = raw if den.clip is None else np.clip(raw, -den.clip, den.clip)
        eps = (x - m * (d if rederive else raw)) / sigma
        if i == len(times) - 1:
            return d
        m_next, sigma_next = w.level(times[i + 1])
        k = m / m_next
        std = eta * sigma_next / sigma * np.sqrt(sigma**2 - k**2 * sigma_next**2)
        x = m_next * d + np.sqrt(np.maximum(0, sigma_next**2 - std**2)) * eps
        x = x + std * z() if std > 0 else x
    return x


def edm(
    den: Denoiser,
    z: Z,
    sigmas: Array,
    x: Array,
    *,
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = np.inf,
    s_noise: float = 1.0,
    heun: bool = True,
    highest: float = np.inf,
) -> Array:
    """Karras et al. 2022, Algorithm 2, on y = x/m with the σ of a network in world's terms."""
    w, n = den.world, len(sigmas)

    def denoise(y: Array, sigma: float) -> Array:
        t = float(w.sde.time_at_nsr(sigma))
        return den(w.m(t) * y, *w.level(t))

    for i, sigma in enumerate(sigmas):
        gamma = min(churn / n, np.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        hat = max(sigma, min(sigma + gamma * sigma, highest))
        if hat > sigma:
            x = x + s_noise * np.sqrt(hat**2 - sigma**2) * z()
        target = sigmas[i + 1] if i + 1 < n else 0.0
        d = (x - denoise(x, hat)) / hat
        euler = x + (target - hat) * d
        if target == 0 or not heun:
            x = euler
        else:
            d2 = (euler - denoise(euler, target)) / target
            x = x + (target - hat) * (d + d2) / 2
    return x


def dpmpp_2m(
    den: Denoiser, z: Z, times: Array, x: Array, *, eta: float = 0.0, solver: str = "midpoint"
) -> Array:
    """Lu et al. 2022b on x with α = m: Algorithm 2 (η = 0), SDE-DPM-Solver++(2M) (η = 1)."""
    levels = [den.world.level(t) for t in times]
    lam = [np.log(alpha / sigma) for alpha, sigma in levels]
    before = None
    for i in range(len(times) - 1):
        (_, sigma), (alpha_next, sigma_next) = levels[i], levels[i + 1]
        h = lam[i + 1] - lam[i]
        k = (1 + eta) * h
        d = den(x, *levels[i])
        x = sigma_next / sigma * np.exp(-eta * h) * x + alpha_next * (1 - np.exp(-k)) * d
        if before is not None:
            d1 = (d - before) / ((lam[i] - lam[i - 1]) / h)
            phi = (1 - np.exp(-k)) / 2 if solver == "midpoint" else 1 - (1 - np.exp(-k)) / k
            x = x + alpha_next * phi * d1
        if eta > 0:
            x = x + sigma_next * np.sqrt(1 - np.exp(-2 * eta * h)) * z()
        before = d
    return den(x, *levels[-1])


def ddim_inversion(den: Denoiser, times: Array, x: Array, *, rederive: bool = True) -> Array:
    """Song, Meng & Ermon 2021, sec. 4.3, with ε at the lower level of each step."""
    levels = [den.world.level(t) for t in times]
    for (m, sigma), (m_next, sigma_next) in pairwise(levels):
        raw = den.raw(x, m, sigma)
        d = raw if den.clip is None else np.clip(raw, -den.clip, den.clip)
        x = m_next * d + sigma_next * (x - m * (d if rederive else raw)) / sigma
    return x
