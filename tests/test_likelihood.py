"""`log_likelihood`: what it gives, what it does not depend on, and its errors."""

import math
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import EDMSDE, VESDE, VPSDE, SubVPSDE, likelihood, log_likelihood, noise
from sbm_fast.data import digits
from sbm_fast.nn import shipped

VP = VPSDE()


def score(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise and smooth, so that nothing depends on the batch."""
    return -(x + 0.25) / (1.0 + t.reshape(-1, *[1] * (x.dim() - 1)) + 0.1 * x * x)


class Mixing(nn.Module):
    """A network with a full Jacobian, of products summed one after another."""

    def __init__(self, dimension: int = 5) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(dimension, dimension, generator=g) / dimension)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat = x.flatten(1)
        mixed = sum(flat[:, i : i + 1] * w for i, w in enumerate(self.weight))
        return torch.tanh(mixed).reshape(x.shape) - x / (1.0 + t.reshape(-1, 1).to(x))


def data(n: int = 9, d: int = 5) -> Tensor:
    scale = torch.linspace(0.2, 2.0, n)[:, None]
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(1))


SETTINGS = {"exact": False, "probes": 3, "seed": 4}


def test_standard_normal_data() -> None:
    x = torch.tensor([[0.0, 0.0], [0.3, -0.2], [3.0, -3.0]])
    for sde in (VP, VESDE(0.01, 50.0), SubVPSDE(), EDMSDE()):
        m, sigma = (float(v(likelihood.T_MIN)) for v in (sde.mean_scale, sde.std))

        def exact_score(x: Tensor, t: Tensor, sde: Any = sde) -> Tensor:
            time = t.double().numpy()
            variance = torch.as_tensor(sde.mean_scale(time) ** 2 + sde.std(time) ** 2)
            return (-x / variance[:, None]).to(x.dtype)

        if isinstance(sde, EDMSDE):
            m, sigma = 1.0, sde.sigma_min
        variance = m**2 + sigma**2
        prior = torch.distributions.Normal(
            torch.zeros(2).double(),
            math.hypot(float(sde.mean_scale(sde.t_max)), sde.std(sde.t_max)),
        )
        r = log_likelihood(
            exact_score,
            sde,
            x,
            prior=torch.distributions.Independent(prior, 1),
            rtol=1e-6,
            atol=1e-6,
        )
        expected = -0.5 * (x.double() ** 2).sum(1) / variance - math.log(2 * math.pi * variance)
        torch.testing.assert_close(r.log_prob, expected, rtol=0, atol=1e-5)
        assert r.trace == "exact" and (r.stderr == 0).all() and r.finished.all()
        assert r.log_prob.dtype == r.stderr.dtype == r.columns.dtype == torch.float64


def test_default_trace_follows_the_dimension() -> None:
    assert log_likelihood(score, VP, torch.zeros(1, 64), rtol=1e-2, atol=1e-2).trace == "exact"
    r = log_likelihood(score, VP, torch.zeros(1, 65), rtol=1e-2, atol=1e-2)
    assert r.trace == "hutchinson" and len(r.columns) == 1


def test_one_probe_has_no_error_bar() -> None:
    assert log_likelihood(score, VP, data(), exact=False).stderr.isnan().all()


def test_columns_mean_and_error() -> None:
    r = log_likelihood(Mixing(), VP, data(), exact=False, probes=4, seed=0)
    assert r.columns.shape == (4, 9)
    torch.testing.assert_close(r.log_prob, r.columns.mean(0), rtol=0, atol=0)
    torch.testing.assert_close(r.stderr, r.columns.std(0) / 2, rtol=0, atol=1e-15)
    assert (r.stderr > 0).all()


def test_state_and_steps_do_not_depend_on_the_probes() -> None:
    runs = [
        log_likelihood(Mixing(), VP, data(), exact=False, probes=k, seed=s, gaussian=g)
        for k, s, g in ((1, 0, False), (3, 1, False), (2, 2, True))
    ]
    for r in runs[1:]:
        assert torch.equal(r.latent, runs[0].latent)
        assert torch.equal(r.nfe, runs[0].nfe)
        assert not torch.equal(r.log_prob, runs[0].log_prob)


def test_probes_are_those_of_the_contract() -> None:
    """first_probe counts on from the others, and each is one alone."""
    both = log_likelihood(Mixing(), VP, data(), exact=False, probes=3, seed=0)
    for k in range(3):
        one = log_likelihood(Mixing(), VP, data(), exact=False, seed=0, first_probe=k)
        assert torch.equal(one.columns[0], both.columns[k])


def test_probes_average_to_the_exact_trace() -> None:
    x = data(4)
    exact = log_likelihood(Mixing(), VP, x, exact=True)
    r = log_likelihood(Mixing(), VP, x, exact=False, probes=256, seed=0)
    assert ((r.log_prob - exact.log_prob).abs() <= 4 * r.stderr).all()
    xtrace = log_likelihood(Mixing(), VP, x, exact=False, estimator="xtrace", probes=8, seed=0)
    assert xtrace.trace == "xtrace" and len(xtrace.columns) == 4
    assert ((xtrace.log_prob - exact.log_prob).abs() <= 6 * xtrace.stderr).all()


@pytest.mark.parametrize("extra", [{}, {"product": "jvp"}, {"gaussian": True}, {"exact": True}])
def test_result_does_not_depend_on_the_batch(extra: dict[str, Any]) -> None:
    x, settings = data(), {**SETTINGS, **extra}
    whole = log_likelihood(Mixing(), VP, x, **settings)
    names = ("log_prob", "latent", "nfe", "columns")
    for batch_size in (1, 2, 4):
        r = log_likelihood(Mixing(), VP, x, batch_size=batch_size, **settings)
        for name in names:
            assert torch.equal(getattr(r, name), getattr(whole, name)), (batch_size, name)
    first = log_likelihood(Mixing(), VP, x[:4], **settings)
    rest = log_likelihood(Mixing(), VP, x[4:], first_sample=4, **settings)
    assert torch.equal(torch.cat([first.log_prob, rest.log_prob]), whole.log_prob)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    keyed = {k: v for k, v in settings.items() if k != "seed"}
    keys = noise.keys(4, len(x))
    r = log_likelihood(Mixing(), VP, x[order], keys=keys[order], **keyed)
    assert torch.equal(r.log_prob, whole.log_prob[order])
    assert r.seed is None and whole.seed == 4


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_backends_agree(backend: str) -> None:
    a = log_likelihood(Mixing(), VP, data(), **SETTINGS)
    b = log_likelihood(Mixing(), VP, data(), backend=backend, **SETTINGS)
    assert b.backend == backend
    torch.testing.assert_close(a.log_prob, b.log_prob, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "solver",
    [
        {"solver": "rk4", "steps": 60},
        {"solver": "heun", "steps": 400},
        {"solver": "euler", "steps": 2000},
        {"solver": "torchdiffeq:dopri5", "rtol": 1e-7, "atol": 1e-7},
        {"solver": "rk4", "schedule": "karras", "steps": 80},
    ],
    ids=str,
)
def test_solvers_agree(solver: dict[str, Any]) -> None:
    x = data(3, 2).double()
    common = {"exact": False, "seed": 0, "dtype": torch.float64}
    tight = log_likelihood(score, VP, x, rtol=1e-9, atol=1e-9, **common)
    other = log_likelihood(score, VP, x, **{**common, **solver})
    bound = 2e-2 if solver["solver"] == "euler" else 2e-3
    torch.testing.assert_close(other.log_prob, tight.log_prob, rtol=0, atol=bound)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3, 4), (2, 2, 2, 2), (2, 1, 2, 1, 3), (0, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for exact in (True, False):
        r = log_likelihood(score, VP, x, exact=exact, rtol=1e-2, atol=1e-2)
        assert r.log_prob.shape == shape[:1] and r.latent.shape == shape
        assert r.log_prob.isfinite().all()


def test_max_nfe_leaves_samples_on_the_way() -> None:
    with pytest.warns(UserWarning, match=r"^max_nfe: \d+ of 9 samples"):
        r = log_likelihood(Mixing(), VP, data(), max_nfe=60, **SETTINGS)
    assert not r.finished.all() and (r.nfe <= 60).all()
    assert r.log_prob[~r.finished].isnan().all() and r.stderr[~r.finished].isnan().all()
    assert r.latent.isfinite().all()
    whole = log_likelihood(Mixing(), VP, data(), **SETTINGS)
    assert torch.equal(r.log_prob[r.finished], whole.log_prob[r.finished])


def test_digits_hutchinson_and_exact_agree() -> None:
    net, held_out = shipped.digits(), digits().held_out[:2]
    x = held_out + (noise.uniform(0, held_out.shape, stream=noise.DEQUANTISATION) - 0.5) / 8
    loose = {"rtol": 1e-2, "atol": 1e-2}
    exact = log_likelihood(net, net.sde, x, **loose)
    r = log_likelihood(net, net.sde, x, exact=False, probes=16, seed=0, **loose)
    assert exact.trace == "exact" and exact.product == r.product == "vjp"
    assert ((r.log_prob - exact.log_prob).abs() <= 4 * r.stderr).all()


def test_caller_is_left_as_it_was() -> None:
    net = Mixing().train()
    x = data().requires_grad_()
    with torch.inference_mode():
        r = log_likelihood(net, VP, data(), **SETTINGS)
    assert torch.equal(r.log_prob, log_likelihood(net, VP, x, **SETTINGS).log_prob)
    assert net.training and net.weight.grad is None and net.weight.requires_grad
    assert x.grad is None and not r.log_prob.requires_grad


def test_warnings_are_for_max_nfe_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_likelihood(Mixing(), VP, data(), **SETTINGS)


class Detached(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return score(x.detach(), t)


def hostile(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(x.sum(1, keepdim=True) > 2.0, torch.nan, 1.0) * score(x, t)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x: expected a floating tensor"),
    ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x: expected a floating tensor"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape"),
    ({"x": torch.tensor([[0.0], [math.nan]])}, ValueError, "x: .* sample 1"),
    ({"probes": 0}, ValueError, "probes: "),
    ({"probes": 1.5}, TypeError, "probes: "),
    ({"exact": 1}, TypeError, "exact: "),
    ({"estimator": "hutch++"}, ValueError, "estimator: "),
    ({"estimator": "xtrace", "probes": 5}, ValueError, "probes: "),
    ({"estimator": "exact"}, ValueError, "estimator: "),
    ({"x": torch.zeros(3, 2).to_sparse()}, TypeError, "x: "),
    ({"x": torch.zeros(3, 2, device="meta")}, TypeError, "x: "),
    ({"gaussian": "yes"}, TypeError, "gaussian: "),
    ({"product": "backward"}, ValueError, "product: "),
    ({"first_probe": -1}, ValueError, "first_probe: "),
    ({"solver": "rk5"}, ValueError, "solver: "),
    ({"steps": 5}, ValueError, "steps: "),
    ({"rtol": 0.0}, ValueError, "rtol: "),
    ({"max_nfe": 0}, ValueError, "max_nfe: "),
    ({"prior": 3.0}, TypeError, "prior: "),
    ({"prior": torch.distributions.Normal(0.0, 1.0)}, ValueError, "prior: .*Independent"),
    ({"t_min": 0.0}, ValueError, "t"),
    ({"t_min": 2.0}, ValueError, "t_min: "),
    ({"keys": torch.zeros(2, dtype=torch.int64)}, ValueError, "keys: "),
    ({"keys": torch.zeros(9, dtype=torch.int64), "seed": 1}, ValueError, "keys: "),
    ({"cond": [1]}, TypeError, "cond: "),
    ({"backend": "gpu"}, ValueError, "backend: "),
    ({"dtype": torch.float16}, TypeError, "dtype: "),
    ({"model": Detached()}, ValueError, "model: "),
    ({"model": hostile}, ValueError, r"model: .*sample \d+ after \d+ evaluations \(t = "),
    ({"model": lambda x, t: x[:, :1]}, ValueError, "model: "),
    ({"model": 3}, TypeError, "model: "),
    ({"sde": "vp"}, TypeError, "sde: "),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    given = {"model": score, "sde": VP, "x": data(), "exact": False, **arguments}
    with pytest.raises(kind, match="^" + words):
        log_likelihood(**given)


def test_exact_trace_of_a_large_sample_says_how_large() -> None:
    limit = likelihood.MOST_EXACT
    with pytest.raises(ValueError, match=re.escape(f"exact: a sample has {limit + 1} dimensions")):
        log_likelihood(score, VP, torch.zeros(1, limit + 1), exact=True)


def test_times_that_end_at_1_but_are_none() -> None:
    """An EDM SDE up to 1 begins at its sigma_min, a ladder of two levels at level 0."""
    edm = EDMSDE(0.01, 1.0)
    a = log_likelihood(score, edm, data(2))
    assert torch.equal(a.log_prob, log_likelihood(score, edm, data(2), t_min=0.01).log_prob)
    ladder = sbm_fast.NCSNLadder([0.1, 1.0])
    assert log_likelihood(score, ladder, data(2)).finished.all()


@pytest.mark.parametrize("extra", [{"exact": True}, {"exact": False, "probes": 3}])
def test_compiled_networks(extra: dict[str, Any]) -> None:
    net = Mixing()
    plain = log_likelihood(net, VP, data(4), seed=0, rtol=1e-3, atol=1e-3, **extra)
    compiled = torch.compile(net, backend="aot_eager")
    r = log_likelihood(compiled, VP, data(4), seed=0, rtol=1e-3, atol=1e-3, **extra)
    torch.testing.assert_close(r.log_prob, plain.log_prob, rtol=0, atol=1e-4)


def test_forward_mode_in_threads() -> None:
    def run(_: int) -> Tensor:
        return log_likelihood(Mixing(), VP, data(), product="jvp", **SETTINGS).log_prob

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_priors_get_a_copy_and_no_empty_batch() -> None:
    def greedy(x: Tensor) -> Tensor:
        assert len(x)
        total = -x.double().square().sum(1) / 2
        x.zero_()
        return total

    assert log_likelihood(score, VP, data(0), prior=greedy).log_prob.shape == (0,)
    assert log_likelihood(score, VP, data(3), prior=greedy).latent.abs().min() > 0
    with pytest.raises(ValueError, match=r"^prior: .*NaN for 3 samples"):
        log_likelihood(score, VP, data(3), prior=lambda x: x[:, 0] * math.nan)


def test_nan_is_reported_before_max_nfe() -> None:
    with pytest.raises(ValueError, match=r"^model: .*not finite"):
        log_likelihood(lambda x, t: x * math.nan, VP, data(), max_nfe=60, **SETTINGS)


def test_warning_points_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="^max_nfe") as caught:
        log_likelihood(score, VP, data(), max_nfe=20, **SETTINGS)
        sbm_fast.encode(score, VP, data(), max_nfe=20)
    assert [w.filename for w in caught] == [__file__, __file__]


def test_package_shows_it() -> None:
    assert sbm_fast.log_likelihood is log_likelihood
    assert sbm_fast.LikelihoodResult is likelihood.LikelihoodResult
