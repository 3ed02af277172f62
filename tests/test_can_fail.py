"""The suite can fail: each mutation is caught by the very comparison that the tests use."""

from collections.abc import Callable
from dataclasses import replace

import flow_cases
import noise_cases
import norm_cases
import numpy as np
import op_cases as cases
import pytest
import sampling_cases
import torch
from battery import failures
from op_backends import BACKENDS, TWINLESS, is_slow
from torch import Tensor

from sbm_fast import noise
from sbm_fast.methods import make_plan
from sbm_fast.ops import _philox, _row, affine_step, error_norm, hutchinson, langevin_epsilon
from sbm_fast.plan import Plan


def eager_philox(counter: noise_cases.Words, key: tuple[int, int]) -> list[int]:
    c = tuple(torch.tensor([w]) for w in counter)
    k = tuple(torch.tensor([w]) for w in key)
    return [int(w) for w in _philox.philox(c, k)]


@pytest.mark.parametrize("name", ["M0", "M1", "W0", "W1", "ROUNDS"])
def test_a_philox_constant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise_cases.known_answer_error(eager_philox) == ""
    step = -1 if name == "ROUNDS" else 1
    monkeypatch.setattr(_philox, name, getattr(_philox, name) + step)
    assert noise_cases.known_answer_error(eager_philox) != ""


def test_too_few_rounds_fail_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> np.ndarray:
        words = torch.empty(1024, 512, dtype=torch.int32)
        noise.ops.REFERENCES["words"](words, noise.keys(0, 1024), 0, 1)
        return words.numpy().view(np.uint32).T.reshape(-1)

    assert failures(stream(), 1e-5) == {}
    monkeypatch.setattr(_philox, "ROUNDS", 2)
    assert failures(stream(), 1e-5) != {}


