"""Levels, bins and uniform dequantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.dequantisation import (
    bin_width,
    check_levels,
    dequantise,
    discretised_gaussian,
    level_index,
    level_values,
)


def grid(low: float, high: float, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(low, high, levels, dtype=torch.float64).to(dtype)


def test_widths() -> None:
    assert bin_width((-1, 1), 256) == pytest.approx(2 / 255, rel=1e-15)
    assert bin_width((0, 1), 256) == pytest.approx(1 / 255, rel=1e-15)
    assert bin_width((-1, 1), 17) == 0.125
    assert bin_width([0, 255], 256) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (0, 255), (-0.3, 7)])
def test_levels_are_recognised_in_their_dtype(low: float, high: float, dtype: torch.dtype) -> None:
    x = grid(low, high, 256, dtype).reshape(4, 8, 8)
    check_levels(x, (low, high), 256)
    index = level_index(x, (low, high), 256)
    assert torch.equal(index, torch.arange(256).reshape(4, 8, 8))
    values = level_values(index, (low, high), 256)
    torch.testing.assert_close(
        values.to(dtype), x, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6
    )


def test_the_usual_ways_of_scaling_eight_bits() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    for x, data_range in (
        (byte.float() / 127.5 - 1, (-1, 1)),
        (byte.float() / 255 * 2 - 1, (-1, 1)),
        ((byte.float() / 255 - 0.5) / 0.5, (-1, 1)),
        (byte.float() / 255, (0, 1)),
    ):
        check_levels(x, data_range, 256)
        assert torch.equal(level_index(x, data_range, 256), byte.long())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"values in data_range = \(-1, 1\), got 1\.5 at index \(1, 2\)"),
        (-1.01, r"values in data_range = \(-1, 1\), got -1\.01 at index \(1, 2\)"),
        (float("nan"), r"values in data_range = \(-1, 1\), got nan at index \(1, 2\)"),
        (float("inf"), r"values in data_range = \(-1, 1\), got inf at index \(1, 2\)"),
        (0.1, r"one of the levels=17 values from -1 to 1 \(0\.125 apart\), got 0\.1 .*\(1, 2\)"),
        (0.125 + 2e-3 * 0.125, r"one of the levels=17 values"),
    ],
)
def test_what_is_no_level_is_named(value: float, message: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    x[1, 2] = value
    with pytest.raises(ValueError, match=f"^x: expected {message}"):
        check_levels(x, (-1, 1), 17)


def test_a_bad_value_beyond_the_first_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbm_fast.dequantisation._CHUNK", 5)
    x = torch.zeros(4, 4)
    check_levels(x, (-1, 1), 3)
    x[2, 3] = 0.5
    with pytest.raises(ValueError, match=r"got 0\.5 at index \(2, 3\)"):
        check_levels(x, (-1, 1), 3)


@pytest.mark.parametrize(
    ("x", "data_range", "levels", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), (-1, 1), 2, TypeError, "x: expected a floating tensor"),
        (np.zeros(2), (-1, 1), 3, TypeError, "x: expected a floating tensor, got ndarray"),
        (torch.zeros(2), (-1, 1), 1, ValueError, "levels: expected an integer ≥ 2, got 1"),
        (torch.zeros(2), (-1, 1), 2.0, TypeError, "levels: "),
        (torch.zeros(2), (1, -1), 3, ValueError, "data_range: expected lowest < highest"),
        (torch.zeros(2), (-1, 0, 1), 3, ValueError, "data_range: expected"),
        (torch.zeros(2), 1, 3, TypeError, "data_range: expected"),
        (torch.zeros(2), "01", 3, TypeError, "data_range: expected"),
        (torch.zeros(2), (0, float("inf")), 3, ValueError, "data_range: expected a finite"),
        (torch.zeros(2, dtype=torch.bfloat16), (-1, 1), 256, ValueError, "x: .*wider dtype"),
    ],
)
def test_bad_arguments_are_named(
    x: Any, data_range: Any, levels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        check_levels(x, data_range, levels)


def test_no_data_are_no_error() -> None:
    check_levels(torch.zeros(0, 3), (-1, 1), 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantisation_is_the_uniform_of_its_stream(dtype: torch.dtype) -> None:
    x = grid(-1, 1, 17, dtype)[torch.arange(60).reshape(3, 4, 5) % 17]
    keys = noise.keys(3, 3, first_sample=7)
    u = noise.uniform(None, x.shape, draw=2, stream=3, keys=keys).double().numpy()
    got = dequantise(x, keys, 2, (-1, 1), 17)
    assert got.dtype == dtype
    expected = x.double().numpy() + (u - 0.5) * 0.125
    np.testing.assert_array_equal(got.numpy(), expected.astype(got.numpy().dtype))
    assert (got - x).abs().max() <= 0.0625
    assert not torch.equal(got, dequantise(x, keys, 3, (-1, 1), 17))
    # a sample's draw belongs to its key
    assert torch.equal(dequantise(x[1:], keys[1:], 2, (-1, 1), 17), got[1:])


def test_dequantisation_fills_the_bin_evenly() -> None:
    x = torch.zeros(1000, 100, dtype=torch.float64)
    u = dequantise(x, noise.keys(0, 1000), 0, (-1, 1), 3).flatten().sort().values
    steps = torch.linspace(-0.5, 0.5, len(u), dtype=torch.float64)
    assert (u - steps).abs().max() < 1.63 / len(u) ** 0.5  # Kolmogorov, 1 %


def mass(index: Tensor, mean: float, std: float, levels: int = 17) -> np.ndarray:
    at = (torch.tensor(value, dtype=torch.float64) for value in (mean, std))
    return discretised_gaussian(index, *at, (-1, 1), levels).numpy()


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("std", [1e-4, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-40.0, -1.03, -0.5, 0.0031, 0.99, 3.0])
def test_masses_of_all_levels_sum_to_one(mean: float, std: float, levels: int) -> None:
    log_mass = mass(torch.arange(levels), mean, std, levels)
    assert np.isfinite(log_mass).all()
    assert abs(np.exp(log_mass).sum() - 1) < 1e-12


def quadrature(lower: float, width: float) -> float:
    """log ∫ φ over [lower, lower + width], lower > 0, scaled by φ(lower): nothing cancels."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    end = min(width, 60 / lower)  # beyond it the integrand is below e^−60 of its start
    t = 0.5 * end * (nodes + 1)
    integral = 0.5 * end * (weights * np.exp(-lower * t - 0.5 * t * t)).sum()
    return -0.5 * lower**2 - 0.5 * np.log(2 * np.pi) + np.log(integral)


@pytest.mark.parametrize("away", [0.3, 2.0, 9.0, 40.0, 3000.0])
@pytest.mark.parametrize("width", [1e-3, 0.1, 1.0, 20.0])
def test_masses_in_the_tails(away: float, width: float) -> None:
    """Against a quadrature, on both sides; a difference of Φ is 0 or 1 − 1 out there."""
    std = 0.125 / width
    expected = quadrature(away, width)
    for side in (1, -1):
        mean = -side * (away + 0.5 * width) * std  # the bin of level 8 is about 0
        got = mass(torch.tensor(8), mean, std)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_outermost_bins_reach_to_infinity() -> None:
    from scipy.special import log_ndtr

    for mean, std in ((0.4, 0.3), (-7.0, 0.2), (9.0, 0.1)):
        ends = mass(torch.tensor([0, 16]), mean, std)
        expected = log_ndtr([(-1 + 0.0625 - mean) / std, (mean - 1 + 0.0625) / std])
        np.testing.assert_allclose(ends, expected, rtol=1e-13, atol=1e-300)
