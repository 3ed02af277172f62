"""The plan as an object: checks, moments, packing, printing, files, comparison."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbm_fast.methods import make_plan
from sbm_fast.model import ScoreModel
from sbm_fast.plan import FIELD_LANES, NORMS, TAIL_LANES, Plan
from sbm_fast.sde import VESDE, VPSDE

SDE = VPSDE()
MODEL = ScoreModel(lambda x, t: x, predicts="eps", time="999t", sde=SDE)


def plan_of(method: str = "ode", **options: Any) -> Plan:
    return make_plan(method, MODEL, SDE, steps=options.pop("steps", 4), **options)


def changed(plan: Plan, name: str, at: Any, value: Any) -> Plan:
    array = np.array(getattr(plan, name))
    array[at] = value
    return replace(plan, **{name: array})


def test_counts_and_types() -> None:
    plan = plan_of(solver="rk4")
    assert (plan.rows, plan.nfe, plan.registers) == (17, 16, 2)
    assert plan.coef.dtype == np.float64
    assert plan.slot.dtype == plan.draw.dtype == np.int64
    assert not plan.coef.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        plan.coef[0, 0, 0] = 1.0


def test_it_does_not_share_memory_with_what_it_was_made_from() -> None:
    plan = plan_of()
    coef = np.array(plan.coef)
    other = replace(plan, coef=coef)
    coef[1, 0, 0] = 7.0
    assert other.difference(plan) == ""


@pytest.mark.parametrize(
    ("name", "at", "value", "match"),
    [
        ("coef", (2, 0, 0), np.nan, "coef: row 2 must be finite"),
        ("denoiser", (3, 0), np.inf, "denoiser: row 3"),
        ("denoiser", (3, 2), 0.0, "denoiser: row 3"),
        ("denoiser", (3, 2), np.nan, "denoiser: row 3"),
        ("time", 4, np.nan, "time: row 4"),
        ("label", 4, np.inf, "label: row 4"),
        ("c_in", 4, np.nan, "c_in: row 4"),
        ("c_in", 4, 0.0, "c_in: row 4: an evaluating row needs a value that is not 0"),
        ("marginal", (2, 1), -0.1, "marginal: row 2: σ must not be negative"),
        ("guidance", 1, np.nan, "guidance: row 1"),
        ("langevin", (1, 1), np.nan, "langevin: row 1"),
        ("marginal", (1, 1), np.nan, "marginal: row 1"),
        ("slot", 1, 1, r"slot: row 1 must be in \[-1, 0\], got 1"),
        ("stream", 1, -1, "stream: row 1"),
        ("draw", 1, 2**31, "draw: row 1"),
        ("norm", 1, 4, "norm: row 1"),
        ("slot", 1, -1, "slot: row 1 has write coefficients but slot"),
        ("evaluates", 0, True, "evaluates: a plan begins with one or two rows"),
        ("evaluates", slice(None), False, "evaluates: a plan begins with one or two rows"),
        ("evaluates", 5, False, "evaluates: row 5 lacks an evaluation"),
        ("coef", (0, 0, 1), 1.0, "coef: a start row reads F or D"),
        ("coef", (1, 0, 4), 1.0, "coef: row 1 reads register H0 before it is written"),
        ("norm", 2, 1, "coef: Langevin row 2 must be 1 on x"),
    ],
)
def test_check_names_what_does_not_hold(name: str, at: Any, value: Any, match: str) -> None:
    plan = plan_of(solver="heun")
    if name == "evaluates" and at == 0:
        plan = replace(plan, time=np.zeros(plan.rows))
    with pytest.raises(ValueError, match=match):
        changed(plan, name, at, value)


def test_check_of_shapes_and_scale() -> None:
    plan = plan_of()
    with pytest.raises(ValueError, match=r"coef: expected \[rows, 2, 4 \+ registers\]"):
        replace(plan, coef=plan.coef[:, :, :3])
    with pytest.raises(ValueError, match="coef: a plan needs at least one row"):
        replace(plan, coef=plan.coef[:0])
    with pytest.raises(ValueError, match=r"label: expected shape \(9,\), got \(8,\)"):
        replace(plan, label=plan.label[1:])
    with pytest.raises(ValueError, match="start_scale: expected a positive number"):
        replace(plan, start_scale=0.0)


EDITED: list[tuple[str, Any, type[Exception], str]] = [
    ("coef", lambda a: a.astype(complex), TypeError, "coef: expected real numbers"),
    ("coef", lambda a: a.astype(str), TypeError, "coef: expected real numbers"),
    ("label", lambda a: a.astype(object), TypeError, "label: expected real numbers"),
    ("time", lambda a: [[1.0], [1.0, 2.0]], ValueError, "time: expected an array of real numbers"),
    ("slot", lambda a: a + 0.5, ValueError, "slot: expected integers, got "),
    ("stream", lambda a: a + np.nan, ValueError, "stream: expected integers, got nan"),
    ("draw", lambda a: a + 1e30, ValueError, "draw: expected integers, got 1e"),
    ("draw", lambda a: a.astype(np.uint64) + np.uint64(2**63), ValueError, "draw: "),
    ("norm", lambda a: a.astype(str), TypeError, "norm: expected integers, got an array of <U"),
    ("evaluates", lambda a: a.astype(float), TypeError, "evaluates: expected booleans"),
    ("coef", lambda a: np.zeros((len(a), 2, 13)), ValueError, "coef: expected at most 8 registers"),
    ("method", lambda a: 3, TypeError, "method: expected a str, got int"),
    ("description", lambda a: "ode", TypeError, "description: expected a dict, got str"),
    ("start_scale", lambda a: "1", TypeError, "start_scale: expected a positive number, got str"),
]


@pytest.mark.parametrize(("name", "edit", "error", "match"), EDITED)
def test_edited_values_are_of_the_right_kind(
    name: str, edit: Any, error: type[Exception], match: str
) -> None:
    plan = plan_of()
    with pytest.raises(error, match=f"^{match}"):
        replace(plan, **{name: edit(getattr(plan, name))})


def test_integers_may_come_as_floats() -> None:
    plan = plan_of()
    again = replace(plan, draw=plan.draw.astype(float), stream=plan.stream.tolist())
    assert plan.difference(again) == ""
    assert again.draw.dtype == np.int64


def test_langevin_rows_have_their_form() -> None:
    plan = plan_of("pc", norm="batch_mean")
    assert plan.norm.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="langevin: row 1 has norm 'batch_mean'"):
        changed(plan, "langevin", (1, 0), 0.0)
    with pytest.raises(ValueError, match="coef: Langevin row 1"):
        changed(plan, "coef", (1, 0, 3), 0.5)


def test_gaussian_refuses_what_is_not_affine() -> None:
    with pytest.raises(ValueError, match="norm: row 1 has a data-dependent step size"):
        plan_of("pc", norm="sqrt_d").gaussian(0.0, 1.0)
    with pytest.raises(ValueError, match="denoiser: row 1 is clamped"):
        plan_of("ddim", clip_denoised=1.0).gaussian(0.0, 1.0)
    with pytest.raises(ValueError, match="start: the plan begins from a given state"):
        plan_of(given_start=True).gaussian(0.0, 1.0)
    with pytest.raises(ValueError, match="data_mean, data_std"):
        plan_of().gaussian(0.0, -1.0)
    noisy = plan_of("em", steps=4)
    again = changed(noisy, "draw", 3, int(noisy.draw[2]))
    with pytest.raises(ValueError, match="draw: the plan uses one noise in two rows"):
        again.gaussian(0.0, 1.0)


def test_gaussian_of_a_given_start() -> None:
    drawn, given = plan_of("em", steps=6), plan_of("em", steps=6, given_start=True)
    expected = drawn.gaussian(0.3, 0.5)
    np.testing.assert_allclose(given.gaussian(0.3, 0.5, start=(0.0, 1.0)), expected, rtol=1e-14)


def test_many_rows_keep_their_digits() -> None:
    """The factor is compressed every 64 rows; the law is the recursion's."""
    plan = make_plan("em", ScoreModel(lambda x, t: x, sde=VESDE()), VESDE(), steps=700)
    mean, std = plan.gaussian(0.3, 0.5)
    mu, var = 0.0, 50.0**2
    times = plan.time[1:]
    for i, t in enumerate(times):
        dt = (times[i + 1] if i + 1 < len(times) else 1e-5) - t
        sigma2 = (0.01 * 5000.0**t) ** 2
        g2 = sigma2 * 2 * np.log(5000.0)
        pull = -g2 * dt / (0.25 + sigma2)
        mu = mu - pull * (mu - 0.3)
        var = (1 - pull) ** 2 * var + (0.0 if i + 1 == len(times) else -g2 * dt)
    np.testing.assert_allclose((mean[-1], std[-1]), (mu, np.sqrt(var)), rtol=1e-10)


