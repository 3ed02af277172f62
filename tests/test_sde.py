"""The continuous SDEs against 50-digit closed forms, their moment equations, and score_sde."""

from __future__ import annotations

from decimal import Decimal as Dec
from decimal import localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from sbm_fast.sde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    DDPMSchedule,
    NCSNLadder,
    SubVPSDE,
    as_sde,
)

CONTINUOUS: list[SDE] = [
    VESDE(),
    VESDE(0.02, 1348.0),
    VPSDE(),
    VPSDE(0.3, 0.3),
    VPSDE(1e-4, 40.0),
    SubVPSDE(),
    SubVPSDE(0.5, 10.0),
    EDMSDE(),
    EDMSDE(1e-4, 700.0),
]
METHODS = ("mean_scale", "std", "nsr", "drift_coef", "diffusion")
reproducible = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def exact(sde: Any, t: float) -> dict[str, Dec]:
    """The formulas of Song et al. and Karras et al., word by word, in 50 digits."""
    with localcontext() as context:
        context.prec = 50
        x = Dec(t)
        if isinstance(sde, EDMSDE):
            return _exact(Dec(1), x, Dec(0), (2 * x).sqrt())
        if isinstance(sde, VESDE):
            low, high = Dec(sde.sigma_min), Dec(sde.sigma_max)
            ratio = (high / low).ln()
            sigma = low * (ratio * x).exp()
            return _exact(Dec(1), sigma, Dec(0), sigma * (2 * ratio).sqrt())
        low, high = Dec(sde.beta_min), Dec(sde.beta_max)
        log_m = -x * x * (high - low) / 4 - x * low / 2
        beta = low + x * (high - low)
        m, f = log_m.exp(), -beta / 2
        if isinstance(sde, VPSDE):
            return _exact(m, (1 - (2 * log_m).exp()).sqrt(), f, beta.sqrt())
        g = (beta * (1 - (-2 * low * x - (high - low) * x * x).exp())).sqrt()
        return _exact(m, 1 - (2 * log_m).exp(), f, g)


def _exact(m: Dec, sigma: Dec, f: Dec, g: Dec) -> dict[str, Dec]:
    return dict(zip(METHODS, (m, sigma, sigma / m, f, g), strict=True))


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_closed_forms_to_14_digits_down_to_small_times(sde: SDE) -> None:
    # 1 − exp(x) in float64 would be wrong by 1e-5 at t = 1e-10.
    times = np.concatenate([np.geomspace(1e-15, 1.0, 61) * sde.t_max, np.linspace(0, 1, 41)])
    for name in METHODS:
        values = getattr(sde, name)(times)
        assert values.dtype == np.float64 and values.shape == times.shape
        for t, value in zip(times.tolist(), values.tolist(), strict=True):
            truth = exact(sde, t)[name]
            assert abs(Dec(value) - truth) <= Dec("1e-14") * abs(truth), (name, t, value, truth)
            assert getattr(sde, name)(t) == pytest.approx(value, rel=1e-15, abs=0)


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_moments_solve_the_moment_equations(sde: SDE) -> None:
    """dm/dt = f m, dσ²/dt = 2 f σ² + g², from the law at t = 0."""

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        f, g = sde.drift_coef(t), sde.diffusion(t)
        return np.array([f * y[0], 2 * f * y[1] + g * g])

    times = np.linspace(0, sde.t_max, 9)
    start = [sde.mean_scale(0.0), sde.std(0.0) ** 2]
    solved = solve_ivp(
        rhs, (0, sde.t_max), start, "DOP853", times, rtol=3e-14, atol=1e-18 * sde.t_max
    )
    assert solved.success
    np.testing.assert_allclose(solved.y[0], sde.mean_scale(times), rtol=1e-11)
    np.testing.assert_allclose(solved.y[1], sde.std(times) ** 2, rtol=1e-11)


def test_ve_marginal_and_transition_variance() -> None:
    """σ(t)² counts the noise of t = 0; the SDE itself adds ∫g² = σ(t)² − σ(0)²."""
    sde = VESDE(0.3, 20.0)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for t in (0.1, 0.5, 1.0):
        added = np.sum(0.5 * t * weights * sde.diffusion(0.5 * t * (nodes + 1)) ** 2)
        assert added == pytest.approx(sde.std(t) ** 2 - sde.std(0.0) ** 2, rel=1e-12, abs=0)
        assert added < sde.std(t) ** 2 * (1 - 1e-5)


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_ends(sde: SDE) -> None:
    assert sde.mean_scale(0.0) == 1
    assert 0 < sde.t_min < sde.t_max
    assert sde.nsr_range == (sde.nsr(0.0), sde.nsr(sde.t_max))
    if isinstance(sde, (VESDE, EDMSDE)):
        assert sde.prior_std == sde.sigma_max == sde.std(sde.t_max)
    else:
        assert sde.prior_std == 1 and sde.std(0.0) == 0


