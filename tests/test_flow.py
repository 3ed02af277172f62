"""The probability flow as one ODE over λ = ln(σ/m): coefficients, levels, labels, networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import likelihood_cases as data
import numpy as np
import pytest
import sampling_cases as cases
import torch
from ode_cases import NoHostReads
from torch import Tensor, nn

from sbm_fast import parameterization, sample
from sbm_fast.backend import choose_backend
from sbm_fast.encoding import encode
from sbm_fast.flow import FlowSystem, ProbabilityFlow
from sbm_fast.model import TIMES, ScoreModel
from sbm_fast.noise import keys
from sbm_fast.parameterization import PREDICTIONS
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule, Ladder, NCSNLadder, SubVPSDE

LADDERS: list[SDE] = [
    DDPMSchedule.linear(),
    DDPMSchedule.cosine(50),
    NCSNLadder.geometric(50.0, 0.01, 30),
    NCSNLadder([0.02, 0.03, 0.5, 7.0]),
]
CONTINUOUS: list[SDE] = [VESDE(), VPSDE(), SubVPSDE(), EDMSDE()]
ALL = [*CONTINUOUS, *LADDERS]
KERNELS = choose_backend("auto", torch.device("cpu"))


def name(value: object) -> str:
    levels = f" {value.levels}" if isinstance(value, Ladder) else ""
    return type(value).__name__ + levels if isinstance(value, SDE) else str(value)


every_sde = pytest.mark.parametrize("sde", ALL, ids=name)
continuous = pytest.mark.parametrize("sde", CONTINUOUS, ids=name)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@every_prediction
@pytest.mark.parametrize("sigma_data", [0.3, 1.0, 2.5])
def test_coefficients_are_those_of_the_noise(predicts: str, sigma_data: float) -> None:
    """du/dλ = s(ε − s u) with ε from `parameterization.noise`, and c_in·u what the network gets."""
    x, output = 0.7, -0.4
    for r in np.geomspace(1e-3, 1e3, 13).tolist():
        for m in (1.0, 0.6, 1e-4):
            scale = m * math.hypot(r, sigma_data)
            u, s = x / scale, r / math.hypot(r, sigma_data)
            level = (predicts, m, m * r, sigma_data)
            eps = parameterization.noise(*level)
            form = parameterization.flow(predicts, np.float64(m), np.float64(r), sigma_data)
            slope = form.x * u + form.F * output
            truth = s * (eps.x * x + eps.F * output - s * u)
            size = s * (abs(eps.x * x) + abs(eps.F * output) + s * u)
            assert abs(slope - truth) <= 1e-14 * size
            fed = parameterization.input_scale(*level) * x
            assert form.c_in * u == pytest.approx(fed, rel=1e-14, abs=0)


@every_prediction
def test_coefficients_keep_their_digits(predicts: str) -> None:
    """Against decimals of 80 digits, from the predictions' definitions, at 10⁻⁸ and 10⁸ too."""
    with localcontext() as context:
        context.prec = 80
        for r in (1e-8, 1e-5, 0.03, 1.0, 40.0, 1e5, 1e8):
            for m, sd in ((1.0, 0.5), (0.3, 0.999), (1e-4, 2.0)):
                form = parameterization.flow(predicts, np.float64(m), np.float64(r), sd)
                M, R, S = Decimal(m), Decimal(r), Decimal(sd)
                sigma = M * R
                scale = (sigma**2 + (M * S) ** 2).sqrt()
                n, s = (M**2 + sigma**2).sqrt(), sigma / scale
                skip = S**2 / (S**2 + R**2)
                # ε = p x + q F; x = scale·u
                p, q = {
                    "score": (Decimal(0), -sigma),
                    "eps": (Decimal(0), Decimal(1)),
                    "x0": (1 / sigma, -M / sigma),
                    "v": (sigma / n**2, M / n),
                    "edm": ((1 - skip) / sigma, -R * S / (S**2 + R**2).sqrt() * M / sigma),
                }[predicts]
                exact = (s * (p * scale - s), s * q, 1 / scale if predicts == "edm" else 1)
                if predicts == "edm":
                    assert exact[0] < Decimal("1e-60") and form.x == 0
                else:
                    assert float(form.x) == pytest.approx(float(exact[0]), rel=3e-15, abs=0)
                assert float(form.F) == pytest.approx(float(exact[1]), rel=3e-15, abs=0)
                assert float(form.c_in) == pytest.approx(float(exact[2] * scale), rel=3e-15, abs=0)


