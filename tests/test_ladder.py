"""NCSN and DDPM ladders against the papers' formulas, in exact or 40-digit arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal as Dec
from decimal import localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbm_fast.sde import (
    VPSDE,
    DDPMSchedule,
    Ladder,
    NCSNLadder,
    largest_pairwise_distance,
)

LADDERS: list[Ladder] = [
    NCSNLadder([0.5, 2.0, 0.1]),
    NCSNLadder.geometric(50.0, 0.01, 232),
    DDPMSchedule.linear(),
    DDPMSchedule.cosine(),
    DDPMSchedule([0.1, 0.05, 0.5]),
]
IDS = [f"{type(ladder).__name__}-{ladder.levels}" for ladder in LADDERS]
reproducible = settings(derandomize=True, deadline=None, database=None, max_examples=100)
ladders = pytest.mark.parametrize("ladder", LADDERS, ids=IDS)


def test_ncsn_levels() -> None:
    ladder = NCSNLadder([0.5, 2.0, 0.1])
    assert (ladder.levels, ladder.t_min, ladder.t_max, ladder.prior_std) == (3, 0.0, 2.0, 2.0)
    assert [ladder.std(i) for i in range(3)] == [0.1, 0.5, 2.0] == ladder.sigmas.tolist()
    assert (ladder.mean_scale(np.linspace(0, 2, 9)) == 1).all()


@pytest.mark.parametrize("levels", [2, 10, 232, 2311])
def test_geometric_ladder(levels: int) -> None:
    sigmas = NCSNLadder.geometric(190.0, 0.01, levels).sigmas
    assert len(sigmas) == levels and sigmas[0] == 0.01 and sigmas[-1] == 190.0
    ratio = (190.0 / 0.01) ** (1 / (levels - 1))
    np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], ratio, rtol=1e-13)


def test_ddpm_published_numbers() -> None:
    ladder = DDPMSchedule.linear()
    assert ladder.levels == 1000 and ladder.prior_std == 1
    assert ladder.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-4, abs=0)
    assert ladder.betas[0] == 1e-4 and ladder.betas[-1] == 0.02
    # score_sde's discrete VP is the same table; its first level is σ = .01, not 0.
    np.testing.assert_allclose(ladder.betas, np.linspace(0.1 / 1000, 20 / 1000, 1000), rtol=1e-14)
    assert ladder.std(0) == pytest.approx(0.01, rel=1e-13, abs=0)
    assert ladder.mean_scale(999) == pytest.approx(VPSDE().mean_scale(1.0), rel=0.04, abs=0)


@pytest.mark.parametrize(
    "ladder",
    [DDPMSchedule.linear(120), DDPMSchedule([1e-14, 0.3, 1e-9, 0.9])],
    ids=["linear", "extreme"],
)
def test_ddpm_levels_against_exact_products(ladder: DDPMSchedule) -> None:
    with localcontext() as context:
        context.prec = 40
        alpha = Fraction(1)
        for i, beta in enumerate(ladder.betas.tolist()):
            alpha *= 1 - Fraction(beta)
            a = Dec(alpha.numerator) / Dec(alpha.denominator)
            truth = {
                "mean_scale": a.sqrt(),
                "std": (1 - a).sqrt(),
                "nsr": ((1 - a) / a).sqrt(),
            }
            for name, value in truth.items():
                got = getattr(ladder, name)(i)
                assert abs(Dec(float(got)) / value - 1) < Dec("1e-14"), (name, i)
            assert ladder.alphas_cumprod[i] == pytest.approx(float(a), rel=1e-14, abs=0)


@pytest.mark.parametrize(("levels", "offset"), [(1, 0.008), (50, 0.0), (1000, 0.008)])
def test_cosine_schedule(levels: int, offset: float) -> None:
    """Nichol & Dhariwal 2021, eq. 17, as written; ours keeps the digits that 1 − f/f loses."""

    def f(i: int) -> float:
        return math.cos((i / levels + offset) / (1 + offset) * math.pi / 2) ** 2

    betas = DDPMSchedule.cosine(levels, offset).betas
    literal = [min(1 - f(i + 1) / f(i), 0.999) for i in range(levels)]
    np.testing.assert_allclose(betas, literal, rtol=1e-10)
    assert betas[-1] == 0.999 and (betas[:-1] < 0.999).all()
    assert DDPMSchedule.cosine(levels, offset, max_beta=0.5).betas.max() == 0.5


def test_cosine_first_beta_keeps_its_digits() -> None:
    n, s = 1000, Fraction(0.008)
    with localcontext() as context:
        context.prec = 40
        half_pi = Dec("1.5707963267948966192313216916397514420985846996876")

        def cos(x: Fraction) -> Dec:
            angle = half_pi * Dec(x.numerator) / Dec(x.denominator)
            term = total = Dec(1)
            for k in range(1, 40):
                term *= -angle * angle / (2 * k * (2 * k - 1))
                total += term
            return total

        first, zeroth = cos((Fraction(1, n) + s) / (1 + s)), cos(s / (1 + s))
        truth = 1 - (first / zeroth) ** 2
    assert DDPMSchedule.cosine().betas[0] == pytest.approx(float(truth), rel=1e-14, abs=0)


@ladders
def test_moments_are_consistent_at_and_between_levels(ladder: Ladder) -> None:
    t = np.linspace(0, ladder.t_max, 8 * ladder.levels + 1)
    m, sigma, nsr = ladder.mean_scale(t), ladder.std(t), ladder.nsr(t)
    np.testing.assert_allclose(sigma / m, nsr, rtol=1e-14)
    assert (np.diff(nsr) > 0).all()
    if isinstance(ladder, DDPMSchedule):
        np.testing.assert_allclose(m**2 + sigma**2, 1, rtol=1e-14)
        np.testing.assert_allclose(ladder.mean_scale(np.arange(3)) ** 2, ladder.alphas_cumprod[:3])
    else:
        assert (m == 1).all()


@ladders
def test_between_levels_log_nsr_is_linear(ladder: Ladder) -> None:
    for i in (0, ladder.levels - 2):
        a, b = math.log(ladder.nsr(i)), math.log(ladder.nsr(i + 1))
        for u in (0.125, 0.5, 0.9):
            assert math.log(ladder.nsr(i + u)) == pytest.approx(a + u * (b - a), abs=1e-13)


@ladders
def test_time_at_nsr(ladder: Ladder) -> None:
    levels = np.arange(ladder.levels)
    at_levels = ladder.time_at_nsr(ladder.nsr(levels))
    np.testing.assert_array_equal(at_levels, levels)  # to the bit: indices are table entries
    # A level's nsr that another formula rounded otherwise must not become index i − 1e-13, which a
    # table of embeddings would truncate to i − 1; levels nearby are left alone.
    for toward in (0, np.inf):
        rounded = np.clip(np.nextafter(ladder.nsr(levels), toward), *ladder.nsr_range)
        np.testing.assert_array_equal(ladder.time_at_nsr(rounded), levels)
    near = levels[:-1] + 1e-9
    np.testing.assert_allclose(ladder.time_at_nsr(ladder.nsr(near)) - near, 0, atol=2e-11)
    assert [ladder.time_at_nsr(float(r)) for r in ladder.nsr(levels[:5])] == levels[:5].tolist()
    t = np.linspace(0, ladder.t_max, 1237)
    np.testing.assert_allclose(ladder.time_at_nsr(ladder.nsr(t)), t, atol=1e-11, rtol=1e-12)
    for r in (ladder.nsr(0) * (1 - 2e-9), ladder.nsr(ladder.t_max) * (1 + 2e-9), 0.0):
        with pytest.raises(ValueError, match=f"^r: {type(ladder).__name__} has noise-to-signal"):
            ladder.time_at_nsr(r)


@ladders
def test_ladders_have_no_coefficients(ladder: Ladder) -> None:
    for name in ("drift_coef", "diffusion"):
        with pytest.raises(TypeError, match=f"^{name}: .* is a discrete ladder"):
            getattr(ladder, name)(0)


@ladders
def test_times_outside_the_ladder(ladder: Ladder) -> None:
    for bad in (-0.5, ladder.t_max + 0.01, math.nan):
        with pytest.raises(ValueError, match=r"^t: "):
            ladder.std(bad)
    assert ladder.std(ladder.t_max * (1 + 1e-10)) == pytest.approx(ladder.std(ladder.t_max))


@ladders
def test_shapes(ladder: Ladder) -> None:
    for name in ("mean_scale", "std", "nsr"):
        method = getattr(ladder, name)
        assert isinstance(method(1), float) and isinstance(method(0.5), float)
        for shape in ((2, 3), (0,), (4,)):
            out = method(np.full(shape, 1.5))
            assert out.shape == shape and out.dtype == np.float64
        assert method(np.array([0, 1])).dtype == np.float64


@ladders
def test_tables_cannot_be_changed(ladder: Ladder) -> None:
    std = ladder.std(0)
    for name in ("sigmas", "betas", "alphas_cumprod"):
        if hasattr(ladder, name):
            with pytest.raises(ValueError, match="read-only"):
                getattr(ladder, name)[0] = 7.0
    ladder.std(np.arange(ladder.levels))[0] = 7.0
    assert ladder.std(0) == std
    given = np.array([0.1, 0.2])
    kept = NCSNLadder(given)
    given[0] = 5
    assert kept.sigmas[0] == 0.1


def test_repr_and_equality() -> None:
    for ladder in (NCSNLadder([0.5, 2.0, 0.1]), DDPMSchedule([0.1, 0.05])):
        assert eval(repr(ladder)) == ladder and hash(eval(repr(ladder))) == hash(ladder)
    assert repr(NCSNLadder([2, 1])) == "NCSNLadder(sigmas=[1.0, 2.0])"
    assert "… 1000 levels …" in repr(DDPMSchedule.linear())
    assert DDPMSchedule.linear() == DDPMSchedule(np.linspace(1e-4, 0.02, 1000))
    assert DDPMSchedule([0.1]) != DDPMSchedule([0.2]) and NCSNLadder([0.1]) != DDPMSchedule([0.1])
    assert NCSNLadder([0.1]) != 0.1 and NCSNLadder([0.1, 1]) != NCSNLadder([0.1])


def test_single_level() -> None:
    ladder = NCSNLadder([0.3])
    assert ladder.t_min == ladder.t_max == 0 and ladder.std(0) == 0.3
    assert ladder.time_at_nsr(0.3) == 0


def test_torch_tables() -> None:
    assert NCSNLadder(torch.tensor([1.0, 0.25])) == NCSNLadder([0.25, 1.0])


GEOMETRIC: Any = NCSNLadder.geometric
LINEAR: Any = DDPMSchedule.linear
COSINE: Any = DDPMSchedule.cosine


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NCSNLadder([]), ValueError, "sigmas: expected one dimension"),
        (lambda: NCSNLadder([[1.0]]), ValueError, "sigmas: expected one dimension"),
        (lambda: NCSNLadder([1.0, 0.0]), ValueError, "sigmas: expected numbers in"),
        (lambda: NCSNLadder([1.0, math.nan]), ValueError, "sigmas: expected numbers in"),
        (lambda: NCSNLadder([1.0, math.inf]), ValueError, "sigmas: expected numbers in"),
        (lambda: NCSNLadder([1.0, 2.0, 1.0]), ValueError, "sigmas: .* all different"),
        (lambda: NCSNLadder(["a"]), TypeError, "sigmas: expected a real number"),
        (lambda: GEOMETRIC(1.0, 1.0, 3), ValueError, "sigma_max: "),
        (lambda: GEOMETRIC(1.0, 0.0, 3), ValueError, "sigma_min: "),
        (lambda: GEOMETRIC(1.0, 0.1, 1), ValueError, "levels: expected an integer ≥ 2, got 1"),
        (lambda: GEOMETRIC(1.0, 0.1, 2.5), TypeError, "levels: expected an integer"),
        (lambda: DDPMSchedule([]), ValueError, "betas: "),
        (lambda: DDPMSchedule([0.1, -0.1]), ValueError, r"betas: expected numbers in \(0, 1\)"),
        (lambda: DDPMSchedule([0.1, 1.5]), ValueError, r"betas: expected numbers in \(0, 1\)"),
        (lambda: DDPMSchedule([0.1, 1.0]), ValueError, "betas: β = 1 gives a level without signal"),
        (lambda: DDPMSchedule([0.9] * 400), ValueError, "betas: ᾱ falls to"),
        (lambda: DDPMSchedule([0.5, 1e-17]), ValueError, "betas: too small"),
        (lambda: LINEAR(0), ValueError, "levels: "),
        (lambda: LINEAR(10, 0.0), ValueError, "beta_min: "),
        (lambda: LINEAR(10, 0.1, 1.0), ValueError, "betas: β = 1"),
        (lambda: COSINE(True), TypeError, "levels: "),
        (lambda: COSINE(10, -0.1), ValueError, "offset: "),
        (lambda: COSINE(10, max_beta=1.0), ValueError, "max_beta: "),
    ],
)
def test_bad_parameters(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()


def brute_force(data: np.ndarray) -> float:
    rows = data.reshape(len(data), -1).astype(np.float64)
    return max(float(np.linalg.norm(a - b)) for a in rows for b in rows)


@reproducible
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 5),
    chunk=st.integers(1, 13),
    shift=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_largest_pairwise_distance(n: int, d: int, chunk: int, shift: float, seed: int) -> None:
    data = np.random.default_rng(seed).normal(size=(n, d)) + shift
    got = largest_pairwise_distance(data, chunk=chunk)
    assert got == pytest.approx(brute_force(data), rel=1e-12, abs=0)


def test_largest_pairwise_distance_of_tensors() -> None:
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = brute_force(images.numpy())
    assert largest_pairwise_distance(images, chunk=7) == pytest.approx(truth, rel=1e-13, abs=0)
    images.requires_grad_()
    assert largest_pairwise_distance(images) == pytest.approx(truth, rel=1e-13, abs=0)
    low = images.detach().bfloat16()
    assert largest_pairwise_distance(low) == pytest.approx(brute_force(low.float().numpy()))
    assert largest_pairwise_distance(np.zeros((3, 2))) == 0
    assert largest_pairwise_distance([0, 3, 5, 1]) == 5
    assert largest_pairwise_distance(np.array([[0, 0], [255, 0]], dtype=np.uint8)) == 255


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (np.zeros((1, 3)), {}, ValueError, "data: expected at least two samples"),
        (np.float64(1.0), {}, ValueError, "data: expected at least two samples"),
        (np.array([[0.0], [np.nan]]), {}, ValueError, "data: expected finite numbers"),
        (np.array(["a", "b"]), {}, TypeError, "data: expected real numbers"),
        (np.zeros((2, 3)), {"chunk": 0}, ValueError, "chunk: "),
    ],
)
def test_bad_data(data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        largest_pairwise_distance(data, **options)
