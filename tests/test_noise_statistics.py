"""The noise as a random number generator, on fixed seeds.

Level: a test fails when its p-value is below LEVEL = 1e-5, Bonferroni-corrected where one test
looks at many numbers. About 80 p-values are taken, so a perfect generator with fresh seeds would
fail this file less than once in a thousand runs; with these fixed seeds it is deterministic.
"""

import math

import dieharder_stream
import numpy as np
import pytest
import torch
from battery import failures
from numpy.typing import NDArray
from scipy import stats

from sbm_fast import noise

LEVEL = 1e-5
Array = NDArray[np.float64]


def normals(samples: int, numel: int, seed: int = 20, draw: int = 0, stream: int = 1) -> Array:
    return noise.normal(seed, (samples, numel), draw=draw, stream=stream).double().numpy()


def threshold(comparisons: int) -> float:
    """|z| that one of `comparisons` standard normals passes with probability LEVEL."""
    return float(stats.norm.isf(LEVEL / comparisons / 2))


@pytest.mark.parametrize(("samples", "numel"), [(1, 2**19), (2**17, 3), (512, 1000)])
def test_kolmogorov_smirnov(samples: int, numel: int) -> None:
    z = normals(samples, numel).ravel()
    assert stats.kstest(z, "norm").pvalue > LEVEL
    u = noise.uniform(21, (samples, numel)).double().numpy().ravel()
    assert stats.kstest(u, "uniform").pvalue > LEVEL


def test_moments_to_the_eighth() -> None:
    """mean z^k − E z^k against its own standard error √((E z^2k − (E z^k)²)/n)."""
    z = normals(2048, 1024).ravel()
    moment = [math.prod(range(k - 1, 0, -2)) if k % 2 == 0 else 0 for k in range(17)]
    for k in range(1, 9):
        error = math.sqrt((moment[2 * k] - moment[k] ** 2) / len(z))
        assert abs((z**k).mean() - moment[k]) < threshold(8) * error, k


def test_tails_have_their_mass() -> None:
    z = np.abs(normals(4096, 1024).ravel())
    for bound in (3.0, 4.0, 4.5, 5.0):
        expected = len(z) * 2 * stats.norm.sf(bound)
        count = np.count_nonzero(z > bound)
        tail = min(stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected))
        assert tail > LEVEL, (bound, count, expected)


def largest_correlation(rows: Array) -> float:
    """Largest |correlation|·√n over all pairs of rows of independent unit-variance numbers."""
    n = rows.shape[1]
    unit = (rows - rows.mean()) / rows.std()
    product = unit @ unit.T / math.sqrt(n)
    return float(np.abs(product[np.triu_indices(len(rows), 1)]).max())


def families() -> dict[str, Array]:
    numel = 2**14
    return {
        "samples": normals(48, numel),
        "draws": np.concatenate([normals(1, numel, draw=d) for d in range(48)]),
        "streams": np.concatenate([normals(1, numel, stream=s) for s in range(48)]),
        "seeds": np.concatenate([normals(1, numel, seed=s) for s in range(-8, 40)]),
        "far samples": np.concatenate(
            [noise.normal(20, (1, numel), first_sample=2**k).numpy() for k in range(48)]
        ).astype(np.float64),
        "single-bit keys": noise.normal(
            None, (48, numel), keys=torch.tensor([1 << k for k in range(48)])
        )
        .double()
        .numpy(),
        "neighbouring elements": normals(1, 48 + 2**18)[0][
            np.arange(48)[:, None] + np.arange(0, 2**18, 16)[None]
        ][:16],
    }


def test_no_correlations() -> None:
    """Between samples, draws, streams, seeds, keys and neighbours; of z, z² and shifted z."""
    for name, rows in families().items():
        bound = threshold(3 * len(rows) * (len(rows) - 1) // 2)
        assert largest_correlation(rows) < bound, name
        assert largest_correlation(rows**2) < bound, name
        if name != "neighbouring elements":
            shifted = np.stack([np.roll(row, k) for k, row in enumerate(rows)])
            assert largest_correlation(shifted) < bound, name


def test_neighbours_in_one_sample_are_uncorrelated_at_every_lag() -> None:
    z = normals(1, 2**19)[0]
    for lag in range(1, 33):
        for v in (z, (z**2 - 1) / math.sqrt(2), np.sign(z)):
            found = (v[lag:] * v[:-lag]).sum() / math.sqrt(len(v) - lag)
            assert abs(found) < threshold(96), lag


def test_box_muller_pairs_are_isotropic() -> None:
    """The angle of (z0, z1) is uniform and its radius independent of it."""
    pairs = normals(64, 2**13).reshape(-1, 2)
    angle = np.arctan2(pairs[:, 1], pairs[:, 0]) / (2 * np.pi) % 1.0
    radius = np.exp(-0.5 * (pairs**2).sum(axis=1))
    assert stats.kstest(angle, "uniform").pvalue > LEVEL
    assert stats.kstest(radius, "uniform").pvalue > LEVEL
    cells = np.histogram2d(angle, radius, bins=64, range=[[0, 1], [0, 1]])[0].ravel()
    assert stats.chisquare(cells).pvalue > LEVEL


@pytest.mark.parametrize("order", dieharder_stream.ORDERS)
def test_the_stream_as_samplers_use_it(order: str) -> None:
    """Words across samples, draws and elements: see tests/statistics for orders and battery."""
    blocks = dieharder_stream.blocks(0, order)
    words = np.concatenate([next(blocks).numpy().view(np.uint32) for _ in range(2)])
    assert failures(words, LEVEL) == {}


def test_every_order_is_a_permutation_of_the_block() -> None:
    block = torch.arange(64 * 64 * 192, dtype=torch.int32).reshape(64, 64, 192)
    for order in dieharder_stream.ORDERS:
        assert torch.equal(dieharder_stream.ordered(block, order).sort().values, block.flatten())


@pytest.mark.parametrize("make", [noise.rademacher, noise.uniform])
def test_signs_and_uniforms_are_balanced(make: object) -> None:
    assert callable(make)
    v = make(2, (512, 1024)).double()
    centre, std = (0.0, 1.0) if make is noise.rademacher else (0.5, math.sqrt(1 / 12))
    assert abs(float(v.mean()) - centre) < threshold(1) * std / math.sqrt(v.numel())
