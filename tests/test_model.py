"""ScoreModel: networks that know Gaussian data exactly, run under every other SDE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbm_fast import parameterization
from sbm_fast.model import TIMES, Match, ScoreModel, as_score_model
from sbm_fast.parameterization import PREDICTIONS, Affine
from sbm_fast.sde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    DDPMSchedule,
    Ladder,
    NCSNLadder,
    SubVPSDE,
)

SDES: list[SDE] = [
    VESDE(),
    VPSDE(),
    SubVPSDE(),
    EDMSDE(),
    DDPMSchedule.linear(),
    NCSNLadder.geometric(50.0, 0.01, 30),
]
STD, SIGMA_DATA = 0.7, 0.4  # of the data; and what the networks believe, on purpose another
reproducible = settings(derandomize=True, deadline=None, database=None, max_examples=80)


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, SDE) else str(value)


every_sde = pytest.mark.parametrize("run", SDES, ids=name)
every_net = pytest.mark.parametrize("own", SDES, ids=name)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


def identity(x: Tensor, label: Tensor, **_: Any) -> Tensor:
    return x


def gaussian_net(own: SDE, predicts: str, time: str) -> Callable[..., Tensor]:
    """The network that training under ``own`` on data N(0, STD²) would end with."""
    decode: dict[str, Callable[[float], float]] = {
        "t": lambda label: float(own.nsr(label)),
        "999t": lambda label: float(own.nsr(label / 999)),
        "index": lambda label: float(own.nsr(label)),
        "sigma": lambda label: label,
        "log_sigma": math.exp,
        "edm": lambda label: math.exp(4 * label),
    }

    def net(x: Tensor, label: Tensor) -> Tensor:
        r = decode[time](float(label))
        m = float(own.mean_scale(float(own.time_at_nsr(r))))
        sigma, root = m * r, math.hypot(r, SIGMA_DATA)
        if predicts == "edm":
            x = x * (root * m)  # undo c_in
        y = x / m
        D = y * STD**2 / (STD**2 + r**2)
        eps = (x - m * D) / sigma
        return {
            "score": -eps / sigma,
            "eps": eps,
            "x0": D,
            "v": (m * eps - sigma * D) / math.hypot(m, sigma),
            "edm": (D - SIGMA_DATA**2 / root**2 * y) / (r * SIGMA_DATA / root),
        }[predicts]

    return net


def evaluate(model: ScoreModel, match: Match, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(D, s, ε) as a sampler gets them."""
    F = model(match.c_in * x, torch.tensor(match.label, dtype=torch.float64))
    D, s, eps = (f.x * x + f.F * F for f in (match.denoiser, match.score, match.noise))
    return D, s, eps


@every_net
@every_sde
@every_prediction
def test_gaussian_data_under_every_sde(own: SDE, run: SDE, predicts: str) -> None:
    """The law of the run's state is N(0, m² STD² + σ²), whatever SDE trained the network."""
    times = [t for t in TIMES if (t == "index") <= isinstance(own, Ladder)]
    times = [t for t in times if not (t == "999t" and isinstance(own, Ladder))]
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for i, r in enumerate(np.geomspace(0.02, 40, 7).tolist()):
        time = times[i % len(times)]
        model = ScoreModel(gaussian_net(own, predicts, time), predicts, time, own, None, SIGMA_DATA)
        t = float(run.time_at_nsr(r))
        for coordinate in ("x", "x/m"):
            match = model.match(run, t, coordinate)
            m = float(run.mean_scale(t)) if coordinate == "x" else 1.0
            assert match.m == m and match.sigma == pytest.approx(m * r, rel=1e-12, abs=0)
            variance = (m * STD) ** 2 + match.sigma**2
            truth = (m * STD**2 / variance * x, -x / variance, match.sigma / variance * x)
            for got, expected in zip(evaluate(model, match, x), truth, strict=True):
                # x0 networks lose 1/nsr² in the score, eps networks 1/m in D: that is inherent.
                torch.testing.assert_close(got, expected, rtol=3e-10, atol=0)


