"""The analytic data of the likelihood tests against torch.distributions and finite differences."""

import likelihood_cases as cases
import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D

from sbm_fast import parameterization

every_case = pytest.mark.parametrize("name", cases.CASES)
every_sde = pytest.mark.parametrize("sde", cases.SDES.values(), ids=cases.SDES)


def times(sde: cases.SDE) -> Tensor:
    """Times over the whole range, a different one for each of five samples."""
    return cases.first_time(sde) + (sde.t_max - cases.first_time(sde)) * torch.tensor(
        [0.0, 0.1, 0.4, 0.7, 1.0], dtype=torch.float64
    )


@every_case
@every_sde
def test_log_density(name: str, sde: cases.SDE) -> None:
    data, t = cases.CASES[name], times(sde)
    x = data.at(sde, t).sample(5, seed=0)
    got = data.at(sde, t).log_prob(x)
    for i, time in enumerate(t.tolist()):
        m, sigma = sde.mean_scale(time), sde.std(time)
        cov = data.axes @ torch.diag_embed(data.variances) @ data.axes.mT * m**2
        cov = cov + sigma**2 * torch.eye(len(cov[0]), dtype=torch.float64)
        law = D.MixtureSameFamily(
            D.Categorical(data.weights), D.MultivariateNormal(m * data.means, cov)
        )
        assert float(got[i]) == pytest.approx(float(law.log_prob(x[i])), rel=1e-9)
        assert float(data.at(sde, time).log_prob(x[i : i + 1])) == pytest.approx(float(got[i]))


@every_case
@every_sde
def test_score_is_the_gradient(name: str, sde: cases.SDE) -> None:
    law = cases.CASES[name].at(sde, times(sde))
    x = law.sample(5, seed=1)
    along = torch.nn.functional.normalize(torch.randn_like(x), dim=1)
    step = 1e-5 * law.sigma.clamp_min(0.1)[:, None]
    slope = (law.log_prob(x + step * along) - law.log_prob(x - step * along)) / (2 * step[:, 0])
    got = (law.score(x) * along).sum(1)
    torch.testing.assert_close(got, slope, rtol=1e-5, atol=1e-6)


@every_case
def test_samples_have_the_moments(name: str) -> None:
    data = cases.CASES[name]
    x, _ = data.sample(20_000, seed=2)
    mean = data.weights @ data.means
    away = data.means - mean
    cov = data.axes @ torch.diag_embed(data.variances) @ data.axes.mT
    cov = torch.einsum("k,kde->de", data.weights, cov + away[:, :, None] * away[:, None])
    assert ((x.mean(0) - mean) / (cov.diag() / len(x)).sqrt()).abs().max() < 5
    assert (x.T.cov() - cov).abs().max() < 0.05 * cov.diag().max()


@every_sde
@pytest.mark.parametrize("predicts", parameterization.PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models(predicts: str, sde: cases.SDE, dtype: torch.dtype) -> None:
    """The denoised data by the model's own form is Tweedie's, for another t in every sample."""
    data, t = cases.CASES["2-D mixture"], times(sde)
    law, label = data.at(sde, t), torch.as_tensor(sde.nsr(t.numpy())).to(dtype)
    x = law.sample(5, seed=3)
    model = data.model(sde, predicts)
    tweedie = (x + law.sigma[:, None] ** 2 * law.score(x)) / law.m[:, None]
    levels = zip(law.m.tolist(), law.sigma.tolist(), strict=True)
    forms = [(model.predicts, *level, model.sigma_data) for level in levels]
    c_in = torch.tensor([parameterization.input_scale(*form) for form in forms])
    out = model((x * c_in[:, None]).to(dtype), label)
    assert out.dtype == dtype
    for i, form in enumerate(forms):
        D = parameterization.denoiser(*form)
        # The smallest t has D = x/m to nine digits, and the score in float32 seven of the rest.
        tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {}
        got = D.x * x[i] + D.F * out[i].double()
        torch.testing.assert_close(got, tweedie[i], **tolerance)


@pytest.mark.parametrize("shape", [(5, 64), (5, 1, 8, 8)])
def test_models_are_differentiable(shape: tuple[int, ...]) -> None:
    """vjp, jvp and vmapped products agree with the Jacobian, which differs between samples."""
    sde = cases.SDES["VP"]
    model, t = cases.CASES["64-D mixture"].model(sde, "edm"), times(sde)
    label = torch.as_tensor(sde.nsr(t.numpy()))
    x = cases.CASES["64-D mixture"].at(sde, t).sample(5, seed=4).reshape(shape)
    v = torch.randn(shape, dtype=torch.float64)

    def net(y: Tensor) -> Tensor:
        return model(y, label)

    blocks = torch.autograd.functional.jacobian(net, x).reshape(5, 64, 5, 64)
    full = torch.einsum("bibj->bij", blocks)
    _, forward = torch.func.jvp(net, (x,), (v,))
    _, pull = torch.func.vjp(net, x)
    flat = v.flatten(1)
    torch.testing.assert_close(forward.flatten(1), torch.einsum("bij,bj->bi", full, flat))
    torch.testing.assert_close(pull(v)[0].flatten(1), torch.einsum("bij,bi->bj", full, flat))
    rows = torch.func.vmap(lambda w: pull(w)[0])(torch.stack([v, 2 * v]))
    torch.testing.assert_close(rows[1], 2 * rows[0])
    spread = np.ptp(full.diagonal(dim1=1, dim2=2).sum(1).numpy())
    assert spread > 1
