"""`pc`, `ald` and `em` reach a Gaussian mixture, in 2-D and as 8×8 images, with the exact score.

n = 20,000 samples against as many exact ones. Bounds are effect sizes, not p-values:

* energy distance, averaged over 1-D projections (all n samples, by sorting): at most BOUND times
  what two exact samples of this size have between them (the mean over eight pairs);
* weights of the components: within 0.012 (their sampling error is 0.0035);
* mean and standard deviation per coordinate: within 5 sampling errors and 2 % of the std.
"""

import math
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from numpy.typing import NDArray

from sbm_fast import VESDE, VPSDE, DDPMSchedule, NCSNLadder, Sampler
from sbm_fast.sde import SDE

Array = NDArray[np.float64]
N, BOUND = 20_000, 4.0
WEIGHTS = np.array([0.5, 0.3, 0.2])


def mixture(kind: str) -> tuple[Array, float, tuple[int, ...]]:
    """Means [3, d], std and the shape of a sample."""
    if kind == "plane":
        return np.array([[1.0, 0.6], [-1.0, 0.4], [0.1, -1.2]]), 0.25, (2,)
    y, x = np.mgrid[0:8, 0:8] / 3.5 - 1.0
    images = np.stack([np.cos(3 * x), np.cos(2 * y) * x, x * y - 0.3])
    return images.reshape(3, 64), 0.25, (1, 8, 8)


def exact_sample(kind: str, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    means, std, _ = mixture(kind)
    which = rng.choice(3, N, p=WEIGHTS)
    return means[which] + std * rng.standard_normal((N, means.shape[1]))


def directions(kind: str) -> Array:
    """Unit vectors [d, 16]: random ones, and those that tell the components apart."""
    means, _, _ = mixture(kind)
    rng = np.random.default_rng(99)
    apart = np.stack([means[0] - means[1], means[1] - means[2], means[2] - means[0]])
    v = np.concatenate([apart, rng.standard_normal((13, means.shape[1]))])
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).T


def energy_distance(a: Array, b: Array) -> float:
    """2 E|X−Y| − E|X−X'| − E|Y−Y'| = 2 ∫ (F_a − F_b)², averaged over the columns."""
    total = 0.0
    for x, y in zip(a.T, b.T, strict=True):
        both = np.concatenate([x, y])
        order = np.argsort(both)
        jump = np.where(order < len(x), 1 / len(x), -1 / len(y))
        gap = np.cumsum(jump)[:-1]
        total += 2.0 * float((gap**2 * np.diff(both[order])).sum())
    return total / a.shape[1]


@pytest.fixture(scope="module")
def null() -> dict[str, float]:
    """Mean energy distance of two exact samples."""
    found = {}
    for kind in ("plane", "images"):
        v = directions(kind)
        pairs = [(exact_sample(kind, 2 * i), exact_sample(kind, 2 * i + 1)) for i in range(8)]
        found[kind] = float(np.mean([energy_distance(a @ v, b @ v) for a, b in pairs]))
    return found


def law_violation(kind: str, x: Array, null: dict[str, float]) -> str:
    """ "" or which bound the samples break."""
    means, std, _ = mixture(kind)
    v, reference = directions(kind), exact_sample(kind, 1000)
    ratio = energy_distance(x @ v, reference @ v) / null[kind]
    if not ratio <= BOUND:
        return f"energy distance: {ratio:.2f} times that of exact samples"
    nearest = ((x[:, None] - means[None]) ** 2).sum(2).argmin(1)
    exact_nearest = ((reference[:, None] - means[None]) ** 2).sum(2).argmin(1)
    share, expected = (np.bincount(w, minlength=3) / N for w in (nearest, exact_nearest))
    if not np.abs(share - expected).max() <= 0.012:
        return f"weights: {share} against {expected}"
    mean = WEIGHTS @ means
    total_std = np.sqrt(std**2 + WEIGHTS @ (means - mean) ** 2)
    off = np.abs(x.mean(0) - mean) / total_std
    if not off.max() <= 5 / math.sqrt(N) + 0.02:
        return f"mean: off by {off.max():.4f} standard deviations"
    off = np.abs(x.std(0) / total_std - 1)
    if not off.max() <= 5 / math.sqrt(2 * N) + 0.02:
        return f"std: off by {off.max():.4f}"
    return ""


def ladder(sigma_max: float, sigma_min: float, levels: int) -> tuple[SDE, dict[str, Any]]:
    """Levels so close that annealed Langevin follows, with ε = 0.15 σ_i²."""
    sde = NCSNLadder.geometric(sigma_max, sigma_min, levels)
    return sde, {"step_size": 0.15 * sigma_min**2}


PLANE_LADDER, PLANE_STEP = ladder(4.0, 0.02, 200)
IMAGE_LADDER, IMAGE_STEP = ladder(6.0, 0.04, 150)
RUNS: dict[str, tuple[str, str, SDE, dict[str, Any]]] = {
    "em VP plane": ("em", "plane", VPSDE(), {"steps": 150}),
    "em VE plane": ("em", "plane", VESDE(0.01, 10.0), {"steps": 120, "schedule": "log_snr"}),
    "pc VP plane": ("pc", "plane", VPSDE(), {"steps": 120}),
    "pc VE plane": ("pc", "plane", VESDE(0.01, 10.0), {"steps": 120}),
    "ald plane": ("ald", "plane", PLANE_LADDER, {"inner_steps": 4, **PLANE_STEP}),
    "ddpm plane": (
        "ddpm",
        "plane",
        DDPMSchedule.linear(),
        {"steps": 100, "schedule": "quadratic", "variance": "beta_tilde"},
    ),
    "em VP images": ("em", "images", VPSDE(), {"steps": 60, "schedule": "quadratic"}),
    "pc VP images": ("pc", "images", VPSDE(), {"steps": 130}),
    "pc VE images": ("pc", "images", VESDE(0.01, 20.0), {"steps": 80}),
    "ald images": ("ald", "images", IMAGE_LADDER, {"inner_steps": 3, **IMAGE_STEP}),
}


def samples(name: str) -> Array:
    method, kind, sde, options = RUNS[name]
    means, std, shape = mixture(kind)
    model = cases.score_of_mixture(means, std, sde, WEIGHTS)
    x = Sampler(model, sde, (N, *shape), method=method, **options)(seed=12)
    assert isinstance(x, torch.Tensor)
    return x.flatten(1).double().numpy()


@pytest.mark.parametrize("name", list(RUNS))
def test_the_mixture_is_reached(name: str, null: dict[str, float]) -> None:
    assert law_violation(RUNS[name][1], samples(name), null) == ""


def test_exact_samples_pass_and_distorted_ones_do_not(null: dict[str, float]) -> None:
    for kind in ("plane", "images"):
        exact = exact_sample(kind, 5)
        assert law_violation(kind, exact, null) == ""
        assert law_violation(kind, exact * 1.05, null) != ""
        assert law_violation(kind, exact + 0.05, null) != ""
        lost = exact.copy()
        lost[: N // 40] = lost[N // 2 : N // 2 + N // 40].mean(0)
        assert law_violation(kind, lost, null) != ""