def test_kappa_finds_the_cancellation_of_x0_networks() -> None:
    """plans.md §4: PF-Heun under VP down to t = 1e-5, n = 50: 999 for x0, 1.1 edm, 1.4 score."""
    times = np.linspace(1.0, 1e-5, 51)
    kappa = {}
    for predicts in ("x0", "score", "edm"):
        model = ScoreModel(lambda x, t: x, predicts=predicts, sde=SDE)
        kappa[predicts] = make_plan("ode", model, SDE, schedule=times, solver="heun").kappa.max()
    assert kappa["x0"] > 300
    assert kappa["score"] < 3
    assert kappa["edm"] < 3


def test_kappa_of_rows_that_gaussian_refuses() -> None:
    plain = plan_of("pc", norm="sigma").kappa
    np.testing.assert_allclose(plan_of("pc", norm="batch_mean").kappa, plain, rtol=1e-9)
    assert np.isfinite(plan_of("ddim", clip_denoised=1.0, given_start=True).kappa).all()


def test_pack_in_float32_keeps_the_digits() -> None:
    plan = plan_of(solver="rk4")
    coef, field = plan.pack(torch.float32)
    width = 2 * (4 + plan.registers)
    assert coef.shape == (plan.rows, 2, width + len(TAIL_LANES))
    assert coef.dtype == torch.float32
    assert field.dtype == torch.int32
    value = coef.double().sum(dim=1).numpy()
    flat = plan.coef.reshape(plan.rows, -1)
    np.testing.assert_allclose(value[:, :width], flat, rtol=1e-14, atol=0)
    assert (np.abs(coef[:, 0, :width].double().numpy() - flat) > 0).any()
    np.testing.assert_array_equal(field[:, 0], plan.slot)
    np.testing.assert_array_equal(field[:, FIELD_LANES.index("draw")], plan.draw)