@continuous
def test_one_ode_is_equation_13_of_every_sde(sde: SDE) -> None:
    """(dx/dt)/h − u d ln h/dt over dλ/dt, with dx/dt = f x − ½ g² ∇ log p."""
    x, score, sigma_data = 0.8, -1.7, 0.6
    for u in (0.02, 0.3, 0.99):
        t = u * sde.t_max
        m, sigma, f, g = (
            float(of(t)) for of in (sde.mean_scale, sde.std, sde.drift_coef, sde.diffusion)
        )
        h = math.hypot(sigma, m * sigma_data)
        along, growth = g**2 / (2 * sigma**2), f + g**2 / (2 * h**2)
        if isinstance(sde, SubVPSDE):  # its g is that of σ², in the same way
            assert sde.diffusion(t) ** 2 == pytest.approx(
                2 * sigma * (float(sde.std(t * (1 + 1e-6))) - float(sde.std(t * (1 - 1e-6))))
                / (2e-6 * t) - 2 * f * sigma**2, rel=1e-4
            )  # fmt: skip
        truth = ((f * x - 0.5 * g**2 * score) / h - x / h * growth) / along
        form = parameterization.flow("score", np.float64(m), np.float64(sigma / m), sigma_data)
        assert form.x * x / h + form.F * score == pytest.approx(truth, rel=1e-10)


@every_prediction
def test_coefficients_of_tensors_are_those_of_arrays(predicts: str) -> None:
    r = np.geomspace(1e-4, 1e4, 60).reshape(3, 20)
    m = 1 / np.sqrt(1 + r**2)
    of_arrays = parameterization.flow(predicts, m, r, 0.7)
    of_tensors = parameterization.flow(predicts, torch.tensor(m), torch.tensor(r), 0.7)
    for part in ("x", "F", "c_in"):
        there = getattr(of_tensors, part)
        assert there.dtype == torch.float64 and there.shape == r.shape
        np.testing.assert_allclose(there.numpy(), getattr(of_arrays, part), rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match=r"^predicts: expected one of 'score'"):
        parameterization.flow("noise", m, r)


def levels_of(sde: SDE) -> np.ndarray:
    """Ratios from end to end, and on a ladder those of its levels and between them."""
    low, high = sde.nsr_range
    r = np.geomspace(max(low, 1e-6), high, 41)
    r[-1], r[0] = high, max(low, 1e-6)
    if isinstance(sde, Ladder):
        index = np.arange(sde.levels, dtype=np.float64)
        r = np.concatenate([r, sde.nsr(index), sde.nsr(index[:-1] + 0.3)])
    return r


