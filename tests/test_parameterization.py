"""Each form p·x + q·F against the definitions, solved in 60-digit arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal as Dec
from decimal import localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbm_fast.parameterization import (
    PREDICTIONS,
    Affine,
    denoiser,
    input_scale,
    noise,
    score,
)

FORMS: dict[str, Callable[..., Affine]] = {"D": denoiser, "s": score, "eps": noise}
reproducible = settings(derandomize=True, deadline=None, database=None, max_examples=60)
predictions = pytest.mark.parametrize("predicts", PREDICTIONS)

# Powers of ten of m, σ, σ_data: far beyond any SDE.
decades = st.floats(-6, 0).map(lambda u: 10.0**u)
levels = st.floats(-9, 5).map(lambda u: 10.0**u)
scales = st.floats(-3, 2).map(lambda u: 10.0**u)


def output(predicts: str, m: Dec, sigma: Dec, sigma_data: Dec) -> tuple[Dec, Dec]:
    """(a, b) of the network's output F = a x + b D, in the words of each paper."""
    if predicts == "score":  # Tweedie: s = (m D − x)/σ²
        return -1 / sigma**2, m / sigma**2
    if predicts == "eps":  # x = m D + σ ε
        return 1 / sigma, -m / sigma
    if predicts == "x0":
        return Dec(0), Dec(1)
    if predicts == "v":  # v = α ε − σ̃ D with α² + σ̃² = 1
        n = (m**2 + sigma**2).sqrt()
        return m / n / sigma, -m / n * m / sigma - sigma / n
    nsr = sigma / m  # D = c_skip y + c_out F at y = x/m
    c_skip = sigma_data**2 / (nsr**2 + sigma_data**2)
    c_out = nsr * sigma_data / (nsr**2 + sigma_data**2).sqrt()
    return -c_skip / m / c_out, 1 / c_out


def by_definition(
    predicts: str, m: float, sigma: float, sigma_data: float
) -> dict[str, tuple[Dec, Dec]]:
    with localcontext() as context:
        context.prec = 60
        m_, sigma_, sigma_data_ = Dec(m), Dec(sigma), Dec(sigma_data)
        a, b = output(predicts, m_, sigma_, sigma_data_)
        p, q = -a / b, 1 / b
        return {
            "D": (p, q),
            "s": ((m_ * p - 1) / sigma_**2, m_ * q / sigma_**2),
            "eps": ((1 - m_ * p) / sigma_, -m_ * q / sigma_),
        }


def assert_close(got: float, truth: Dec, rel: str = "2e-15") -> None:
    if abs(truth) < Dec("1e-25"):  # an exact 0 up to the 60 digits
        assert got == 0, truth
    else:
        assert abs(Dec(got) - truth) <= Dec(rel) * abs(truth), (got, truth)


@predictions
@reproducible
@given(m=decades, sigma=levels, sigma_data=scales)
def test_every_coefficient_to_the_last_digits(
    predicts: str, m: float, sigma: float, sigma_data: float
) -> None:
    truth = by_definition(predicts, m, sigma, sigma_data)
    for name, form in FORMS.items():
        got = form(predicts, m, sigma, sigma_data)
        assert_close(got.x, truth[name][0])
        assert_close(got.F, truth[name][1])


@predictions
@reproducible
@given(
    m=st.floats(0.01, 1),
    sigma=st.floats(1e-3, 100),
    sigma_data=st.floats(0.1, 2),
    x0=st.floats(-3, 3),
    eps=st.floats(-4, 4),
)
def test_forms_of_a_state_and_its_output(
    predicts: str, m: float, sigma: float, sigma_data: float, x0: float, eps: float
) -> None:
    """A network that knows x_0 and ε: every form gives D = x_0, s = −ε/σ, ε."""
    x, n, nsr = m * x0 + sigma * eps, math.hypot(m, sigma), sigma / m
    root = math.hypot(nsr, sigma_data)
    outputs = {
        "score": -eps / sigma,
        "eps": eps,
        "x0": x0,
        "v": (m * eps - sigma * x0) / n,
        "edm": (x0 - sigma_data**2 / root**2 * x / m) / (nsr * sigma_data / root),
    }
    F = outputs[predicts]
    for name, truth in (("D", x0), ("s", -eps / sigma), ("eps", eps)):
        form = FORMS[name](predicts, m, sigma, sigma_data)
        # Rounding of F itself, magnified by what cancels in the form.
        size = abs(form.x * x) + abs(form.F * F) + abs(form.F) * (abs(x / m) + abs(eps)) + 1e-300
        assert abs(form.x * x + form.F * F - truth) <= 2e-14 * size * (1 + root / nsr)


@predictions
@reproducible
@given(m=decades, sigma=levels, sigma_data=scales)
def test_forms_agree_with_each_other(
    predicts: str, m: float, sigma: float, sigma_data: float
) -> None:
    """m D + σ ε = x and s = −ε/σ, as forms."""
    d, s, e = (form(predicts, m, sigma, sigma_data) for form in FORMS.values())
    assert m * d.x + sigma * e.x == pytest.approx(1, rel=1e-14, abs=0)
    assert m * d.F + sigma * e.F == pytest.approx(0, abs=1e-14 * abs(sigma * e.F))
    assert s.x == pytest.approx(-e.x / sigma, rel=1e-14, abs=0)
    assert pytest.approx(-e.F / sigma, rel=1e-14, abs=0) == s.F