@every_prediction
@reproducible
@given(log_r=st.floats(math.log(0.011), math.log(79)), y=st.floats(-3, 3))
def test_one_function_of_x_over_m(predicts: str, log_r: float, y: float) -> None:
    """A VP network run under VE and EDM: D(x/m, σ/m) is one function."""
    own, r = VPSDE(), math.exp(log_r)
    model = ScoreModel(gaussian_net(own, predicts, "t"), predicts, "t", own, None, SIGMA_DATA)
    denoised = []
    for run in (own, VESDE(0.01, 80.0), EDMSDE(), SubVPSDE()):
        t = float(run.time_at_nsr(r))
        x = torch.tensor(y * float(run.mean_scale(t)), dtype=torch.float64)
        denoised.append(float(evaluate(model, model.match(run, t), x)[0]))
    assert denoised == pytest.approx([denoised[0]] * 4, rel=1e-9, abs=1e-13)


@every_net
@every_sde
@every_prediction
def test_forms_are_those_of_the_run_s_own_level(own: SDE, run: SDE, predicts: str) -> None:
    """All outputs but the score are functions of (x/m, σ/m), so their forms do not know ``own``."""
    model = ScoreModel(identity, predicts, "sigma", own, None, SIGMA_DATA)
    for r in np.geomspace(0.0101, 45, 9).tolist():
        t = float(run.time_at_nsr(r))
        m, sigma = float(run.mean_scale(t)), float(run.std(t))
        match = model.match(run, t)
        k = float(own.mean_scale(float(own.time_at_nsr(r)))) / m
        factor = k if predicts == "score" else 1.0
        for form, got in (
            (parameterization.denoiser, match.denoiser),
            (parameterization.score, match.score),
            (parameterization.noise, match.noise),
        ):
            expected = form(predicts, m, sigma, SIGMA_DATA)
            assert got.x == pytest.approx(expected.x, rel=1e-11, abs=0)
            # s_net = s_run / k
            assert pytest.approx(expected.F * factor, rel=1e-11, abs=0) == got.F
        c_in = parameterization.input_scale(predicts, m, sigma, SIGMA_DATA)
        assert match.c_in == pytest.approx(c_in if predicts == "edm" else k, rel=1e-11, abs=0)


@every_sde
@every_prediction
@pytest.mark.parametrize("known", [True, False])
def test_under_its_own_sde_nothing_is_rescaled(run: SDE, predicts: str, known: bool) -> None:
    own = eval(repr(run)) if known and not isinstance(run, Ladder) else run if known else None
    model = ScoreModel(identity, predicts, "t", own)
    for u in (1e-3, 0.3, 1.0):
        t = u * run.t_max
        level = (float(run.mean_scale(t)), float(run.std(t)), 0.5)
        match = model.match(run, t)
        assert match.time == match.label == t
        assert match.denoiser == parameterization.denoiser(predicts, *level)
        assert match.score == parameterization.score(predicts, *level)
        assert match.noise == parameterization.noise(predicts, *level)
        assert match.c_in == parameterization.input_scale(predicts, *level)
        assert (match.m, match.sigma) == level[:2]
        scaled = model.match(run, t, "x/m")
        assert (scaled.m, scaled.sigma) == (1.0, float(run.nsr(t))) and scaled.label == t
        assert scaled.c_in == pytest.approx(match.c_in * level[0], rel=1e-15, abs=0)


@every_prediction
def test_small_noise_keeps_its_digits(predicts: str) -> None:
    """At σ = 1e-6 under EDM, a VP network's forms are good to the last digits."""
    model = ScoreModel(identity, predicts, sde=VPSDE())
    match = model.match(EDMSDE(1e-7, 80.0), 1e-6)
    for form, got in (
        (parameterization.denoiser, match.denoiser),
        (parameterization.score, match.score),
        (parameterization.noise, match.noise),
    ):
        expected = form(predicts, 1.0, 1e-6)
        assert (got.x, got.F) == pytest.approx((expected.x, expected.F), rel=1e-11, abs=0)


