"""Linear forms and the builder: algebra, what rows a user may write, and their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plan_reference import GAUSSIAN, WORLDS, Network, Noise, interpret, score_model

from sbm_fast.methods import Lin, PlanBuilder
from sbm_fast.plan import D, F, X, Z

WORLD = WORLDS["vp"]


def builder(predicts: str = "eps", **options: object) -> PlanBuilder:
    model = score_model(WORLD, predicts)
    return PlanBuilder(model, WORLD.sde, method="mine", **options)  # type: ignore[arg-type]


def test_algebra_of_forms() -> None:
    x, z, h = Lin({X: 1.0}), PlanBuilder.z, PlanBuilder.H(1)
    form = (2 * x - z * 3.0 + h / 4 - x) * np.float64(2)
    assert form.terms == {X: 2.0, Z: -6.0, 5: 0.5}
    assert (np.float64(0.5) * x).terms == {X: 0.5}
    assert (-x).terms == {X: -1.0}
    assert str(form) == "+2 x -6 z +0.5 H1"
    assert str(Lin()) == "0"


def test_forms_refuse_other_things() -> None:
    x = Lin({X: 1.0})
    for wrong in (lambda: x + 1.0, lambda: x * x, lambda: x - "x", lambda: x / x, lambda: 1.0 + x):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="divided by zero"):
        x / 0
    with pytest.raises(ValueError, match="k: expected an integer ≥ 0"):
        PlanBuilder.H(-1)


def test_forms_of_an_evaluation_fold_or_keep_the_clamped_d() -> None:
    b = builder()
    b.start()
    e = b.evaluate(0.5)
    assert set(e.D.terms) == set(e.s.terms) | {X} == {X, F}
    assert e.eps.terms[F] == 1.0
    b = builder(clip=0.8)
    b.start()
    e = b.evaluate(0.5)
    assert e.D.terms == {D: 1.0}
    assert set(e.s.terms) == set(e.eps.terms) == {X, D}
    assert e.eps_raw.terms[F] == 1.0
    np.testing.assert_allclose(e.eps.terms[D], -e.m / e.sigma)


def test_a_two_step_multistep_of_ones_own() -> None:
    """Adams–Bashforth 2 for dx/dσ = ε on x/m, with ε of the last step in a register."""
    b = builder(coordinate="x/m")
    times = WORLD.sde.time_at_nsr(np.geomspace(80.0, 0.01, 12))
    b.start()
    previous, levels = None, [b.level(t)[1] for t in times]
    for i, t in enumerate(times[:-1]):
        e = b.evaluate(t)
        h = levels[i + 1] - levels[i]
        slope = e.eps if previous is None else 1.5 * e.eps - 0.5 * b.H(0)
        b.row(e.x + h * slope, (0, e.eps))
        previous = h
    b.row(b.evaluate(times[-1]).D)
    plan = b.build(order=2)
    assert (plan.method, plan.registers, plan.nfe) == ("mine", 1, 12)
    assert plan.description["order"] == 2
    assert plan.start_scale == pytest.approx(1 / WORLD.m(1.0))

    noise = Noise.normal(1, (4, 1))
    trace = interpret(plan, Network(WORLD, GAUSSIAN, "eps"), noise)
    y, eps_before = noise.arrays[0] / WORLD.m(1.0), None
    for i, sigma in enumerate(levels[:-1]):
        d = GAUSSIAN.posterior_mean(y, 1.0, sigma)
        eps = (y - d) / sigma
        slope = eps if eps_before is None else 1.5 * eps - 0.5 * eps_before
        y, eps_before = y + (levels[i + 1] - sigma) * slope, eps
    y = GAUSSIAN.posterior_mean(y, 1.0, levels[-1])
    np.testing.assert_allclose(trace.states[-1], y, rtol=1e-12)


def test_a_bare_callable_is_enough() -> None:
    b = PlanBuilder(lambda x, t: -x, WORLD.sde, method="mine")
    b.start()
    b.row(b.evaluate(0.5).D)
    assert b.build().description["predicts"] == "score"


def test_streams_draws_and_guidance_of_ones_own() -> None:
    b = builder()
    b.start()
    b.row(b.evaluate(0.9).x + b.z, stream=6, draw=11, guidance=0.0)
    b.row(b.evaluate(0.5).x + b.z)
    plan = b.build()
    assert plan.stream.tolist() == [0, 6, 1]
    assert plan.draw.tolist() == [0, 11, 2]
    assert plan.guidance.tolist() == [1.0, 0.0, 1.0]


def test_start_law() -> None:
    for t_start, std in ((None, 1.0), (1.0, 1.0), (0.5, WORLD.sigma(0.5))):
        b = builder(t_start=t_start)
        b.start()
        b.row(b.evaluate(0.5).D)
        assert b.build().coef[0, 0, Z] == pytest.approx(std, rel=1e-14)
    b = builder(t_start=0.5, coordinate="x/m")
    b.start()
    b.row(b.evaluate(0.5).D)
    plan = b.build()
    assert plan.coef[0, 0, Z] == pytest.approx(WORLD.nsr(0.5), rel=1e-14)
    assert plan.start_scale == pytest.approx(1 / WORLD.m(0.5), rel=1e-14)
    b = builder(given_start=True)
    b.start(3.0)
    b.row(b.evaluate(0.5).D)
    assert b.build().coef[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_corrector_row_forms() -> None:
    b = builder()
    b.start()
    e = b.evaluate(0.5)
    b.langevin(0.9, 0.16)
    b.evaluate(0.5)
    b.langevin(0.9, 0.16, "per_sample")
    plan = b.build()
    epsilon = 2 * 0.9 * (0.16 * e.sigma) ** 2
    assert plan.coef[1, 0, Z] == pytest.approx(math.sqrt(2 * epsilon))
    np.testing.assert_allclose(plan.langevin[2], [2 * 0.9 * 0.16**2, 0.0, -1 / e.sigma])


def test_construction_errors() -> None:
    with pytest.raises(ValueError, match="coordinate: expected 'x' or 'x/m', got 'y'"):
        builder(coordinate="y")
    for clip in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="clip_denoised: expected a finite number > 0"):
            builder(clip=clip)
    with pytest.raises(TypeError, match="clip_denoised: expected a number, got '1'"):
        builder(clip="1")


def test_order_errors() -> None:
    b = builder()
    with pytest.raises(ValueError, match=r"row: a row needs an evaluation"):
        b.row(b.state)
    b.evaluate(0.5)
    with pytest.raises(ValueError, match=r"row: the first row is start\(\)"):
        b.row(b.state)
    b = builder()
    b.start()
    with pytest.raises(ValueError, match="start: the start row comes first, and once"):
        b.start()
    b.start_row(b.state + b.z)
    with pytest.raises(ValueError, match="start_row: comes directly after"):
        b.start_row(b.state + b.z)
    b.evaluate(0.5)
    with pytest.raises(ValueError, match="evaluate: one row is one evaluation"):
        b.evaluate(0.5)
    with pytest.raises(ValueError, match="build: the last evaluation has no row"):
        b.build()


def test_a_row_sees_its_own_evaluation_only() -> None:
    b = builder()
    b.start()
    early = b.evaluate(0.9)
    b.row(early.D)
    late = b.evaluate(0.5)
    with pytest.raises(ValueError, match="a form of evaluation 1 meets one of evaluation 0"):
        late.x + early.D
    with pytest.raises(ValueError, match="keep the earlier form in a register"):
        b.row(early.D)
    b = builder()
    b.start()
    b.evaluate(0.9)
    with pytest.raises(TypeError, match="row: expected a linear form, got float"):
        b.row(1.0)  # type: ignore[arg-type]


def test_registers_are_checked_when_built() -> None:
    b = builder()
    b.start()
    b.evaluate(0.5)
    b.row(b.H(1))
    with pytest.raises(ValueError, match="row 1 reads register H1 before it is written"):
        b.build()


def test_langevin_errors() -> None:
    b = builder(clip=1.0)
    b.start()
    b.evaluate(0.5)
    with pytest.raises(ValueError, match="norm: expected one of"):
        b.langevin(1.0, 0.1, "l2")
    with pytest.raises(ValueError, match="clip_denoised: norm='sqrt_d'"):
        b.langevin(1.0, 0.1, "sqrt_d")
    b.langevin(1.0, 0.1)
    b = builder()
    b.start()
    b.evaluate(0.5)
    with pytest.raises(ValueError, match="denoise: the noise of a row with norm='batch_mean'"):
        b.langevin(1.0, 0.1, "batch_mean", noise=False)


def test_times_outside_the_networks_range() -> None:
    b = builder()
    b.start()
    with pytest.raises(ValueError, match="t: VPSDE runs over"):
        b.evaluate(1.5)
