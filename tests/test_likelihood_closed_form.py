"""Log-densities against closed forms, their standard errors against the exact trace, and the way
there and back.

The exact law at t_max is the prior here, so what is left is the error of the solver and of float32.
What the standard prior and t_min cost is in likelihood_truncation.py.
"""

from __future__ import annotations

import likelihood_cases as cases
import likelihood_truncation as truncation
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import sbm_fast
from sbm_fast.parameterization import PREDICTIONS

every_sde = pytest.mark.parametrize("sde", cases.SDES.values(), ids=cases.SDES)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


def errors(name: str, sde: cases.SDE, predicts: str, samples: int, **options: object) -> Tensor:
    """|log_prob − log p at t_min| at data, exact trace, float32 unless asked otherwise."""
    data, t_min = cases.CASES[name], cases.first_time(sde)
    x = data.at(sde, t_min).sample(samples, seed=11).float()
    found = sbm_fast.log_likelihood(
        data.model(sde, predicts), sde, x, exact=True, prior=data.at(sde, sde.t_max), **options
    )
    assert found.finished.all()
    assert (found.stderr == 0).all()
    return (found.log_prob - data.at(sde, t_min).log_prob(x)).abs()


@every_sde
@every_prediction
def test_plane(sde: cases.SDE, predicts: str) -> None:
    assert errors("2-D mixture", sde, predicts, 64, rtol=1e-6, atol=1e-6).max() <= 1e-4


@every_sde
def test_plane_of_a_gaussian(sde: cases.SDE) -> None:
    assert errors("2-D Gaussian", sde, "eps", 64, rtol=1e-6, atol=1e-6).max() <= 1e-4


# A few: sixty-four products an evaluation take five seconds a case.
WIDE = [("64-D mixture", sde, "edm") for sde in cases.SDES]
WIDE += [("64-D mixture", "VP", "score"), ("64-D Gaussian", "VE", "eps")]


@pytest.mark.parametrize(("name", "sde", "predicts"), WIDE)
def test_wide(name: str, sde: str, predicts: str) -> None:
    error = errors(name, cases.SDES[sde], predicts, 4, rtol=1e-6, atol=1e-6)
    assert error.max() <= 1e-3


@every_sde
def test_default_tolerance(sde: cases.SDE) -> None:
    """1e-5 is where a typical sample is within 1e-4; a few, between two modes, are not."""
    error = errors("2-D mixture", sde, "edm", 256)
    assert error.median() <= 1e-4
    assert error.max() <= 1e-3


@every_sde
def test_float64_converges(sde: cases.SDE) -> None:
    """A lower tolerance gives a lower error: nothing but the solver is in the way."""
    tight = errors("2-D mixture", sde, "eps", 8, rtol=1e-9, atol=1e-9, dtype=torch.float64)
    assert tight.max() <= 1e-7


def test_truncation_table_is_the_documented_one() -> None:
    text = truncation.DOCS.read_text(encoding="utf-8")
    section = text.partition("<!-- truncation: begin -->\n")[2]
    section = section.partition("\n<!-- truncation: end -->")[0]
    assert section == truncation.table(), "run python tests/likelihood_truncation.py --write"


@every_sde
def test_standard_prior_costs_what_the_table_says(sde: cases.SDE) -> None:
    """Without `prior=` the result moves by log N(x_T; 0, prior_std²) − log p_T(x_T) and no more."""
    data = cases.CASES["2-D mixture"]
    x = data.at(sde, cases.first_time(sde)).sample(16, seed=12).float()
    model = data.model(sde, "edm")
    standard = sbm_fast.log_likelihood(model, sde, x)
    exact = sbm_fast.log_likelihood(model, sde, x, prior=data.at(sde, sde.t_max))
    assert torch.equal(standard.latent, exact.latent)
    z = exact.latent.double()
    normal = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std).double())
    moved = normal.log_prob(z).sum(1) - data.at(sde, sde.t_max).log_prob(z)
    torch.testing.assert_close(standard.log_prob - exact.log_prob, moved, rtol=0, atol=1e-9)


REPETITIONS, PROBES = 1000, 8


@pytest.mark.parametrize("index", [0, 1])
def test_standard_errors_are_calibrated(index: int) -> None:
    """95 % Student-t intervals of 8 probes cover the exact trace in 92 % to 98 % of 1000 keys.

    The keys share x and the solver's steps (the probes don't touch either), so that truth and
    estimates differ by the probes alone.
    """
    sde = sbm_fast.VPSDE()
    data = cases.CASES["64-D mixture"]
    x = data.at(sde, 1e-5).sample(2, seed=13).float()[index : index + 1]
    model = data.model(sde, "edm")
    truth = sbm_fast.log_likelihood(model, sde, x, exact=True)
    many = x.expand(REPETITIONS, -1).contiguous()
    found = sbm_fast.log_likelihood(model, sde, many, probes=PROBES, exact=False, seed=14)
    off = ((found.log_prob - truth.log_prob) / found.stderr).abs()
    covered = float((off <= stats.t.ppf(0.975, PROBES - 1)).double().mean())
    assert 0.92 <= covered <= 0.98
    # An interval that takes the estimate of the error for the error itself covers less.
    assert float((off <= stats.norm.ppf(0.975)).double().mean()) < covered
    # No bias: the mean over all repetitions is the truth within its own error.
    mean_error = float(found.log_prob.std() / np.sqrt(REPETITIONS))
    assert abs(float(found.log_prob.mean() - truth.log_prob)) < 4 * mean_error


@every_sde
@pytest.mark.parametrize("name", ["2-D mixture", "64-D mixture"])
def test_encoding_and_back(name: str, sde: cases.SDE) -> None:
    """By default both end at the SDE's own t_min."""
    data = cases.CASES[name]
    x = data.at(sde, sde.t_min).sample(32, seed=15).float()
    model = data.model(sde, "edm")
    latent = sbm_fast.encode(model, sde, x)
    back = sbm_fast.sample(model, sde, tuple(x.shape), method="ode", solver="dopri5", x_init=latent)
    # Both ways' local errors of 1e-5, over the some twenty steps that each takes.
    assert (back - x).abs().max() < 1e-3
    assert (back - x).square().mean().sqrt() < 1e-4