@every_sde
def test_levels(sde: SDE) -> None:
    r = levels_of(sde)
    t, m = sde.level(r)
    np.testing.assert_allclose(t, sde.time_at_nsr(r), rtol=1e-13, atol=0)
    np.testing.assert_allclose(m, sde.mean_scale(sde.time_at_nsr(r)), rtol=1e-12, atol=0)
    if isinstance(sde, Ladder):  # a level's own ratio gives its index, to the bit
        n = sde.levels
        assert t[41 : 41 + n].tolist() == list(range(n))
    there, scale = sde.level(torch.tensor(r).reshape(-1, 1))
    assert there.dtype == scale.dtype == torch.float64 and there.shape == (len(r), 1)
    np.testing.assert_allclose(there.numpy()[:, 0], t, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(scale.numpy()[:, 0], m, rtol=1e-14, atol=0)
    if isinstance(sde, Ladder):
        assert there[41 : 41 + n, 0].tolist() == list(range(n))


@every_sde
def test_levels_a_rounding_outside(sde: SDE) -> None:
    low, high = sde.nsr_range
    r = torch.tensor([low * (1 - 3e-16), high * (1 + 3e-16)], dtype=torch.float64)
    for values in (r, r.numpy()):
        t, m = sde.level(values)
        assert float(t[0]) == 0.0 and float(t[1]) == pytest.approx(sde.t_max, rel=1e-15)
        assert float(t[1]) <= sde.t_max and np.isfinite(np.asarray(m)).all()


def test_a_ladder_of_one_level() -> None:
    for ladder in (NCSNLadder([0.4]), DDPMSchedule([0.1])):
        r = torch.full((3,), ladder.nsr_range[0], dtype=torch.float64)
        t, m = ladder.level(r)
        assert t.tolist() == [0, 0, 0]
        assert m.tolist() == pytest.approx([float(ladder.mean_scale(0))] * 3, rel=1e-15)


@every_sde
@pytest.mark.parametrize("time", [*TIMES, "function"])
def test_labels_of_tensors_are_those_of_arrays(sde: SDE, time: str) -> None:
    if isinstance(sde, Ladder) if time == "999t" else time == "index" and sde in CONTINUOUS:
        return
    function: Any = (lambda t: np.sqrt(t + 1)) if time == "function" else time
    model, r = ScoreModel(cases.network, "eps", function, sde), levels_of(sde)
    low = float(r[0])
    t, _ = sde.level(r)
    labels = model.labels(t, r)
    there = model.labels(*(torch.tensor(v).reshape(1, -1) for v in (t, r)))
    assert there.dtype == torch.float64 and there.shape == (1, len(r))
    np.testing.assert_allclose(there.numpy()[0], labels, rtol=1e-15, atol=1e-15)
    for i in range(0, len(r), 7):
        run = EDMSDE(low / 2, 2 * float(r.max()))  # its time is the ratio
        assert model.match(run, float(r[i])).label == pytest.approx(labels[i], rel=1e-12, abs=1e-12)


def test_a_function_of_time_gets_one_dimension_of_times_that_are_its_own() -> None:
    seen = []

    def label(t: np.ndarray) -> list[float]:
        assert t.dtype == np.float64 and t.ndim == 1
        seen.extend(t.tolist())
        return [math.log(v) for v in t]

    sde, x = EDMSDE(0.01, 20.0), draw(5, 3).float()
    x[0] = 40.0  # takes other steps
    by_function = encode(ScoreModel(elementwise, "eps", label), sde, x, batch_size=3)
    by_name = encode(ScoreModel(elementwise, "eps", "log_sigma"), sde, x, batch_size=3)
    torch.testing.assert_close(by_function, by_name, rtol=1e-5, atol=1e-5)
    assert min(seen) == pytest.approx(0.01) and max(seen) == pytest.approx(20.0)
    with pytest.raises(ValueError, match=r"^time: expected one finite label each at t = "):
        encode(ScoreModel(elementwise, "eps", lambda t: t[:1]), sde, x)


def elementwise(x: Tensor, label: Tensor, shift: Any = 0.25) -> Tensor:
    """Smooth, sample by sample, of exactly rounded operations."""
    time = label.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    shift = torch.as_tensor(shift, dtype=x.dtype)
    shift = shift.reshape(-1, *[1] * (x.dim() - 1)) if shift.dim() else shift
    return (x + shift) / (1.0 + time * time + 0.1 * x * x)


def exact(sde: SDE, predicts: str, sigma_data: float, std: float, mean: float = 0.0) -> ScoreModel:
    """The network of data ½ N(−mean, std²) + ½ N(mean, std²), in every dimension."""

    def net(x: Tensor, label: Tensor) -> Tensor:
        r = label.double().reshape(-1, *[1] * (x.dim() - 1))
        m = data.mean_scale(sde, r)
        h = m * torch.sqrt(r**2 + sigma_data**2)
        state = x.double() * h if predicts == "edm" else x.double()
        variance = std**2 + r**2
        score = (mean * torch.tanh(mean * state / m / variance) - state / m) / (m * variance)
        return data.output(predicts, state, score, m, m * r, h, sigma_data).to(x.dtype)

    return ScoreModel(net, predicts, "sigma", sde, None, sigma_data)


def gaussian(std: float, sde: SDE, predicts: str, sigma_data: float) -> ScoreModel:
    return exact(sde, predicts, sigma_data, std)


def growth(sde: SDE, std: float, low: float, high: float) -> float:
    """Of the standard deviation of N(0, std²) data on the way from time low to high."""
    ends = [math.hypot(float(sde.mean_scale(t)) * std, float(sde.std(t))) for t in (low, high)]
    return ends[1] / ends[0]


@continuous
@every_prediction
def test_gaussian_data_of_the_assumed_scale_stand_still(sde: SDE, predicts: str) -> None:
    std, x = 0.8, draw(4, 3)
    model = gaussian(std, sde, predicts, std)
    flow = ProbabilityFlow(model, sde)
    system = FlowSystem(flow, keys(0, 4), KERNELS, torch.float64)
    system.select(torch.arange(4))
    at = flow.at(torch.linspace(flow.data.position, flow.prior.position, 4, dtype=torch.float64))
    out = torch.empty_like(x)
    system.slope(at, x, at.c_in[:, None] * x, out, integrals=False)
    assert float(out.abs().max()) < 1e-11
    latents, info = encode(model, sde, x, dtype=torch.float64, return_info=True)
    scale = growth(sde, std, sde.t_min, sde.t_max)
    torch.testing.assert_close(latents, x * scale, rtol=1e-9, atol=0)
    assert int(info.nfe.max()) <= 25  # steps that grow tenfold


@continuous
@every_prediction
def test_what_depends_on_time_alone(sde: SDE, predicts: str) -> None:
    """(p, q, r), c_in and the label; where the data are those of σ_d the divergence is 0 too."""
    std, t_min = 0.8, max(sde.t_min, 1e-3)
    flow = ProbabilityFlow(gaussian(std, sde, predicts, std), sde, t_min)
    position = torch.linspace(flow.data.position, flow.prior.position, 5, dtype=torch.float64)
    r = torch.exp(position)
    at = flow.at(position.expand(2, 5))
    form = parameterization.flow(predicts, data.mean_scale(sde, r), r, std)
    assert at.coef.shape == (2, 5, 3) and at.coef.dtype == torch.float64
    expected = torch.stack([form.x, form.F, form.F * form.c_in], dim=1)
    torch.testing.assert_close(at[1].coef, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(at[1].c_in, form.c_in, rtol=1e-12, atol=0)
    torch.testing.assert_close(at[0].label, r, rtol=1e-12, atol=0)
    torch.testing.assert_close(at[0].steering, r**2 / (std**2 + r**2), rtol=1e-12, atol=0)
    one = torch.ones(5, 3, dtype=torch.float64)
    slope_of_network = flow.model(one, r)[:, 0]  # it is linear
    p, _, scale = at[0].coef.T
    assert float((p + scale * slope_of_network).abs().max()) < 1e-9


PAIRS = list(zip([*CONTINUOUS, VPSDE(0.2, 15.0)], PREDICTIONS, strict=True))


@pytest.mark.parametrize(("sde", "predicts"), PAIRS, ids=name)
def test_gaussian_data_of_another_scale(sde: SDE, predicts: str) -> None:
    model, x = gaussian(0.3, sde, predicts, 0.8), 0.3 * draw(4, 3)
    errors, scale = [], growth(sde, 0.3, sde.t_min, sde.t_max)
    for tol in (1e-4, 1e-7):
        latents = encode(model, sde, x, rtol=tol, atol=tol, dtype=torch.float64)
        errors.append(float((latents / scale - x).abs().max()))
    assert errors[0] < 2e-3 and errors[1] < 2e-6


def first_time(sde: SDE) -> float:
    return max(1e-3, sde.t_min)


@continuous
def test_flow_is_that_of_the_plans(sde: SDE) -> None:
    """For every prediction; among each other they agree to rounding, at any tolerance."""
    start = sde.prior_std * draw(4, 2, seed=3)
    loose = {"rtol": 2e-5, "atol": 2e-5}
    plan = sample(exact(sde, "score", 0.7, std=0.3, mean=1.0), sde, (4, 2), method="ode",
                  solver="rk4", steps=50, schedule="log_snr", x_init=start,
                  dtype=torch.float64, t_min=first_time(sde))  # fmt: skip
    found = [
        sample(exact(sde, predicts, 0.7, std=0.3, mean=1.0), sde, (4, 2), method="ode",
               solver="dopri5", x_init=start, dtype=torch.float64, t_min=first_time(sde), **loose)
        for predicts in PREDICTIONS
    ]  # fmt: skip
    torch.testing.assert_close(found[0], plan, rtol=0, atol=1e-3)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("predicts", ["score", "edm"])
def test_a_network_under_another_sde(predicts: str) -> None:
    """A VP network under every SDE takes x/m one way between two noise levels, to rounding."""
    y, own = draw(3, 2), VPSDE()
    model = exact(own, predicts, 0.7, std=0.3, mean=1.0)

    def carried(run: SDE, t_min: float, t_max: float) -> Tensor:
        ends = [float(run.mean_scale(t)) for t in (t_min, t_max)]
        z = encode(model, run, ends[0] * y, t_min=t_min, t_max=t_max, rtol=1e-4, atol=1e-4,
                   dtype=torch.float64)  # fmt: skip
        return z / ends[1]

    def times(run: SDE, low: float, high: float) -> tuple[float, float]:
        return float(run.time_at_nsr(low)), float(run.time_at_nsr(high))

    expected = carried(own, *times(own, 0.03, 40.0))
    for run in (EDMSDE(), VESDE(), SubVPSDE()):
        found = carried(run, *times(run, 0.03, 40.0))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    for ladder in (LADDERS[0], LADDERS[2]):
        t_min, t_max = (round(t) for t in times(ladder, 0.03, 40.0))
        there = times(own, float(ladder.nsr(t_min)), float(ladder.nsr(t_max)))
        torch.testing.assert_close(
            carried(ladder, t_min, t_max), carried(own, *there), rtol=1e-8, atol=1e-9
        )


def ladder_network(ladder: Ladder, std: float) -> ScoreModel:
    """ε of N(0, std²) data under a ladder, from the index; between levels ln nsr is linear."""
    table = torch.tensor(np.log(ladder.nsr(np.arange(ladder.levels, dtype=np.float64))))

    def net(x: Tensor, index: Tensor) -> Tensor:
        index = index.double()
        assert (index >= 0).all() and (index <= ladder.levels - 1).all()
        below = index.floor().clamp(max=ladder.levels - 2).long()
        r = torch.exp(table[below] + (index - below) * (table[below + 1] - table[below]))
        r = r.reshape(-1, *[1] * (x.dim() - 1))
        m = 1 / torch.sqrt(1 + r**2) if isinstance(ladder, DDPMSchedule) else 1.0
        return r / (m * (std**2 + r**2)) * x

    return ScoreModel(net, "eps", "index", ladder)


@pytest.mark.parametrize("ladder", LADDERS, ids=name)
def test_networks_of_ladders(ladder: Ladder) -> None:
    """Under their ladder, and under continuous SDEs between the ladder's levels."""
    std, x = 0.4, 0.4 * draw(3, 2)
    model, tight = ladder_network(ladder, std), {"rtol": 1e-7, "atol": 1e-7}
    low, high = ladder.nsr_range
    for run in (ladder, VPSDE(), EDMSDE(low / 2, 2 * high)):
        inside = 1.7 * low, min(0.7 * high, 150.0)
        t_min, t_max = (float(run.time_at_nsr(r)) for r in inside)
        if isinstance(run, Ladder):
            t_min, t_max = run.t_min, run.t_max
        z = encode(model, run, x, t_min=t_min, t_max=t_max, dtype=torch.float64, **tight)
        torch.testing.assert_close(
            z, x * growth(run, std, t_min, t_max), rtol=2e-6, atol=1e-7 * float(run.std(t_max))
        )
    z = encode(model, ladder, x, dtype=torch.float64, **tight)
    back = sample(model, ladder, (3, 2), method="ode", solver="dopri5", dtype=torch.float64,
                  x_init=z, **tight)  # fmt: skip
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


def encoded(net: Any, x: Tensor, **more: Any) -> Tensor:
    """Under a VE SDE of few steps."""
    null_cond = more.pop("null_cond", None)
    model = ScoreModel(net, "eps", "sigma", null_cond=null_cond)
    return encode(model, VESDE(0.1, 5.0), x, rtol=1e-4, atol=1e-4, **more)


def uneven(n: int = 9, *shape: int) -> Tensor:
    """Samples that take different numbers of steps."""
    x = draw(n, *(shape or (3,))).float()
    scale = torch.logspace(-0.5, 2.5, n)[torch.randperm(n, generator=torch.Generator())]
    return x * scale.reshape(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("batch_size", [None, 4, 1])
def test_conditioning_follows_its_sample(batch_size: int | None) -> None:
    x, shift = uneven(), torch.linspace(-40, 40, 9)
    z, info = encoded(elementwise, x, cond={"shift": shift}, return_info=True,
                      batch_size=batch_size)  # fmt: skip
    assert len(set(info.nfe.tolist())) >= 3
    alone = [encoded(elementwise, x[[i]], cond={"shift": float(shift[i])}) for i in range(9)]
    assert torch.equal(z, torch.cat(alone))


def test_conditioning_that_is_no_sample_s_is_left_alone() -> None:
    x, seen = uneven(), []

    def net(x: Tensor, label: Tensor, number: float, vector: Tensor, names: str | None) -> Tensor:
        seen.append((number, vector.shape, names))
        return elementwise(x, label, shift=number + vector.sum())

    vector = torch.tensor([0.5, 0.25, 0.5, 0.25])
    z = encoded(net, x, cond={"number": 0.5, "vector": vector, "names": None}, batch_size=5)
    assert torch.equal(z, encoded(elementwise, x, cond={"shift": 2.0}))
    assert set(seen) == {(0.5, (4,), None)}
    assert torch.equal(z, encoded(elementwise, x, cond={"shift": torch.tensor(2.0)}, batch_size=2))
    assert torch.equal(z, encoded(elementwise, x, cond={"shift": torch.tensor([2.0])}))


def guided(x_init: Tensor, solver: str, **more: Any) -> Any:
    net = more.pop("net", elementwise)
    model = ScoreModel(net, "eps", "sigma", null_cond=more.pop("null_cond", {"shift": -0.5}))
    return sample(model, VESDE(0.1, 5.0), tuple(x_init.shape), method="ode", solver=solver,
                  x_init=x_init, **more)  # fmt: skip


def test_guidance_is_that_of_the_plans() -> None:
    start, w = uneven(), torch.linspace(-1, 3, 9)
    cond = {"shift": torch.linspace(-1, 1, 9)}
    x, info = guided(start, "dopri5", guidance=w, cond=cond, return_info=True)
    plan = guided(start, "rk4", guidance=w, cond=cond, steps=80, schedule="log_snr")
    torch.testing.assert_close(x, plan, rtol=1e-4, atol=2e-4)
    for batch_size in (1, 4):
        parts = guided(start, "dopri5", guidance=w, cond=cond, batch_size=batch_size)
        assert torch.equal(parts, x)
    assert info.nfe == int(info.nfe_of.max()) and (info.nfe_of % 2 == 0).all()
    # null_cond may belong to the samples too
    per_sample = guided(start, "dopri5", guidance=w, cond=cond, batch_size=4,
                        null_cond={"shift": torch.full((9,), -0.5)})  # fmt: skip
    assert torch.equal(per_sample, x)
    one = guided(start, "dopri5", guidance=1.0, cond=cond)
    plain, of_plain = guided(start, "dopri5", cond=cond, return_info=True)
    torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
    assert (of_plain.nfe_of % 6 == 1).all()


def test_guidance_of_one_memory_is_refused() -> None:
    kept = torch.zeros(9, 3)
    with pytest.raises(ValueError, match=r"^model: both outputs under guidance are the same"):
        guided(uneven(), "dopri5", guidance=2.0, net=lambda x, t, shift=0.0: kept)


class Doubled(nn.Module):
    def forward(self, x: Tensor, label: Tensor, shift: Any = 0.25) -> Tensor:
        return torch.cat([elementwise(x, label, shift), torch.full_like(x, math.nan)], dim=1)


def test_a_learned_variance_is_left_out() -> None:
    x = uneven(5, 2, 3)
    for net, variance in ((elementwise, None), (Doubled(), "learned_range")):
        model = ScoreModel(net, "eps", "sigma", variance=variance, null_cond={"shift": 0.0})
        z = encode(model, VESDE(0.1, 5.0), x, rtol=1e-4, atol=1e-4)
        y = sample(model, VESDE(0.1, 5.0), (5, 2, 3), method="ode", solver="dopri5", guidance=2.0,
                   x_init=x, rtol=1e-4, atol=1e-4)  # fmt: skip
        if variance is None:
            expected = z, y
        assert torch.equal(z, expected[0]) and torch.equal(y, expected[1])


BAD_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "shape": lambda x, t: x[:, :1],
    "more": lambda x, t: torch.cat([x, x], 1),
    "dtype": lambda x, t: x.long(),
    "none": lambda x, t: None,
    "tuple": lambda x, t: (x, t),
    "meta": lambda x, t: x.to("meta"),
    "array": lambda x, t: x.numpy(),
    "complex": lambda x, t: x * 1j,
    "in place": lambda x, t: x.mul_(-1.0),
    "time in place": lambda x, t: x * t.mul_(2.0)[:, None],
}


@pytest.mark.parametrize("solver", ["dopri5", "heun", "torchdiffeq:dopri5"])
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
@pytest.mark.parametrize("predicts", ["eps", "edm"])
def test_outputs_that_are_none(kind: str, solver: str, predicts: str) -> None:
    model = ScoreModel(BAD_OUTPUTS[kind], predicts)
    with pytest.raises(ValueError, match=r"^model: (expected|the network changed its input)"):
        encode(model, VESDE(0.1, 5.0), uneven(), solver=solver)


@pytest.mark.parametrize("net", [elementwise, lambda x, t: None, lambda x, t: x[..., :1]])
def test_outputs_that_are_no_learned_variance(net: Any) -> None:
    model = ScoreModel(net, "eps", variance="learned_range")
    with pytest.raises(ValueError, match=r"^model: expected a floating tensor of shape \(9, 6\)"):
        encode(model, VESDE(0.1, 5.0), uneven())
    with pytest.raises(ValueError, match=r"^model: .*expected samples with channels"):
        encode(model, VESDE(0.1, 5.0), uneven()[:, 0])


def test_outputs_may_be_views_and_kept_memory() -> None:
    x = uneven()
    kept: dict[int, Tensor] = {}

    def keeps(x: Tensor, label: Tensor) -> Tensor:
        out = kept.setdefault(len(x), torch.empty_like(x))
        return out.copy_(elementwise(x, label))

    def transposed(x: Tensor, label: Tensor) -> Tensor:
        return elementwise(x, label).t().contiguous().t()

    expected = encoded(elementwise, x, batch_size=4)
    assert torch.equal(encoded(keeps, x, batch_size=4), expected)
    assert torch.equal(encoded(transposed, x, batch_size=4), expected)
    # An input that is given back, and one value for all
    identity = encoded(lambda x, t: x, x)
    assert torch.equal(identity, encoded(lambda x, t: x.clone(), x))
    zero = torch.zeros(1, 1)
    assert torch.equal(
        encoded(lambda x, t: zero.expand(x.shape), x), encoded(lambda x, t: 0 * x, x)
    )


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_network_gets_its_own_dtype(net_dtype: torch.dtype) -> None:
    net, x = cases.Net(net_dtype), uneven()
    model = ScoreModel(net, "eps", "sigma")
    run: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    z = encode(model, VESDE(0.1, 5.0), x, **run)
    label_dtype = torch.float64 if net_dtype == torch.float64 else torch.float32
    assert z.dtype == torch.float32 and set(net.seen) == {(net_dtype, label_dtype)}
    net.scale.data = net.scale.detach().double()
    exact = encode(model, VESDE(0.1, 5.0), x, dtype=torch.float64, **run)
    assert exact.dtype == torch.float64
    bound = 200 * torch.finfo(net_dtype).eps + 5e-3
    assert float((z - exact).abs().max()) <= bound * float(exact.abs().max())
    fixed = encode(model, VESDE(0.1, 5.0), x, solver="rk4", steps=9, net_dtype=net_dtype)
    assert net.seen[-1] == (net_dtype, label_dtype) and fixed.isfinite().all()


def test_modes_are_put_back_and_no_gradient_is_kept() -> None:
    net = cases.Net()
    net.inner[1].eval()
    before = [m.training for m in net.modules()]
    assert before[0] and not before[-1]
    z = encode(ScoreModel(net, "eps", "sigma"), VESDE(0.1, 5.0), uneven().requires_grad_())
    assert [m.training for m in net.modules()] == before
    assert not z.requires_grad and net.scale.grad is None
    with pytest.raises(ValueError, match="not finite"):
        encode(ScoreModel(net, "eps"), VESDE(0.1, 5.0), uneven(), cond={"label": math.nan})
    assert [m.training for m in net.modules()] == before


def poisoned(sample: int, above: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Not finite for one sample above a noise level."""

    def net(x: Tensor, sigma: Tensor, number: Tensor) -> Tensor:
        bad = (number == sample) & (sigma > above)
        return torch.where(bad[:, None], math.inf, elementwise(x, sigma))

    return net


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "torchdiffeq:dopri5"])
def test_what_is_not_finite_is_reported(solver: str) -> None:
    x, cond = uneven(), {"number": torch.arange(9)}
    sde, steps = VESDE(0.1, 5.0), 20 if solver == "rk4" else None
    model = ScoreModel(poisoned(6, 1.3), "eps", "sigma")
    pattern = (
        r"^model: its outputs, or their derivatives, are not finite for 1 samples, first for "
        r"sample 6 after (\d+) evaluations \(t = (.*)\)$"
    )
    with pytest.raises(ValueError, match=pattern) as caught:
        encode(model, sde, x, solver=solver, steps=steps, batch_size=4, cond=cond)
    t = float(str(caught.value).split("t = ")[1].rstrip(")"))
    where = float(sde.time_at_nsr(1.3))
    # The beginning of rk4's step; with torchdiffeq an evaluation of the step that fails.
    slack = {"dopri5": 1e-5, "rk4": 1 / 20, "torchdiffeq:dopri5": 0.2}[solver]
    assert abs(t - where) <= slack


@every_sde
def test_ends(sde: SDE) -> None:
    model = ScoreModel(elementwise, "eps", "sigma", sigma_data=0.4)
    t_min, t_max = (1, sde.t_max - 1) if isinstance(sde, Ladder) else (sde.t_min, sde.t_max)
    flow = ProbabilityFlow(model, sde, t_min, t_max)
    for end, t in ((flow.data, t_min), (flow.prior, t_max)):
        m, sigma = float(sde.mean_scale(t)), float(sde.std(t))
        assert end.t == t and end.position == pytest.approx(math.log(sigma / m), rel=1e-12)
        assert end.scale == pytest.approx(math.sqrt(sigma**2 + (0.4 * m) ** 2), rel=1e-14)
        assert flow.time_of(end.position) == pytest.approx(t, rel=1e-9)
    assert flow.time_of(-80.0) < 1e-30 and flow.time_of(80.0) == pytest.approx(sde.t_max)
    whole = ProbabilityFlow(model, sde, max(sde.t_min, 1e-3) if sde.t_min else None)
    assert whole.prior.t == sde.t_max


def test_grids() -> None:
    model = ScoreModel(elementwise, "eps", "sigma")
    flow = ProbabilityFlow(model, VPSDE())
    ends = flow.data.position, flow.prior.position
    assert flow.grid(None, None, 7) == pytest.approx(np.linspace(*ends, 8).tolist(), rel=1e-14)
    for schedule in ("uniform", "karras", "log_snr", "quadratic", np.linspace(1.0, 1e-3, 5)):
        for grid in (flow.grid(4, schedule, 9), flow.grid(None, schedule, 4)):
            assert len(grid) == 5 and (grid[0], grid[-1]) == ends and grid == sorted(grid)
    line = flow.grid(4, "log_snr", 9)
    assert line == pytest.approx(flow.grid(4, None, 9), rel=1e-12)
    t = [flow.time_of(v) for v in flow.grid(4, "uniform", 9)]
    assert t == pytest.approx(np.linspace(1e-3, 1.0, 5).tolist(), rel=1e-9)
    ladder = ProbabilityFlow(ScoreModel(elementwise, "eps", "index"), DDPMSchedule.linear(40))
    assert len(ladder.grid(None, None, 50)) == 51
    assert (
        len(ladder.grid(None, "uniform", 50)) == 40 and len(ladder.grid(None, "uniform", 9)) == 10
    )


def test_the_host_reads_nothing_for_a_slope() -> None:
    x = uneven().float()
    for predicts in PREDICTIONS:
        for sde in (VPSDE(), DDPMSchedule.linear(100)):
            model = ScoreModel(elementwise, predicts, "sigma", sde)
            flow = ProbabilityFlow(model, sde)
            cond = {"shift": torch.linspace(-1, 1, 9)}
            system = FlowSystem(flow, keys(0, 9), KERNELS, torch.float32, cond)
            position = torch.linspace(flow.data.position, flow.prior.position, 9).double()
            index = torch.tensor([4, 2, 8])
            with NoHostReads():
                system.select(index)
                at = flow.at(position[None].expand(3, -1))[1]
                system.select(torch.arange(9))
                system.slope(at, x, x, torch.empty_like(x), integrals=False)
