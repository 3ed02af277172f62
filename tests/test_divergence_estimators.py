"""The divergence's estimators: matrices whose trace is known, and the digits' Jacobian.

Statistical tests are of fixed seeds; each compares with its expectation at Z standard errors.
"""

import math
from collections.abc import Callable

import pytest
import torch
from divergence_cases import KINDS, SHAPE, Network, columns, curved, linear, made, matrices, states
from torch import Tensor

from sbm_fast import noise
from sbm_fast.data import digits
from sbm_fast.nn import shipped

Z = 4.5


def trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=1, dim2=2).sum(1)


@pytest.mark.parametrize("product", ["vjp", "jvp"])
@pytest.mark.parametrize("shape", [(1,), (7,), SHAPE, (1, 5, 8)])
def test_exact_is_the_trace(product: str, shape: tuple[int, ...]) -> None:
    a = matrices(6, shape=shape)
    found = columns(made("exact", product=product), linear(a), states(6, shape))
    assert found.shape == (1, 6) and found.dtype == torch.float64
    torch.testing.assert_close(found[0], trace(a), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("kind", "probes"), KINDS)
def test_slope_and_divergence_have_the_flows_coefficients(kind: str, probes: int) -> None:
    a, x, keys = matrices(6), states(6), noise.keys(5, 6)
    coef = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = torch.full_like(x, math.nan)
    divergence = made(kind, probes)
    found = divergence.slope(linear(a), x, x, keys, coef, out)
    p, q, r = coef.T
    f = linear(a)(x)
    torch.testing.assert_close(out, p.view(-1, 1, 1, 1) * x + q.view(-1, 1, 1, 1) * f)
    torch.testing.assert_close(found, p * 12 + r * columns(made(kind, probes), linear(a), x))
    assert found.shape == (divergence.columns, 6)


def close_in_law(values: Tensor, mean: float, variance: float) -> None:
    """Mean and variance of the values, each within Z of its own standard errors."""
    n, off = values.numel(), values - mean
    assert abs(float(off.mean())) < Z * math.sqrt(variance / n)
    squares = off**2
    assert abs(float(squares.mean()) - variance) < Z * float(squares.std()) / math.sqrt(n)


@pytest.mark.parametrize("gaussian", [False, True])
def test_hutchinson_has_its_mean_and_variance(gaussian: bool) -> None:
    """Var vᵀAv = 2 (‖A‖²_F − Σ a_ii²) with signs, 2 ‖A‖²_F with normals, A symmetric."""
    a = matrices(1, shape=(8,))
    a = (a + a.mT) / 2
    many, probes = 20_000, 3
    found = columns(
        made("hutchinson", probes, gaussian=gaussian), linear(a.expand(many, 8, 8)),
        states(1, (8,)).expand(many, 8).contiguous(),
    )  # fmt: skip
    diagonal = a.diagonal(dim1=1, dim2=2)
    variance = 2 * float((a**2).sum() - (0 if gaussian else (diagonal**2).sum()))
    for column in found:
        close_in_law(column, float(trace(a)), variance)
    close_in_law(found.mean(0), float(trace(a)), variance / probes)


def test_signs_do_not_see_the_identity() -> None:
    x = states(50)
    coef = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64).repeat(50, 1)
    found = columns(made("hutchinson", 2), curved, x, coef=coef)
    assert torch.equal(found, torch.full_like(found, 3.0 * 12))


def test_what_cancels_in_the_slope_cancels_for_normal_probes() -> None:
    """p I + r J with J = −(p/r) I, as a network that predicts ε holds it: no noise is left."""
    x = states(50)
    coef = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64).repeat(50, 1)
    opposite = torch.eye(12, dtype=torch.float64).expand(50, 12, 12) * -3.0
    found = columns(made("hutchinson", 20, gaussian=True), linear(opposite), x, coef=coef)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_probes_are_those_of_the_contract() -> None:
    """Draw first_draw + k, stream PROBE, of each sample's key; others are others."""
    a, x, keys = matrices(4), states(4), noise.keys(8, 4)
    found = columns(made("hutchinson", 4), linear(a), x, keys=keys)
    for k in range(4):
        v = noise.rademacher(8, (4, 12), draw=k, stream=noise.PROBE, dtype=torch.float64)
        torch.testing.assert_close(found[k], torch.einsum("bi,bij,bj->b", v, a, v))
    later = columns(made("hutchinson", 2, first_draw=2), linear(a), x, keys=keys)
    assert torch.equal(later, found[2:])