def test_ranges_and_published_numbers() -> None:
    assert (VESDE().t_min, VESDE().t_max) == (1e-5, 1.0)
    assert (VPSDE().t_min, VPSDE().t_max) == (1e-3, 1.0) == (SubVPSDE().t_min, SubVPSDE().t_max)
    assert (EDMSDE().t_min, EDMSDE().t_max) == (0.002, 80.0)
    assert VESDE().std(0.0) == 0.01 and VESDE().std(1.0) == 50.0
    assert VESDE().diffusion(0.7) / VESDE().std(0.7) == pytest.approx(4.127, abs=5e-4)
    # EDM's VP preconditioning: σ(1e-5) = 1.0005e-3, σ(1e-3) = .010486, σ(1) = 152.167.
    assert VPSDE(0.1, 20.0).nsr(1e-5) == pytest.approx(1.0005e-3, rel=1e-4, abs=0)
    assert VPSDE(0.1, 20.0).nsr(1e-3) == pytest.approx(0.010486, rel=1e-4, abs=0)
    assert VPSDE(0.1, 20.0).nsr(1.0) == pytest.approx(152.167, rel=1e-5, abs=0)
    assert VPSDE().mean_scale(1.0) ** 2 == pytest.approx(4.319e-5, rel=1e-4, abs=0)
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(SubVPSDE().std(t), VPSDE().std(t) ** 2, rtol=1e-14)


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_time_at_nsr_inverts_nsr_over_decades(sde: SDE) -> None:
    low, high = sde.nsr_range
    ratios = np.geomspace(max(low, 1e-12), high, 400)
    times = sde.time_at_nsr(ratios)
    assert times.shape == ratios.shape and (np.diff(times) > 0).all()
    np.testing.assert_allclose(sde.nsr(times), ratios, rtol=1e-12)
    grid = np.geomspace(1e-12, 1, 200) * sde.t_max
    # VE forgets t where σ(t)/σ(0) − 1 is below the rounding; elsewhere every digit comes back.
    slack = 1e-15 if isinstance(sde, VESDE) else 0
    np.testing.assert_allclose(sde.time_at_nsr(sde.nsr(grid)), grid, rtol=1e-12, atol=slack)
    assert sde.time_at_nsr(low) == 0 or isinstance(sde, EDMSDE)
    assert sde.time_at_nsr(high) == pytest.approx(sde.t_max, rel=1e-14, abs=0)
    assert sde.time_at_nsr(high) <= sde.t_max


@reproducible
@given(
    beta_min=st.floats(1e-6, 5),
    slope=st.floats(0, 100),
    t=st.floats(1e-9, 1),
    kind=st.sampled_from([VPSDE, SubVPSDE]),
)
def test_inverse_for_any_beta(beta_min: float, slope: float, t: float, kind: Any) -> None:
    sde = kind(beta_min, beta_min + slope)
    assert sde.time_at_nsr(sde.nsr(t)) == pytest.approx(t, rel=1e-12, abs=0)


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_time_at_nsr_outside_the_range(sde: SDE) -> None:
    low, high = sde.nsr_range
    assert sde.time_at_nsr(high * (1 + 0.9e-9)) == sde.time_at_nsr(high)
    assert sde.time_at_nsr(low * (1 - 0.9e-9)) == sde.time_at_nsr(low)
    for bad in (high * (1 + 3e-9), low * (1 - 3e-9) if low > 0 else -1e-300, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"^r: {type(sde).__name__} .*{high:.6g}\]"):
            sde.time_at_nsr(bad)
        with pytest.raises(ValueError, match=r"^r: "):
            sde.time_at_nsr(np.array([high, bad]))
    with pytest.raises(TypeError, match=r"^r: expected a real number"):
        sde.time_at_nsr("0.5")  # type: ignore[call-overload]


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("name", [*METHODS, "time_at_nsr"])
def test_shapes_and_types(sde: SDE, name: str) -> None:
    method = getattr(sde, name)
    high = sde.nsr(sde.t_max) if name == "time_at_nsr" else sde.t_max
    times = np.linspace(0.5, 0.99, 6) * high
    assert isinstance(method(float(times[0])), float)
    for array in (times, times.reshape(2, 3), times[:0], times[::-2], times.astype(np.float32)):
        out = method(array)
        assert out.dtype == np.float64 and out.shape == array.shape
    np.testing.assert_allclose(method(times), [method(t) for t in times.tolist()], rtol=1e-15)
    assert method(torch.from_numpy(times)).shape == (6,)
    if name != "time_at_nsr":
        assert method(0) == method(0.0)
    before = times.copy()
    method(times)[...] = -1
    np.testing.assert_array_equal(times, before)


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("name", METHODS)
def test_bad_times(sde: SDE, name: str) -> None:
    method = getattr(sde, name)
    for bad in (-1e-12, np.nan, np.inf, [0.1, -0.1]):
        with pytest.raises(ValueError, match=rf"^t: {type(sde).__name__} has times in \[0, "):
            method(bad)
    wrong: list[Any] = ["now", None, True, 1j, [True]]
    for bad in wrong:
        with pytest.raises(TypeError, match=r"^t: expected a real number"):
            method(bad)
    beyond = sde.t_max * 1.01
    if isinstance(sde, EDMSDE):
        assert np.isfinite(method(beyond))  # churn goes there
    else:
        assert method(sde.t_max * (1 + 1e-10)) == pytest.approx(method(sde.t_max), rel=1e-8, abs=0)
        with pytest.raises(ValueError, match=r"^t: "):
            method(beyond)


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_repr_and_equality(sde: SDE) -> None:
    assert eval(repr(sde)) == sde and hash(eval(repr(sde))) == hash(sde)
    assert sde != "sde"
    assert sum(sde == other for other in CONTINUOUS) == 1
    with pytest.raises(AttributeError):
        sde.sigma_min = 1.0  # type: ignore[attr-defined]
    assert VPSDE() != SubVPSDE() and VPSDE(1, 2) == VPSDE(1.0, 2.0)
    assert repr(VPSDE(1, 2)) == "VPSDE(beta_min=1.0, beta_max=2.0)"