def test_pack_lanes() -> None:
    plan = plan_of("pc", norm="per_sample")
    coef, field = plan.pack(torch.float64)
    tail = dict(zip(TAIL_LANES, coef[:, 0, 8:].numpy().T, strict=True))
    np.testing.assert_array_equal(tail["p"], plan.denoiser[:, 0])
    np.testing.assert_array_equal(tail["q"], plan.denoiser[:, 1])
    np.testing.assert_array_equal(tail["L"], plan.denoiser[:, 2])
    np.testing.assert_array_equal(tail["c_in_next"], [*plan.c_in[1:], 0.0])
    np.testing.assert_array_equal(tail["label_next"], [*plan.label[1:], 0.0])
    np.testing.assert_array_equal(tail["eps_scale"], plan.langevin[:, 0])
    np.testing.assert_array_equal(tail["p_s"], plan.langevin[:, 1])
    np.testing.assert_array_equal(tail["q_s"], plan.langevin[:, 2])
    np.testing.assert_array_equal(field[:, 3], plan.norm)
    assert (coef[:, 1] == 0).all()
    with pytest.raises(ValueError, match="dtype: expected"):
        plan.pack(torch.bfloat16)


def test_pack_of_an_unclamped_limit_is_infinite_without_residue() -> None:
    coef, _ = plan_of("ddim").pack(torch.float32)
    limit = 8 + TAIL_LANES.index("L")
    assert torch.isinf(coef[:, 0, limit]).all()
    assert (coef[:, 1, limit] == 0).all()
    assert torch.isfinite(coef[:, 1]).all()