def test_labels() -> None:
    sde, t = VPSDE(), 0.37
    nsr = float(sde.nsr(t))
    expected = {
        "t": t,
        "999t": 999 * t,
        "sigma": nsr,
        "log_sigma": math.log(nsr),
        "edm": math.log(nsr) / 4,
    }
    for own in (sde, None):
        for time, label in expected.items():
            match = ScoreModel(identity, time=time, sde=own).match(sde, t)
            assert match.label == pytest.approx(label, rel=1e-15, abs=0), time
    ladder = DDPMSchedule.linear()
    for trained in (ladder, None):
        model = ScoreModel(identity, "eps", "index", trained)
        assert [model.match(ladder, i).label for i in range(1000)] == list(range(1000))
    # Under another SDE the label is that of the network's own time with the same noise.
    vp = ScoreModel(identity, "eps", "999t", sde).match(EDMSDE(), nsr)
    assert (vp.label, vp.time) == pytest.approx((999 * t, t), rel=1e-13, abs=0)
    model = ScoreModel(identity, "eps", "index", ladder)
    assert model.match(EDMSDE(), float(ladder.nsr(17))).label == 17  # to the bit
    assert 17 < model.match(EDMSDE(), float(ladder.nsr(17)) * 1.001).label < 18
    # a ladder's network on a respaced or interpolated level of its own
    assert model.match(ladder, 17.5).label == 17.5


def test_a_function_as_time() -> None:
    seen: list[Any] = []

    def label(t: np.ndarray) -> np.ndarray:
        seen.append(t)
        return np.log(t / 2)

    match = ScoreModel(identity, time=label, sde=EDMSDE()).match(EDMSDE(), 3.0)
    assert match.label == pytest.approx(math.log(1.5)) and type(match.label) is float
    assert seen[0].dtype == np.float64 and seen[0].shape == (1,)
    bad: list[Callable[[Any], Any]] = [
        lambda t: t / 0.0,
        lambda t: np.concatenate([t, t]),
        lambda t: np.nan,
    ]
    for function in bad:
        with (
            np.errstate(divide="ignore"),
            pytest.raises(ValueError, match=r"^time: expected one finite label each at t = 3"),
        ):
            ScoreModel(identity, time=function).match(EDMSDE(), 3.0)


def test_outside_the_trained_range() -> None:
    model = ScoreModel(identity, sde=VESDE(0.01, 50.0))
    edm = EDMSDE()
    for t in (0.002, 0.00999, 50.01, 80.0):
        with pytest.raises(ValueError, match=rf"^t: t = {t:g} has σ/m = {t:g}, outside the range "):
            model.match(edm, t)
    message = r"\[0.01, 50\] that the network was trained in \(VESDE\)"
    with pytest.raises(ValueError, match=message):
        model.match(VPSDE(), 1e-5)
    assert model.match(edm, 0.01 * (1 - 1e-10)).time == 0
    assert model.match(edm, 50 * (1 + 1e-10)).time == 1
    # A VP network's range starts at 0 and ends at nsr(1) = 152.
    assert ScoreModel(identity, sde=VPSDE()).match(EDMSDE(1e-9, 80.0), 1e-9).time > 0
    with pytest.raises(ValueError, match=r"\[0, 152.1\d+\]"):
        ScoreModel(identity, sde=VPSDE()).match(EDMSDE(0.01, 200.0), 160.0)
    # Discrete networks end at their first level.
    ddpm = ScoreModel(identity, "eps", "index", DDPMSchedule.linear())
    with pytest.raises(ValueError, match=r"range \[0.0100005, 157.4\d+\].*DDPMSchedule"):
        ddpm.match(edm, 0.005)