VP: Any = VPSDE
EDM: Any = EDMSDE


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VESDE(0.0, 1.0), ValueError, "sigma_min: expected a finite number > 0, got 0.0"),
        (lambda: VESDE(1.0, 1.0), ValueError, "sigma_max: expected more than sigma_min"),
        (lambda: EDMSDE(-1.0, 1.0), ValueError, "sigma_min: "),
        (lambda: EDMSDE(2.0, 1.0), ValueError, "sigma_max: "),
        (lambda: EDMSDE(2.0, float("inf")), ValueError, "sigma_max: "),
        (lambda: VPSDE(0.0, 1.0), ValueError, "beta_min: "),
        (lambda: VPSDE(2.0, 1.0), ValueError, "beta_max: expected at least beta_min = 2"),
        (lambda: SubVPSDE(2.0, float("nan")), ValueError, "beta_max: "),
        (lambda: SubVPSDE(2.0, 1e4), ValueError, "beta_max: the mean scale .* underflows"),
        (lambda: VP("0.1", 20.0), TypeError, "beta_min: expected a number, got '0.1'"),
        (lambda: VESDE(True, 20.0), TypeError, "sigma_min: expected a number"),
        (lambda: EDM(0.1, None), TypeError, "sigma_max: expected a number"),
    ],
)
def test_bad_parameters(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()


# Stand-ins for score_sde's own classes: the names and attributes of its sde_lib.py.
def peer(name: str, **attributes: Any) -> object:
    return type(name, (), {"N": 1000, "T": 1, **attributes})()


def test_as_sde() -> None:
    for sde in (*CONTINUOUS, NCSNLadder([1.0, 2.0]), DDPMSchedule([0.1])):
        assert as_sde(sde) is sde
    assert as_sde(peer("VPSDE", beta_0=0.1, beta_1=20)) == VPSDE(0.1, 20.0)
    assert as_sde(peer("subVPSDE", beta_0=0.2, beta_1=20)) == SubVPSDE(0.2, 20.0)
    levels = torch.linspace(0, 1, 1000)
    ve = peer("VESDE", sigma_min=0.01, sigma_max=torch.tensor(50.0), discrete_sigmas=levels)
    assert as_sde(ve) == VESDE(0.01, 50.0)


@pytest.mark.parametrize(
    "bad",
    ["vp", None, VPSDE, peer("VPSDE"), peer("RSDE", beta_0=0.1, beta_1=20), 3.0],
    ids=lambda bad: repr(bad)[:20],
)
def test_as_sde_refuses(bad: object) -> None:
    with pytest.raises(TypeError, match=r"^sde: expected one of VESDE, VPSDE"):
        as_sde(bad)
    with pytest.raises(ValueError, match=r"^beta_max"):
        as_sde(peer("VPSDE", beta_0=2, beta_1=1))
