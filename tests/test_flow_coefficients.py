"""The probability flow over λ = ln(σ/m): its coefficients, levels, labels, ends and grids."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from probability_flow_cases import (
    CONTINUOUS,
    continuous,
    draw,
    elementwise,
    every_prediction,
    every_sde,
)

from sbm_fast import parameterization
from sbm_fast.encoding import encode
from sbm_fast.flow import ProbabilityFlow
from sbm_fast.model import TIMES, ScoreModel
from sbm_fast.sde import EDMSDE, SDE, VPSDE, DDPMSchedule, Ladder, NCSNLadder, SubVPSDE


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