def test_edm_score_does_not_cancel() -> None:
    """At σ = .002 the score through D has lost four digits; the closed form has not."""
    sigma, sigma_data = 0.002, 0.5
    form = score("edm", 1.0, sigma, sigma_data)
    truth = by_definition("edm", 1.0, sigma, sigma_data)["s"][0]
    assert_close(form.x, truth, "4e-16")
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    through_d = (c_skip - 1) / sigma**2
    assert abs(Dec(through_d) / truth - 1) > Dec("1e-13")


def test_karras_table_1() -> None:
    for sigma in np.geomspace(0.002, 80, 7).tolist():
        d = denoiser("edm", 1.0, sigma, 0.5)
        assert d.x == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-14, abs=0)
        assert pytest.approx(sigma * 0.5 / math.sqrt(sigma**2 + 0.25), rel=1e-14, abs=0) == d.F
        c_in = input_scale("edm", 1.0, sigma, 0.5)
        assert c_in == pytest.approx(1 / math.sqrt(sigma**2 + 0.25), rel=1e-14, abs=0)


@reproducible
@given(m=decades, sigma=levels, sigma_data=scales)
def test_input_scale(m: float, sigma: float, sigma_data: float) -> None:
    """c_in makes data of standard deviation σ_data a network input of standard deviation 1."""
    std = math.hypot(m * sigma_data, sigma)
    assert input_scale("edm", m, sigma, sigma_data) * std == pytest.approx(1, rel=1e-14, abs=0)
    assert all(input_scale(p, m, sigma, sigma_data) == 1 for p in PREDICTIONS if p != "edm")


def test_defaults() -> None:
    assert denoiser("edm", 0.5, 2.0) == denoiser("edm", 0.5, 2.0, 0.5)
    assert input_scale("edm", 0.5, 2.0) == input_scale("edm", 0.5, 2.0, 0.5)
    assert all(type(value) is float for value in vars(noise("edm", 1, 2, 1)).values())
    form = score("v", np.float64(1), np.float32(2))
    assert type(form.x) is float and type(form.F) is float
    with pytest.raises(AttributeError):
        denoiser("x0", 1.0, 1.0).x = 2.0  # type: ignore[misc]


def test_without_noise() -> None:
    """σ = 0: D is x/m or the output; the forms that need 1/σ are refused."""
    assert denoiser("score", 0.5, 0.0) == Affine(2.0, 0.0)
    assert denoiser("eps", 0.5, 0.0) == Affine(2.0, 0.0)
    assert denoiser("x0", 0.5, 0.0) == Affine(0.0, 1.0)
    assert denoiser("v", 0.5, 0.0) == Affine(2.0, 0.0)
    assert denoiser("edm", 0.5, 0.0) == Affine(2.0, 0.0)
    assert score("score", 0.5, 0.0) == Affine(0.0, 1.0)
    assert noise("score", 0.5, 0.0) == Affine(0.0, 0.0)
    assert noise("eps", 0.5, 0.0) == Affine(0.0, 1.0)
    assert noise("v", 0.5, 0.0) == Affine(0.0, 1.0)
    assert noise("edm", 0.5, 0.0) == Affine(0.0, -1.0)
    for predicts in ("eps", "x0", "v", "edm"):
        with pytest.raises(ValueError, match=rf"^sigma: the score .* '{predicts}' is singular"):
            score(predicts, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"^sigma: ε .* 'x0' is singular"):
        noise("x0", 0.5, 0.0)


def test_without_signal() -> None:
    """m = 0 (zero terminal SNR): score and ε do not determine D, x0, v and F do."""
    assert denoiser("x0", 0.0, 2.0) == Affine(0.0, 1.0)
    assert denoiser("v", 0.0, 2.0) == Affine(0.0, -1.0)
    assert denoiser("edm", 0.0, 2.0, 0.5) == Affine(0.0, 0.5)
    for predicts in ("score", "eps"):
        with pytest.raises(ValueError, match=rf"^m: D .* '{predicts}' is singular at m = 0"):
            denoiser(predicts, 0.0, 2.0)


@pytest.mark.parametrize("form", [denoiser, score, noise, input_scale])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("epsilon", 1.0, 1.0), ValueError, "predicts: expected one of 'score', 'eps'.*'epsilon'"),
        ((None, 1.0, 1.0), ValueError, "predicts: "),
        (("eps", -1.0, 1.0), ValueError, "m: expected a number ≥ 0, got -1.0"),
        (("eps", math.nan, 1.0), ValueError, "m: expected a finite number"),
        (("eps", 1.0, -1.0), ValueError, "sigma: expected a number ≥ 0"),
        (("eps", 1.0, math.inf), ValueError, "sigma: expected a finite number"),
        (("eps", "1", 1.0), TypeError, "m: expected a number, got '1'"),
        (("eps", 1.0, None), TypeError, "sigma: expected a number, got None"),
        (("x0", 0.0, 0.0), ValueError, "m: a state with m = 0 and sigma = 0"),
        (("edm", 1.0, 1.0, 0.0), ValueError, "sigma_data: expected a finite number > 0"),
        (("edm", 1.0, 1.0, "1"), TypeError, "sigma_data: expected a number"),
    ],
)
def test_bad_arguments(
    form: Any, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        form(*arguments)