@pytest.mark.parametrize(
    "transform",
    [
        lambda w: w.to(torch.float32) * 2.0**-32,  # no half step: u = 0 is possible
        lambda w: (w.double() * 2.0**-32 + 2.0**-33).float() * (1 - 1e-4),
    ],
)
def test_a_uniform(transform: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([[1, 2**20, 5, 2**31]])
    exact = noise_cases.normal(words.numpy().astype(np.uint32))

    def error() -> float:
        got = _philox.to_normal(tuple(words[:, [k]] for k in range(4)))  # type: ignore[arg-type]
        return float(np.abs(got.numpy() - exact).max())

    assert error() <= noise_cases.LAW_BOUND
    monkeypatch.setattr(_philox, "to_uniform", transform)
    assert not error() <= noise_cases.LAW_BOUND


def check_mutation(case: cases.Case, mutated: cases.Case, slack: float = 0.0) -> None:
    """The step on `mutated` must not pass as the formula on `case`."""
    for backend in (name for name in BACKENDS if not is_slow(name)):
        assert cases.violation(case, cases.run(case, backend), slack) == ""
        assert cases.violation(case, cases.run(mutated, backend), slack) != "", backend


NONZERO = [
    (row, lane)
    for row, values in enumerate(cases.table()[0])
    for lane in range(2 * cases.WIDTH)
    if values[lane] != 0
]


@pytest.mark.parametrize(("row", "lane"), NONZERO)
def test_a_coefficient(row: int, lane: int) -> None:
    """1e-4 relative, in every coefficient of the table; noise in the loop."""
    case = cases.make((4, 33), [row] * 4)
    value = case.value.clone()
    value[row, lane] *= 1 + 1e-4
    check_mutation(case, replace(case, value=value), 4 * cases.NOISE_BOUND)


@pytest.mark.parametrize("lane", [0, 1, 2, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ["clamped", "plain", "per_sample"])
def test_the_other_numbers_of_a_row(name: str, lane: int) -> None:
    """p, q, L; the guidance factor; ε's scale, p_s and q_s: where the row uses them."""
    used = {"clamped": (0, 1, 2), "plain": (5,), "per_sample": (6, 7, 8)}[name]
    if lane not in used:
        return
    row = cases.ROWS.index(name)
    case = cases.make((4, 33), [row] * 4, guided=lane == 5, explicit=True)
    value = case.value.clone()
    value[row, 2 * cases.WIDTH + lane] *= 1 + 1e-4
    check_mutation(case, replace(case, value=value))


@pytest.mark.parametrize("norm", ["batch_mean", "per_sample", "sqrt_d"])
def test_a_norm(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.make((4, 33), [cases.ROWS.index(norm)] * 4, explicit=True)
    for other in (1, 2, 3):
        field = case.field.clone()
        field[cases.ROWS.index(norm), 3] = other
        if other != case.field[cases.ROWS.index(norm), 3]:
            check_mutation(case, replace(case, field=field))

    exact = langevin_epsilon.sample_norm
    monkeypatch.setattr(langevin_epsilon, "sample_norm", lambda v: exact(v[:, :-1]))
    assert cases.violation(case, cases.run(case, "eager")) != ""


def ungated(weights: Tensor, values: list[Tensor | None], like: Tensor) -> Tensor:
    given = [(k, v) for k, v in enumerate(values) if v is not None]
    return sum(
        (_row.per_sample(weights[:, k].to(like.dtype), like) * v for k, v in given),
        torch.zeros_like(like),
    )


def test_a_register_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the gate 0·NaN reaches the state."""
    case = cases.make((4, 9), [1] * 4)
    case.registers.fill_(float("nan"))
    clean = cases.run(case, "eager")["x"]
    assert clean.isfinite().all()

    monkeypatch.setattr(affine_step, "weighted_sum", ungated)
    mixed = cases.make((10, 9))  # some rows read registers, so they are fetched for all
    mixed.registers.fill_(float("nan"))
    plain = mixed.row == 1
    assert not cases.run(mixed, "eager")["x"][plain].isfinite().all()
    monkeypatch.undo()
    assert cases.run(mixed, "eager")["x"][plain].isfinite().all()


@pytest.mark.parametrize("change", ["slot", "draw", "stream"])
def test_an_integer_of_a_row(change: str) -> None:
    row = cases.ROWS.index("history")
    case = cases.make((4, 33), [row] * 4)
    field = case.field.clone()
    field[row, ("slot", "stream", "draw").index(change)] += -1 if change == "slot" else 1
    check_mutation(case, replace(case, field=field), 4 * cases.NOISE_BOUND)


FAST = [name for name in TWINLESS if not is_slow(name)]


def check_slope(case: flow_cases.Flow, **change: object) -> None:
    """`hutchinson_` on changed arguments must not pass as the formula on `case`."""
    for backend in FAST:
        assert flow_cases.violation(case, flow_cases.slope(case, backend)) == ""
        mutated = replace(case, **change)  # type: ignore[arg-type]
        assert flow_cases.violation(case, flow_cases.slope(mutated, backend)) != "", backend


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["p", "q", "r", "draw", "stream", "gaussian", "product"])
def test_a_slope(change: str, sums: torch.dtype, gaussian: bool) -> None:
    """1e-4 relative in a coefficient or in one element's product, another probe."""
    case = flow_cases.flow((4, 33), 2, sums=sums, gaussian=gaussian)
    assert case.product is not None
    if change in ("p", "q", "r"):
        coef = case.coef.clone()
        coef[:, "pqr".index(change)] *= 1 + 1e-3 * (1 if gaussian else 0.1)
        check_slope(case, coef=coef)
    elif change == "product":
        product = case.product.clone()
        product[1, 2, 32] += 1e-2
        check_slope(case, product=product)
    elif change == "gaussian":
        check_slope(case, gaussian=not gaussian)
    else:
        check_slope(case, **{change: getattr(case, change) + 1})


def test_a_sum_and_a_gate_of_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    case = flow_cases.flow((4, 33), 2)
    exact = hutchinson.sample_sum
    monkeypatch.setattr(hutchinson, "sample_sum", lambda v: exact(v[:, :-1]))
    assert flow_cases.violation(case, flow_cases.slope(case, "eager")) != ""
    monkeypatch.undo()
    case.coef[1, 1] = 0.0
    case.network[1] = float("nan")
    assert flow_cases.slope(case, "eager")[0].isfinite().all()
    monkeypatch.setattr(hutchinson, "weighted_sum", ungated)
    assert not flow_cases.slope(case, "eager")[0].isfinite().all()


@pytest.mark.parametrize("change", ["weight", "atol", "rtol", "u0", "u1"])
def test_an_error_norm(change: str) -> None:
    case = flow_cases.error((4, 33), 4)
    weights, registers = case.weights.clone(), case.registers.clone()
    weights[:, 2] *= 1 + 1e-4
    registers[0] *= 1 + 1e-4
    changed = {"atol": case.atol * (1 + 1e-4), "rtol": case.rtol * (1 + 1e-4)}
    changed |= {"weight": weights, "u0": registers, "u1": case.x * (1 + 1e-4)}
    name = {"weight": "weights", "u0": "registers", "u1": "x"}.get(change, change)
    mutated = replace(case, **{name: changed[change]})
    for backend in FAST:
        assert flow_cases.norm_violation(case, flow_cases.norm(case, backend)) == ""
        assert flow_cases.norm_violation(case, flow_cases.norm(mutated, backend)) != "", backend


def test_weights_of_the_error_in_float32() -> None:
    """What rounding them does where slopes cancel; random slopes would not show it."""
    case = flow_cases.smooth((5, 7))
    rounded = replace(case, weights=case.weights.float().double())
    for backend in FAST:
        assert flow_cases.loses_digits(case, flow_cases.norm(case, backend)) == ""
        assert flow_cases.loses_digits(case, flow_cases.norm(rounded, backend)) != "", backend


def test_a_sum_and_a_maximum_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = flow_cases.error((4, 33), 4)
    exact = error_norm.sample_sum
    monkeypatch.setattr(error_norm, "sample_sum", lambda v: exact(v[:, :-1]))
    assert flow_cases.norm_violation(case, flow_cases.norm(case, "eager")) != ""
    monkeypatch.undo()
    assert flow_cases.hides_nan((6, 5), torch.float32, "eager") == ""
    monkeypatch.setattr(torch, "maximum", torch.fmax)
    assert flow_cases.hides_nan((6, 5), torch.float32, "eager") != ""


@pytest.mark.parametrize("change", ["eps", "gain", "x", *norm_cases.ROWS, "residual", "silu"])
def test_a_group_norm(change: str) -> None:
    """1e-4 relative in one argument."""
    case = norm_cases.norm(
        (3, 6, 5, 4), 3, rows=" ".join(norm_cases.ROWS), residual=True, gain=0.7, eps=0.1
    )
    value = getattr(case, change)
    if isinstance(value, Tensor):
        value = value.clone()
        value.view(-1)[1] += 1e-3
    else:
        value = not value if change == "silu" else value * (1 + 1e-4)
    for backend in FAST:
        assert norm_cases.violation(case, norm_cases.output(case, backend)) == ""
        mutated = norm_cases.output(replace(case, **{change: value}), backend)
        assert norm_cases.violation(case, mutated) != "", backend


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("mutated", ["x", "given", "weight"])
def test_a_product_of_a_group_norm(mutated: str, forward: bool) -> None:
    p = norm_cases.product((3, 6, 5, 4), 3, forward=forward, rows="weight bias scale shift")
    for backend in FAST:
        got = norm_cases.multiplied(p, backend)
        assert norm_cases.product_violation(p, got) == ""
        other = p
        if mutated == "x":
            shifted = p.case.x.clone()
            shifted[0, 0, 0, 0] += 1e-3
            other = replace(p, case=replace(p.case, x=shifted))
        elif mutated == "given":
            other = replace(p, given=p.given * (1 + 1e-4))
        else:
            assert p.case.weight is not None
            other = replace(p, case=replace(p.case, weight=p.case.weight * (1 + 1e-4)))
        assert norm_cases.product_violation(p, norm_cases.multiplied(other, backend)) != ""


def moments_differ(plan: Plan, reference: Plan) -> bool:
    """The closed-form comparison that tests/methods make, at their 1e-10."""
    (mean, std), (mean_0, std_0) = plan.gaussian(0.3, 0.5), reference.gaussian(0.3, 0.5)
    scale = np.abs(std_0).max()
    return bool(max(np.abs(mean - mean_0).max(), np.abs(std - std_0).max()) > 1e-10 * scale)


@pytest.mark.parametrize("name", ["em", "pc sigma", "ode heun", "edm", "ddim", "ald"])
def test_a_coefficient_of_a_method(name: str) -> None:
    method, sde, options = sampling_cases.METHODS[name]
    plan = make_plan(method, sampling_cases.network, sde, **options)
    assert not moments_differ(plan, plan)
    row = plan.rows // 2
    for source in np.flatnonzero(plan.coef[row, 0]):
        coef = plan.coef.copy()
        coef[row, 0, source] *= 1 + 1e-4
        mutated = replace(plan, coef=coef)
        assert moments_differ(mutated, plan) and mutated.difference(plan) != ""