@pytest.mark.parametrize("own", [VPSDE(), None])
def test_times_of_the_run(own: SDE | None) -> None:
    model = ScoreModel(identity, sde=own)
    for t in (1.0001, -0.1, 999.0):
        with pytest.raises(ValueError, match=rf"^t: VPSDE runs over \[0, 1\].* got t = {t:g}"):
            model.match(VPSDE(), t)
    with pytest.raises(ValueError, match=r"^t: there is no noise at t = 0 of VPSDE"):
        model.match(VPSDE(), 0.0)
    with pytest.raises(ValueError, match=r"^t: EDMSDE runs over \[0, 80\]"):
        model.match(EDMSDE(), 100.0)
    for bad in ("0.5", None, np.array([0.1, 0.2])):
        with pytest.raises(TypeError, match=r"^t: expected a number"):
            model.match(VPSDE(), bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^t: expected a finite number"):
        model.match(VPSDE(), math.nan)
    assert model.match(VPSDE(), np.float32(0.5)).time == 0.5


LADDER = DDPMSchedule.linear(10)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"net": 3}, TypeError, r"net: expected a callable \(x, label\) -> tensor, got 3"),
    ({"net": nn.Identity}, TypeError, "net: expected a callable"),
    ({"predicts": "epsilon"}, ValueError, "predicts: expected one of 'score', 'eps'"),
    ({"time": "sigmas"}, ValueError, "time: expected one of 't', '999t'.*'sigmas'"),
    ({"time": 999}, ValueError, "time: expected one of"),
    ({"time": np.zeros(2)}, ValueError, "time: expected one of"),
    ({"time": "index", "sde": VPSDE()}, ValueError, "time: 'index' needs a ladder"),
    ({"time": "999t", "sde": LADDER}, ValueError, "time: '999t' needs a continuous SDE"),
    ({"sde": "vp"}, TypeError, "sde: expected one of VESDE"),
    ({"sample_shape": 3}, TypeError, "sample_shape: expected a tuple of sizes"),
    ({"sample_shape": "3"}, TypeError, "sample_shape: expected a tuple of sizes"),
    ({"sample_shape": (3, 0)}, ValueError, "sample_shape: expected an integer ≥ 1, got 0"),
    ({"sample_shape": (3, 2.0)}, TypeError, "sample_shape: expected an integer"),
    ({"sigma_data": 0.0}, ValueError, "sigma_data: expected a finite number > 0"),
    ({"sigma_data": None}, TypeError, "sigma_data: expected a number"),
    ({"null_cond": 3}, TypeError, "null_cond: expected a dict"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_bad_models(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ScoreModel(**{"net": identity, **arguments})


def test_bad_matches() -> None:
    with pytest.raises(ValueError, match=r"^coordinate: expected 'x' or 'x/m', got 'y'"):
        ScoreModel(identity).match(VPSDE(), 0.5, "y")
    with pytest.raises(TypeError, match=r"^sde: expected one of"):
        ScoreModel(identity).match("vp", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^time: 'index' needs a ladder"):
        ScoreModel(identity, time="index").match(VPSDE(), 0.5)
    with pytest.raises(ValueError, match=r"^time: '999t' needs a continuous"):
        ScoreModel(identity, time="999t").match(LADDER, 5)


def test_calls_and_attributes() -> None:
    def net(x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        return x * label + cond.get("shift", 0.0)

    model = ScoreModel(net, "eps", sample_shape=torch.Size([3, 4]), null_cond={"shift": 0.0})
    x = torch.ones(2)
    assert model(x, torch.tensor(2.0), shift=1.0).tolist() == [3.0, 3.0]
    assert model.sample_shape == (3, 4) and type(model.sample_shape) is tuple
    assert model.null_cond == {"shift": 0.0} and model.sde is None and model.sigma_data == 0.5
    assert model.net is net and model.time == "t" and model.predicts == "eps"
    assert "predicts='eps', time='t', sde=None, sample_shape=(3, 4)" in repr(model)


class Knows(nn.Module):
    predicts = "v"
    time = "log_sigma"
    sample_shape = (2,)
    sigma_data = 0.3
    sde = VESDE()
    null_cond = None

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x


class KnowsLittle(nn.Module):
    predicts = "eps"

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x


def test_as_score_model() -> None:
    model = ScoreModel(identity)
    assert as_score_model(model, VPSDE()) is model

    module = Knows()
    wrapped = as_score_model(module, VPSDE())
    assert wrapped.net is module and wrapped.sde == VESDE() and wrapped.null_cond is None
    assert (wrapped.predicts, wrapped.time, wrapped.sample_shape) == ("v", "log_sigma", (2,))
    assert wrapped.sigma_data == 0.3

    little = as_score_model(KnowsLittle(), VPSDE())
    assert (little.predicts, little.time, little.sde, little.sample_shape) == (
        "eps",
        "t",
        None,
        None,
    )
    assert little.match(VPSDE(), 0.5).time == 0.5

    for bare in (identity, nn.Identity()):
        score = as_score_model(bare, SubVPSDE())
        assert (score.predicts, score.time, score.sde) == ("score", "t", SubVPSDE())
        match = score.match(SubVPSDE(), 0.25)
        assert match.score == Affine(0.0, 1.0) and match.label == 0.25 and match.c_in == 1

    for bad in ("net.pt", None, Knows, torch.zeros(2)):
        with pytest.raises(TypeError, match=r"^model: expected a ScoreModel"):
            as_score_model(bad, VPSDE())
    with pytest.raises(TypeError, match=r"^sde: expected"):
        as_score_model(identity, "vp")
    module.predicts = "noise"
    with pytest.raises(ValueError, match=r"^predicts: expected one of"):
        as_score_model(module, VPSDE())