@pytest.mark.parametrize("name", [f.name for f in fields(Plan) if f.name not in {"description"}])
def test_difference_finds_a_change_in_every_field(name: str) -> None:
    plan = plan_of("pc", norm="batch_mean")
    value = getattr(plan, name)
    if name == "method":
        return
    if name == "start_scale":
        assert plan.difference(replace(plan, start_scale=2.0)) == "start_scale: 1.0 != 2.0"
        return
    row = 2 if name != "norm" else 1
    at = (row, 0, 3) if value.ndim == 3 else (row, 0) if value.ndim == 2 else row
    if name == "evaluates":
        other = replace(plan_of(), **{})
        assert plan.difference(other).startswith("row ") or "shape" in plan.difference(other)
        return
    if name == "slot":
        plan = plan_of(solver="rk4")
        row, at, value = plan.rows - 1, plan.rows - 1, plan.slot
    # a threshold holds together as a whole only
    new = (0.9, 1.0, 2.0) if name == "threshold" else value[at] + 1
    other = changed(plan, name, row if name == "threshold" else at, new)
    assert f"row {row}, {name}" in plan.difference(other)
    assert plan.difference(other).count("!=") == 1


def test_difference_names_source_and_register() -> None:
    plan = plan_of(solver="rk4")
    assert plan.difference(plan_of(solver="rk4")) == ""
    other = changed(plan, "coef", (2, 1, 4), 0.5)
    assert "row 2, coef[write, H0]" in plan.difference(other)
    assert "shape" in plan.difference(plan_of(solver="heun"))
    with pytest.raises(TypeError, match="other: expected a Plan, got str"):
        plan.difference("plan")  # type: ignore[arg-type]


def test_print_is_readable_and_short() -> None:
    text = str(plan_of("pc", steps=50, norm="batch_mean", clip_denoised=None))
    assert text.startswith("Plan pc: 101 rows, 100 network evaluations, 0 registers")
    assert "VPSDE" in text
    assert "… 90 rows …" in text
    assert "[batch_mean]" in text
    assert len(text.splitlines()) == 15
    assert "x' = +1 z" in text
    assert "H0 = " in str(plan_of(solver="heun"))
    assert "|D| ≤ 0.9" in str(plan_of("ddim", clip_denoised=0.9))


def test_save_and_load(tmp_path: Path) -> None:
    for plan in (plan_of(solver="rk4"), plan_of("pc", norm="batch_mean"), plan_of("edm")):
        path = tmp_path / "own.plan"
        plan.save(path)
        again = Plan.load(path)
        assert plan.difference(again) == ""
        assert (again.method, again.description) == (plan.method, plan.description)
        assert str(again) == str(plan)


def test_load_refuses_what_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "absent.npz")
    text = tmp_path / "text.npz"
    text.write_text("not a plan")
    with pytest.raises(ValueError, match=r"path: .*text.npz' is not a saved plan"):
        Plan.load(text)
    pickled = tmp_path / "pickle.npz"
    np.savez(pickled, header=np.array([{"format": 1}], dtype=object))
    with pytest.raises(ValueError, match="is not a saved plan"):
        Plan.load(pickled)
    plan, broken = plan_of(), tmp_path / "broken.npz"
    plan.save(broken)
    with np.load(broken) as file:
        arrays = dict(file)
    arrays["header"] = np.array(str(arrays["header"]).replace('"format": 2', '"format": 99'))
    np.savez(broken, **arrays)
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        Plan.load(broken)


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("slot", lambda a: a + 0.5, "slot: expected integers"),
        ("coef", lambda a: a * 1j, "coef: expected real numbers"),
        ("c_in", lambda a: a * 0, "c_in: row 1: an evaluating row"),
        ("header", lambda a: np.array(str(a).replace('"ode"', "7")), "method: expected a str"),
        ("header", lambda a: np.array("[1, 2]"), ""),
    ],
)
def test_load_names_the_path_and_the_reason(
    tmp_path: Path, name: str, edit: Any, reason: str
) -> None:
    path = tmp_path / "edited.npz"
    plan_of().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays[name] = edit(arrays[name])
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"path: .*edited.npz' is not a saved plan \({reason}"):
        Plan.load(path)


def test_norm_names() -> None:
    assert NORMS == ("none", "batch_mean", "per_sample", "sqrt_d")