@pytest.mark.parametrize("product", ["vjp", "jvp"])
@pytest.mark.parametrize("probes", [4, 8, 24])
@pytest.mark.parametrize("less", [1, 2, 3])
def test_xtrace_is_exact_below_its_rank(product: str, probes: int, less: int) -> None:
    rank = probes // 2 - less
    if rank < 0:
        pytest.skip("no such rank")
    a = matrices(30, rank=rank)
    found = columns(made("xtrace", probes, product=product), linear(a), states(30))
    torch.testing.assert_close(found, trace(a).expand_as(found), rtol=1e-9, atol=1e-9)


def test_xtrace_is_exact_where_it_spans_everything() -> None:
    a = matrices(30)
    found = columns(made("xtrace", 24), linear(a), states(30))
    torch.testing.assert_close(found, trace(a).expand_as(found), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [None, -1.5, 40.0])
def test_xtrace_is_unbiased_and_knows_its_error(shift: float | None) -> None:
    """Also for a matrix that is not symmetric, with a shift or without; every column by itself.

    The columns share their range, so their spread tells somewhat less than the error: by a factor
    of about 1 − k/d in d dimensions, k = 4 of 12 here."""
    a, many = matrices(1), 20_000
    shifts = None if shift is None else torch.full((many,), shift, dtype=torch.float64)
    found = columns(
        made("xtrace", 8), linear(a.expand(many, 12, 12)),
        states(1).expand(many, *SHAPE).contiguous(), shift=shifts,
    )  # fmt: skip
    for estimate in (*found, found.mean(0)):
        error = float(estimate.std()) / math.sqrt(many)
        assert abs(float(estimate.mean() - trace(a))) < Z * error
    told = float((found.var(0) / 4).mean().sqrt())
    assert 0.6 < told / float(found.mean(0).std()) < 1.1


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_a_multiple_of_the_identity_costs_xtrace_nothing(shift: float) -> None:
    a = 3.0 * torch.eye(12, dtype=torch.float64).expand(5, 12, 12)
    shifts = torch.full((5,), shift, dtype=torch.float64)
    found = columns(made("xtrace", 6), linear(a), states(5), shift=shifts)
    torch.testing.assert_close(found, torch.full_like(found, 36.0))


def test_sums_of_float32_states_may_run_in_float64() -> None:
    def network(x: Tensor) -> Tensor:
        return 1.1 * x

    x = states(1, (5000,), torch.float32)
    wide, narrow = (columns(made(), network, x, dtype=t) for t in (torch.float64, None))
    exact = 5000 * float(torch.tensor(1.1))
    assert abs(float(wide) - exact) < 1e-9 < abs(float(narrow) - exact) < 1e-2


@pytest.fixture(scope="module")
def digit_states() -> Callable[[float, int], tuple[Network, Tensor, Tensor]]:
    """At σ/m = r: the network, inputs of 8 held-out digits, each `copies` times, and the shift to
    the denoiser's Jacobian."""
    net, images = shipped.digits().eval(), digits().held_out[::40][:8]

    def at(r: float, copies: int) -> tuple[Network, Tensor, Tensor]:
        h = math.hypot(r, net.sigma_data)
        u = (images + r * noise.normal(1, images.shape)) / h
        label = torch.full((len(u) * copies,), math.log(r) / 4)
        shift = torch.full((len(u) * copies,), net.sigma_data / r, dtype=torch.float64)
        return lambda x: net(x, label[: len(x)]), u.repeat_interleave(copies, 0), shift

    return at


def test_estimates_agree_with_the_exact_trace_of_digits(
    digit_states: Callable[[float, int], tuple[Network, Tensor, Tensor]],
) -> None:
    network, x, _ = digit_states(0.3, 1)
    exact = columns(made("exact"), network, x)[0]
    for kind, probes in (("hutchinson", 24), ("xtrace", 24)):
        found = columns(made(kind, probes), network, x)
        error = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - exact).abs() < Z * error).all()), kind


@pytest.mark.parametrize(("r", "at_most"), [(1.0, 0.75), (3.0, 0.6)])
def test_xtrace_gains_on_digits_at_high_noise(
    digit_states: Callable[[float, int], tuple[Network, Tensor, Tensor]],
    r: float,
    at_most: float,
) -> None:
    """Its error against Rademacher's, both with 32 products (docs/likelihood.md: not at low)."""
    copies = 12
    network, x, shift = digit_states(r, copies)
    single, y, _ = digit_states(r, 1)
    exact = columns(made("exact"), single, y)[0].repeat_interleave(copies)

    def deviation(kind: str, a: Tensor | None) -> float:
        found = columns(made(kind, 32), network, x, shift=a)
        return float(((found.mean(0) - exact) ** 2).mean().sqrt())

    assert deviation("xtrace", shift) < at_most * deviation("hutchinson", None)
