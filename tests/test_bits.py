"""`bits_per_dim`: closed forms, what the declared data mean, and errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sbm_fast
from sbm_fast import VPSDE, bits, bits_per_dim, noise
from sbm_fast.dequantisation import bin_width, dequantise

VP = VPSDE()
LEVELS = 17


def score_of_normal(std: float) -> Any:
    """∇ log p_t of N(0, std²) data."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        time = t.double().numpy()
        variance = torch.as_tensor((VP.mean_scale(time) * std) ** 2 + VP.std(time) ** 2)
        return (-x / variance[:, None]).to(x.dtype)

    return score


def grid(n: int = 6, d: int = 3) -> Tensor:
    k = torch.randint(0, LEVELS, (n, d), generator=torch.Generator().manual_seed(0))
    return k.float() / 8 - 1


def test_normal_density_of_every_draw() -> None:
    """log_prob of draw r is the density at x + (u_r − ½)Δ; their mean is the bound."""
    x, std = grid(), 0.7
    r = bits_per_dim(score_of_normal(std), VP, x, levels=LEVELS, draws=3, seed=5, rtol=1e-6,
                     atol=1e-6)  # fmt: skip
    width = bin_width((-1, 1), LEVELS)
    keys = noise.keys(5, len(x))
    for draw in range(3):
        y = dequantise(x, keys, draw, (-1, 1), LEVELS).double()
        exact = -0.5 * (y / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
        # the density is that at t_min, and the prior the standard one
        torch.testing.assert_close(r.log_prob[draw], exact.sum(1), rtol=0, atol=2e-3)
    expected = -(r.log_prob.mean(0) / 3 + math.log(width)) / math.log(2)
    torch.testing.assert_close(r.bits_per_dim, expected, rtol=0, atol=1e-12)
    error = r.log_prob.std(0) / math.sqrt(3) / (3 * math.log(2))
    torch.testing.assert_close(r.stderr, error, rtol=0, atol=1e-12)
    assert r.mean == pytest.approx(float(r.bits_per_dim.mean()))
    assert r.mean_stderr == pytest.approx(float(r.bits_per_dim.std()) / math.sqrt(6))


def test_uniform_data_take_all_bits() -> None:
    """A density that is constant over the bins gives log₂(levels) bits."""
    wide = 1e3  # N(0, 1e6) is flat over [−1, 1]
    x = grid()
    prior = _normal(math.hypot(float(VP.mean_scale(1.0)) * wide, float(VP.std(1.0))), 3)
    r = bits_per_dim(score_of_normal(wide), VP, x, levels=LEVELS, seed=0, prior=prior)
    flat = math.log2(wide * math.sqrt(2 * math.pi) / bin_width((-1, 1), LEVELS))
    torch.testing.assert_close(r.bits_per_dim, torch.full((6,), flat).double(), rtol=0, atol=1e-3)


def _normal(std: float, d: int) -> torch.distributions.Distribution:
    one = torch.distributions.Normal(torch.zeros(d).double(), std)
    return torch.distributions.Independent(one, 1)


def test_declared_range_is_all_that_counts() -> None:
    """Data in [0, 2] and a model of them have the bits of data in [0, 1] and a model of those."""
    k = torch.randint(0, 5, (4, 2), generator=torch.Generator().manual_seed(1))
    exact = {"rtol": 1e-6, "atol": 1e-6, "seed": 3}
    found = []
    for s in (1.0, 2.0):
        prior = _normal(math.hypot(float(VP.mean_scale(1.0)) * s, float(VP.std(1.0))), 2)
        x, ends = s * k.float() / 4, (0, s)
        model = score_of_normal(s)
        found.append(bits_per_dim(model, VP, x, data_range=ends, levels=5, prior=prior, **exact))
    narrow, wide = found
    torch.testing.assert_close(narrow.bits_per_dim, wide.bits_per_dim, rtol=0, atol=2e-4)


def test_importance_is_tighter_and_needs_the_exact_trace() -> None:
    x, settings = grid(), {"levels": LEVELS, "draws": 8, "seed": 2, "rtol": 1e-4, "atol": 1e-4}
    model = score_of_normal(0.3)
    plain = bits_per_dim(model, VP, x, **settings)
    tight = bits_per_dim(model, VP, x, importance=True, **settings)
    assert torch.equal(plain.log_prob, tight.log_prob)
    assert (tight.bits_per_dim <= plain.bits_per_dim).all()
    expected = torch.logsumexp(plain.log_prob, 0) - math.log(8)
    expected = -(expected / 3 + math.log(1 / 8)) / math.log(2)
    torch.testing.assert_close(tight.bits_per_dim, expected, rtol=0, atol=1e-12)
    assert (tight.stderr > 0).all()
    with pytest.warns(UserWarning, match="^importance: the trace is estimated"):
        bits_per_dim(model, VP, x, importance=True, exact=False, **settings)


def test_draws_have_probes_of_their_own() -> None:
    def mixing(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.flip(1) * 2 + x.roll(1, 1)) - x

    x, settings = grid(), {"levels": LEVELS, "exact": False, "seed": 2, "rtol": 1e-3, "atol": 1e-3}
    r = bits_per_dim(mixing, VP, x, draws=2, probes=2, **settings)
    keys = noise.keys(2, len(x))
    for draw in range(2):
        one = sbm_fast.log_likelihood(
            mixing, VP, dequantise(x, keys, draw, (-1, 1), LEVELS), keys=keys, probes=2,
            first_probe=2 * draw, exact=False, rtol=1e-3, atol=1e-3,
        )  # fmt: skip
        assert torch.equal(one.log_prob, r.log_prob[draw])
    single = bits_per_dim(mixing, VP, x, probes=2, **settings)
    torch.testing.assert_close(single.stderr, single.result.stderr / (3 * math.log(2)))
    assert bits_per_dim(mixing, VP, x, **settings).stderr.isnan().all()
    assert single.nfe.tolist() == single.result.nfe.tolist() and (r.nfe > single.nfe).all()


def test_shards_are_parts_of_the_whole() -> None:
    x, settings = grid(), {"levels": LEVELS, "seed": 2, "rtol": 1e-3, "atol": 1e-3}
    model = score_of_normal(0.5)
    whole = bits_per_dim(model, VP, x, **settings)
    rest = bits_per_dim(model, VP, x[4:], first_sample=4, **settings)
    assert torch.equal(whole.bits_per_dim[4:], rest.bits_per_dim)
    keyed = bits_per_dim(
        model, VP, x[4:], levels=LEVELS, keys=noise.keys(2, 6)[4:], rtol=1e-3, atol=1e-3
    )
    assert torch.equal(keyed.bits_per_dim, rest.bits_per_dim) and keyed.seed is None


def test_one_and_no_samples() -> None:
    one = bits_per_dim(score_of_normal(0.5), VP, grid(1), levels=LEVELS)
    assert math.isnan(one.mean_stderr) and math.isfinite(one.mean)
    none = bits_per_dim(score_of_normal(0.5), VP, grid(0), levels=LEVELS)
    assert none.bits_per_dim.shape == (0,) and math.isnan(none.mean)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": grid() + 0.5}, ValueError, "x: expected values in data_range"),
    ({"x": grid() * 0.99}, ValueError, "x: expected one of the levels"),
    ({"x": grid().double().long()}, TypeError, "x: "),
    ({"levels": 1}, ValueError, "levels: "),
    ({"levels": 256}, ValueError, "x: expected one of the levels=256"),
    ({"data_range": (1, -1)}, ValueError, "data_range: "),
    ({"draws": 0}, ValueError, "draws: "),
    ({"draws": 1.0}, TypeError, "draws: "),
    ({"importance": True}, ValueError, "importance: "),
    ({"importance": 1, "draws": 2}, TypeError, "importance: "),
    ({"probes": 0}, ValueError, "probes: "),
    ({"keys": torch.zeros(3, dtype=torch.int64)}, ValueError, "keys: "),
    ({"prob": 3}, TypeError, ".*prob"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    given = {"model": score_of_normal(0.5), "sde": VP, "x": grid(), "levels": LEVELS, **arguments}
    with pytest.raises(kind, match="^" + words):
        bits_per_dim(**given)


def test_mean_and_error() -> None:
    mean, error = bits.mean_and_error(torch.tensor([1.0, 2.0, 6.0]).double())
    assert mean == 3.0 and error == pytest.approx(math.sqrt(7 / 3))
