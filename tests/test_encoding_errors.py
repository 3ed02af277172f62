"""What `encode`, `interpolate` and adaptive sampling refuse, and how they name it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from encoding_cases import VE, draw, flowed, model
from torch import Tensor

from sbm_fast import (
    DDPMSchedule,
    NCSNLadder,
    Sampler,
    ScoreModel,
    encode,
    interpolate,
    noise,
    sample,
)

NAN, INF = float("nan"), float("inf")

NETS: dict[str, Any] = {
    "flat": ScoreModel(cases.network, sample_shape=(5,)),
    "index": ScoreModel(cases.network, time="index"),
    "narrow": ScoreModel(cases.network, sde=NCSNLadder([0.5, 0.1]), time="index"),
    "guided": ScoreModel(lambda x, t, c=0: -x, null_cond={}),
}
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("model", TypeError, {"model": None}),
    ("model", TypeError, {"model": "unet.pt"}),
    ("sde", TypeError, {"sde": "vp"}),
    ("sde", TypeError, {"sde": None}),
    ("time", ValueError, {"model": NETS["index"]}),
    ("t", ValueError, {"model": NETS["narrow"]}),
    ("solver", ValueError, {"solver": "rk45"}),
    ("solver", ValueError, {"solver": None}),
    ("solver", ValueError, {"solver": 5}),
    ("solver", ValueError, {"solver": ["rk4", "heun"]}),
    ("solver", ValueError, {"solver": "torchdiffeq:rk45"}),
    ("solver", ValueError, {"solver": "torchdiffeq:"}),
    ("steps", ValueError, {"steps": 10}),
    ("steps", ValueError, {"solver": "rk4", "steps": 0}),
    ("steps", TypeError, {"solver": "rk4", "steps": 2.5}),
    ("steps", TypeError, {"solver": "rk4", "steps": "10"}),
    ("steps", ValueError, {"solver": "torchdiffeq:dopri5", "steps": 10}),
    ("schedule", ValueError, {"schedule": "karras"}),
    ("schedule", ValueError, {"schedule": [1.0, 0.5]}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": "cosine"}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": "trailing"}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": [0.1, 0.5, 1.0], "t_min": 0.1}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": [1.0, 0.5]}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": [0.9, 0.5], "t_min": 0.5}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": [1.0]}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": []}),
    ("schedule", ValueError,
     {"solver": "rk4", "schedule": [1.0, 0.5], "t_min": 0.5, "steps": 2}),
    ("schedule", TypeError, {"solver": "rk4", "schedule": {}}),
    ("schedule", ValueError, {"solver": "rk4", "schedule": 3.0}),
    *((name, ValueError, {name: bad}) for name in ("rtol", "atol") for bad in (0, -1, NAN, INF)),
    *((name, TypeError, {name: bad}) for name in ("rtol", "atol") for bad in ("1e-5", None, True)),
    ("max_nfe", ValueError, {"max_nfe": 0}),
    ("max_nfe", TypeError, {"max_nfe": 10.0}),
    ("max_nfe", TypeError, {"max_nfe": None}),
    ("batch_size", ValueError, {"batch_size": 0}),
    ("batch_size", TypeError, {"batch_size": 2.0}),
    ("t_min", ValueError, {"t_min": 0.0}),
    ("t_min", ValueError, {"t_min": -0.1}),
    ("t_min", ValueError, {"t_min": 1.0}),
    ("t_min", ValueError, {"t_min": 0.5, "t_max": 0.5}),
    ("t_min", ValueError, {"t_min": 0.7, "t_max": 0.5}),
    ("t_min", TypeError, {"t_min": "0.1"}),
    ("t_min", ValueError, {"sde": DDPMSchedule.linear(9), "t_min": 3, "t_max": 3}),
    ("t_min", ValueError, {"sde": DDPMSchedule.linear(9), "t_min": 2.5}),
    ("t_max", ValueError, {"t_max": 1.5}),
    ("t_max", ValueError, {"t_max": 1e-4}),
    ("t_max", TypeError, {"t_max": torch.ones(2)}),
    ("cond", TypeError, {"cond": torch.zeros(4)}),
    ("cond", TypeError, {"cond": [1]}),
    ("dtype", TypeError, {"dtype": torch.float16}),
    ("dtype", TypeError, {"dtype": "float32"}),
    ("net_dtype", TypeError, {"net_dtype": torch.int8}),
    ("device", ValueError, {"device": "tpu?"}),
    ("device", ValueError, {"device": "meta"}),
    ("backend", ValueError, {"backend": "gpu"}),
    ("backend", ValueError, {"backend": None}),
    ("model", ValueError, {"model": lambda x, t: None}),
    ("model", ValueError, {"model": lambda x, t: x * NAN}),
]  # fmt: skip
BAD_DATA: list[tuple[type[Exception], Any, dict[str, Any]]] = [
    (TypeError, torch.zeros(4, 6, dtype=torch.int64), {}),
    (TypeError, torch.zeros(4, 6, dtype=torch.bool), {}),
    (TypeError, torch.zeros(4, 6, dtype=torch.complex64), {}),
    (TypeError, np.zeros((4, 6), np.float32), {}),
    (TypeError, [[0.0] * 6] * 4, {}),
    (TypeError, None, {}),
    (ValueError, torch.tensor(0.5), {}),
    (ValueError, torch.zeros(4, 6), {"model": NETS["flat"]}),
    (ValueError, torch.full((4, 6), NAN), {}),
    (ValueError, torch.full((4, 6), INF), {}),
    (ValueError, torch.full((4, 6), 1e300, dtype=torch.float64), {}),
]

ADAPTIVE = ("dopri5", "torchdiffeq:rk45", "torchdiffeq:")


def check_refused(name: str, error: type[Exception], call: Any) -> None:
    with pytest.raises(error, match=rf"^{name}: ") as caught:
        call()
    assert len(str(caught.value)) > len(name) + 15  # what was expected and what came


@pytest.mark.parametrize(("name", "error", "arguments"), BAD)
def test_bad_input_is_named(name: str, error: type[Exception], arguments: dict[str, Any]) -> None:
    given = {"model": cases.network, "sde": cases.VP, **arguments}
    net, sde = given.pop("model"), given.pop("sde")
    x = draw(4, 6)
    check_refused(name, error, lambda: encode(net, sde, x, **given))
    check_refused(name, error, lambda: interpolate(net, sde, x[0], x[1], **given))
    if not {"schedule", "steps"} & set(given) and given.get("solver", "dopri5") in ADAPTIVE:
        options = {"method": "ode", "solver": "dopri5", **given}
        check_refused(name, error, lambda: sample(net, sde, (4, 6), **options))


@pytest.mark.parametrize(("error", "x", "more"), BAD_DATA)
def test_bad_data_are_named(error: type[Exception], x: Any, more: dict[str, Any]) -> None:
    net = more.get("model", cases.network)
    check_refused("x", error, lambda: encode(net, cases.VP, x))
    good = torch.zeros(6)
    one = x[0] if isinstance(x, Tensor) and x.dim() else x
    if isinstance(x, Tensor) and not x.dim():
        return  # a sample may be a number
    check_refused("x_a", error, lambda: interpolate(net, cases.VP, one, good))
    if not more:
        check_refused("x_b", error, lambda: interpolate(net, cases.VP, good, one))


def test_bad_points_are_named() -> None:
    a = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^x: holds .* first in sample 2$"):
        encode(model(), VE, torch.tensor([[0.0], [1.0], [NAN], [INF]]))
    with pytest.raises(ValueError, match=r"^x_b: expected the shape of x_a, \(3,\)"):
        interpolate(model(), VE, a, torch.zeros(4))
    for num, error in ((1, ValueError), (0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^num: expected an integer ≥ 2, got"):
            interpolate(model(), VE, a, a, num)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_max_nfe_warns_and_gives_what_there_is(solver: str) -> None:
    x = draw(4, 3)
    if solver == "rk4":  # a grid is what was asked for
        assert encode(model(), VE, x, solver="rk4", max_nfe=3, return_info=True)[1].finished.all()
        return
    with pytest.warns(UserWarning, match=r"^max_nfe: 4 of 4 samples were left on the way after 1"):
        z, info = encode(model(), VE, x, max_nfe=20, return_info=True)
    assert info.nfe.tolist() == [19] * 4 and not info.finished.any() and z.isfinite().all()
    with pytest.warns(UserWarning, match=r"^max_nfe: 4 of 4 samples"):
        assert flowed(max_nfe=8).shape == (4, 6)


REFUSED: dict[str, Any] = {
    "steps": 10,
    "schedule": "karras",
    "denoise": "tweedie",
    "clip_denoised": 1.0,
    "noise": lambda draw, stream: None,
    "compat": "score_sde",
    "cuda_graph": True,
    "callback": print,
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_mean_nothing_here_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: solver 'dopri5' follows .*expected none"):
        flowed(**{name: REFUSED[name]})


def test_arguments_that_say_nothing_are_taken() -> None:
    x = flowed()
    for more in ({"denoise": False}, {"cuda_graph": False}, {"cuda_graph": "auto"}):
        assert torch.equal(flowed(**more), x)
    for more in ({"denoise": np.ones(2)}, {"denoise": True}, {"cuda_graph": "yes"}):
        with pytest.raises(ValueError, match=rf"^{next(iter(more))}: "):
            flowed(**more)
    for wrong in (None, 0, 1, np.ones(2)):
        with pytest.raises(TypeError, match=r"^cuda_graph: expected"):
            flowed(cuda_graph=wrong)


BAD_SAMPLING: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("shape", ValueError, {"shape": None}),
    ("shape", TypeError, {"shape": 4}),
    ("seed", TypeError, {"seed": 1.5}),
    ("keys", ValueError, {"seed": 0, "keys": noise.keys(0, 4)}),
    ("keys", ValueError, {"seed": None, "keys": noise.keys(0, 3)}),
    ("keys", TypeError, {"seed": None, "keys": [1, 2, 3, 4]}),
    ("first_sample", ValueError, {"first_sample": -1}),
    ("x_init", ValueError, {"x_init": torch.zeros(4, 5)}),
    ("x_init", ValueError, {"x_init": torch.full((4, 6), NAN)}),
    ("x_init", TypeError, {"x_init": [[0.0] * 6] * 4}),
    ("guidance", ValueError, {"guidance": 2.0}),
    ("guidance", ValueError, {"model": NETS["guided"], "guidance": torch.ones(3)}),
    ("guidance", TypeError, {"model": NETS["guided"], "guidance": "much"}),
    ("rtoll", TypeError, {"rtoll": 1e-3}),
    ("snr", TypeError, {"snr": 0.1}),
]


@pytest.mark.parametrize(("name", "error", "arguments"), BAD_SAMPLING)
def test_bad_input_of_sample(name: str, error: type[Exception], arguments: dict[str, Any]) -> None:
    check_refused(name, error, lambda: flowed(**{"shape": (4, 6), **arguments}))


def test_who_else_hears_of_adaptive_solvers() -> None:
    with pytest.raises(TypeError, match=r"^rtoll: no option .*did you mean 'rtol'\?"):
        flowed(rtoll=1e-3)
    with pytest.raises(ValueError, match=r"^solver: unknown value 'dopri'; did you mean 'dopri5'"):
        sample(model(), VE, (2, 3), method="ode", solver="dopri")
    with pytest.raises(TypeError, match=r"^solver: no option of method 'em'"):
        sample(cases.network, VE, (2, 3), method="em", solver="dopri5")
    with pytest.raises(TypeError, match=r"^rtol: no option of method 'ode'"):
        sample(cases.network, VE, (2, 3), method="ode", solver="rk4", rtol=1e-3)
    with pytest.raises(ValueError, match=r"^solver: 'dopri5' makes its own steps.*sample"):
        Sampler(cases.network, VE, (2, 3), method="ode", solver="dopri5")
