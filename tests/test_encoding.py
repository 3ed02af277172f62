"""`encode`, `interpolate` and `sample(method="ode", solver="dopri5")`: what every argument does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from click.testing import CliRunner
from torch import Tensor

from sbm_fast import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMSchedule,
    NCSNLadder,
    Sampler,
    ScoreModel,
    SubVPSDE,
    cli,
    encode,
    interpolate,
    noise,
    sample,
)
from sbm_fast.sde import SDE

NAN, INF = float("nan"), float("inf")
SDES: list[SDE] = [VESDE(0.05, 8.0), VPSDE(), SubVPSDE(), EDMSDE(0.02, 10.0)]
VE = SDES[0]
every_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def denoises(x: Tensor, sigma: Tensor, shift: Any = 0.25) -> Tensor:
    """D of data of about unit scale at x/m: sample by sample, of exactly rounded operations."""
    shift = torch.as_tensor(shift, dtype=x.dtype, device=x.device)
    shift = shift.reshape(-1, *[1] * (x.dim() - 1)) if shift.dim() else shift
    r = sigma.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return (x + r * r * shift / (1.0 + 0.2 * x * x)) / (1.0 + r * r)


def model(**more: Any) -> ScoreModel:
    """Trained under a VE SDE, so that its input is x/m."""
    return ScoreModel(denoises, "x0", "sigma", VESDE(1e-4, 200.0), **more)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def flowed(shape: tuple[int, ...] = (4, 6), sde: SDE = VE, **more: Any) -> Any:
    options = {"seed": 0, "solver": "dopri5", **LOOSE, **more}
    return sample(options.pop("model", model()), sde, shape, method="ode", **options)


@every_sde
def test_encoding_and_sampling_invert_each_other(sde: SDE) -> None:
    x = draw(5, 3)
    z, info = encode(model(), sde, x, return_info=True)
    assert z.shape == x.shape and z.dtype == torch.float32 and info.finished.all()
    assert float(z.std()) == pytest.approx(sde.prior_std, rel=0.5)
    back = flowed((5, 3), sde, x_init=z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=5e-4)
    again = encode(model(), sde, back)
    torch.testing.assert_close(again, z, rtol=1e-3, atol=5e-4 * sde.prior_std)


@every_sde
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_fixed_grids_approach_the_adaptive_solver(sde: SDE, solver: str) -> None:
    x, tight = draw(4, 3).double(), {"rtol": 1e-9, "atol": 1e-9}
    exact = encode(model(), sde, x, dtype=torch.float64, **tight)
    order = {"euler": 1, "heun": 2, "rk4": 4}[solver]
    errors = []
    for steps in {"euler": (50, 100), "heun": (30, 60), "rk4": (24, 48)}[solver]:
        z, info = encode(model(), sde, x, solver=solver, steps=steps, dtype=torch.float64,
                         return_info=True)  # fmt: skip
        errors.append(float((z - exact).abs().max()))
        stages = {"euler": 1, "heun": 2, "rk4": 4}[solver]
        assert info.nfe.tolist() == [stages * steps] * 4 and info.finished.all()
    # Orders to the digit are those of test_ode_accuracy; here the grid is still coarse.
    assert errors[1] < errors[0] / 2 ** (order - 1)
    assert errors[1] < {"euler": 0.2, "heun": 0.02, "rk4": 2e-3}[solver] * sde.prior_std


@every_sde
def test_a_grid_there_and_the_plans_grid_back(sde: SDE) -> None:
    """Two discretisations on the same times; what is left is their error."""
    x, left = draw(4, 3).double(), []
    times = {n: np.geomspace(sde.t_max, max(sde.t_min, 0.01), n + 1) for n in (20, 40)}
    for grid in times.values():
        ends: dict[str, Any] = {"t_min": float(grid[-1]), "dtype": torch.float64}
        z = encode(model(), sde, x, solver="rk4", schedule=grid, **ends)
        back = sample(model(), sde, (4, 3), method="ode", solver="rk4", schedule=grid, x_init=z,
                      **ends)  # fmt: skip
        left.append(float((back - x).abs().max()))
    assert left[1] < 0.02 and left[1] < 0.3 * left[0]


def test_torchdiffeq_encodes_alike() -> None:
    pytest.importorskip("torchdiffeq")
    x = draw(4, 3)
    z = encode(model(), VE, x)
    torch.testing.assert_close(
        encode(model(), VE, x, solver="torchdiffeq:dopri5", batch_size=3), z, rtol=1e-3, atol=1e-3
    )
    assert flowed(solver="torchdiffeq:dopri5", batch_size=3).shape == (4, 6)


@every_sde
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_the_batch(sde: SDE, dtype: torch.dtype) -> None:
    x = draw(11, 3) * torch.logspace(-1, 1, 11)[:, None]
    run: dict[str, Any] = {"dtype": dtype, **LOOSE}
    whole = encode(model(), sde, x, **run)
    for batch_size in (1, 4, 50):
        assert torch.equal(encode(model(), sde, x, batch_size=batch_size, **run), whole)
    parts = [encode(model(), sde, part, **run) for part in x.split(3)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encode(model(), sde, x[order], **run), whole[order])


def test_data_of_any_kind() -> None:
    x = draw(5, 2, 3, 4)
    z = encode(model(), VE, x, **LOOSE)
    kept = x.clone()
    for other in (
        x.double(),
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        x[:, :, :, ::1].requires_grad_(),
        torch.stack([x, x], -1)[..., 0],
    ):
        assert torch.equal(encode(model(), VE, other, **LOOSE), z)
    assert torch.equal(x, kept)
    half = encode(model(), VE, x.half(), **LOOSE)
    assert torch.equal(half, encode(model(), VE, x.half().float(), **LOOSE))
    for shape in ((0, 3), (0,), (4,), (1, 1), (3, 0)):
        for solver in ("dopri5", "rk4"):
            steps = 3 if solver == "rk4" else None
            empty = encode(model(), VE, torch.zeros(shape), solver=solver, steps=steps)
            assert empty.shape == shape
    flat = encode(model(), VE, x[:, 0, 0, 0], **LOOSE)
    assert flat.shape == (5,) and flat.isfinite().all()


def gaussian(std: float) -> ScoreModel:
    """Data N(0, std²)."""

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        r = sigma.reshape(-1, *[1] * (x.dim() - 1))
        return std**2 / (std**2 + r**2) * x

    return ScoreModel(net, "x0", "sigma", VESDE(1e-4, 200.0))


def circle(a: Tensor, b: Tensor, w: float) -> Tensor:
    """The docstring's formula."""
    a, b = a.double(), b.double()
    angle = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    return (math.sin((1 - w) * angle) * a + math.sin(w * angle) * b) / math.sin(angle)


def test_points_on_a_great_circle() -> None:
    """Gaussian data: latents are data times a number, so data lie on a great circle too."""
    a, b = draw(4), 3 * draw(4, seed=1)
    for num in (2, 3, 6):
        path = interpolate(gaussian(0.7), VPSDE(), a, b, num)
        assert path.shape == (num, 4) and path.dtype == torch.float32
        for i, point in enumerate(path.double()):
            torch.testing.assert_close(point, circle(a, b, i / (num - 1)), rtol=1e-4, atol=1e-4)


@every_sde
def test_a_path_ends_at_the_data(sde: SDE) -> None:
    a, b = draw(2, 3), draw(2, 3, seed=1)
    path = interpolate(model(), sde, a, b, 4, batch_size=3)
    assert path.shape == (4, 2, 3)
    torch.testing.assert_close(path[0], a, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(path[-1], b, rtol=1e-3, atol=1e-3)
    z = encode(model(), sde, torch.stack([a, b]))
    between = torch.stack([circle(*z, i / 3) for i in range(4)]).float()
    decoded = flowed((4, 2, 3), sde, x_init=between, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path, decoded, rtol=1e-4, atol=1e-4)


def test_a_path_on_a_grid() -> None:
    """Encoded and decoded on the grid of one solver."""
    a, b = draw(3), draw(3, seed=1)
    path = interpolate(model(), VE, a, b, 3, solver="rk4", steps=30)
    expected = interpolate(model(), VE, a, b, 3)
    torch.testing.assert_close(path, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(path[[0, 2]], torch.stack([a, b]), rtol=1e-4, atol=1e-4)


def test_paths_without_a_circle() -> None:
    net, x = gaussian(0.7), draw(3)
    for a, b in ((x, x), (x, 2 * x), (x, -x), (x, 0 * x), (0 * x, 0 * x)):
        path = interpolate(net, VPSDE(), a, b, 3)
        assert path.isfinite().all()
        torch.testing.assert_close(path[[0, 2]], torch.stack([a, b]), rtol=1e-3, atol=1e-3)
        middle = (a + b) / (math.sqrt(2) if not b.any() else 2)
        torch.testing.assert_close(path[1], middle, rtol=1e-3, atol=1e-3)
    scalar = interpolate(lambda x, t: -x, VPSDE(), torch.tensor(0.3), torch.tensor(0.9), 3)
    assert scalar.tolist() == pytest.approx([0.3, 0.6, 0.9], abs=1e-3)


def test_conditioning_of_a_path_is_the_same_for_all_points() -> None:
    a, b = draw(3), draw(3, seed=1)
    seen = set()

    def net(x: Tensor, sigma: Tensor, shift: Any = 0.0, code: Any = None) -> Tensor:
        seen.add((tuple(torch.as_tensor(shift).shape), len(x)))
        assert code is None or code.shape == (5, 2)
        return denoises(x, sigma, shift)

    own = ScoreModel(net, "x0", "sigma")
    path = interpolate(own, VE, a, b, 4, cond={"shift": 0.7}, **LOOSE)
    seen.clear()
    one = interpolate(own, VE, a, b, 4, cond={"shift": torch.tensor([0.7])}, **LOOSE)
    assert all(shape == (n,) for shape, n in seen)  # one for each sample, as in sampling
    other = {"shift": torch.tensor(0.7), "code": torch.zeros(5, 2)}
    assert torch.equal(one, path)
    assert torch.equal(interpolate(own, VE, a, b, 4, cond=other, **LOOSE), path)
    for n in (2, 4):
        with pytest.raises(ValueError, match=r"^cond: .*first dimension of 'shift'.* got \d"):
            interpolate(own, VE, a, b, 4, cond={"shift": torch.zeros(n)})


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


# The adaptive sampler.


@every_sde
@pytest.mark.parametrize("part", [1.0, 0.6])
def test_samples_begin_with_the_noise_of_the_plans(sde: SDE, part: float) -> None:
    ends = {"t_max": part * sde.t_max} if part < 1 else {}
    x = flowed((4, 6), sde, seed=3, rtol=1e-6, atol=1e-6, **ends)
    plan = sample(model(), sde, (4, 6), method="ode", solver="rk4", steps=100, seed=3,
                  schedule="log_snr", **ends)  # fmt: skip
    torch.testing.assert_close(x, plan, rtol=1e-3, atol=1e-3)
    plans = Sampler(model(), sde, (4, 6), method="ode", solver="rk4", steps=100, **ends)
    start = plans.start(seed=3).advance(1).x
    torch.testing.assert_close(
        flowed((4, 6), sde, x_init=start, rtol=1e-6, atol=1e-6, **ends), x, rtol=3e-6, atol=1e-6
    )
    other = flowed((4, 6), sde, seed=4, **ends)
    assert float((other - x).abs().max()) > 0.1


def test_samples_follow_their_seed_and_keys() -> None:
    x = flowed()
    assert torch.equal(flowed(), x) and not torch.equal(flowed(seed=1), x)
    assert torch.equal(flowed(seed=None, keys=noise.keys(0, 4)), x)
    assert torch.equal(flowed((2, 6), first_sample=2), x[2:])
    assert torch.equal(torch.cat([flowed((1, 6), first_sample=i) for i in range(4)]), x)
    assert torch.equal(flowed(batch_size=3), x)
    torch.manual_seed(5)
    drawn, info = flowed(seed=None, return_info=True)
    torch.manual_seed(5)
    assert torch.equal(flowed(seed=None), drawn)
    assert torch.equal(flowed(seed=info.seed), drawn)
    before = torch.get_rng_state()
    flowed()
    assert torch.equal(torch.get_rng_state(), before)


def test_float64_samples() -> None:
    x = flowed(dtype=torch.float64, rtol=1e-9, atol=1e-9)
    assert x.dtype == torch.float64
    torch.testing.assert_close(flowed(rtol=1e-6, atol=1e-6).double(), x, rtol=1e-4, atol=1e-5)


def test_shapes_of_samples() -> None:
    known = model(sample_shape=(3, 2))
    assert flowed(None, model=known, num_samples=3).shape == (3, 3, 2)  # type: ignore[arg-type]
    for shape in ((0, 3), (3, 0), (5,), (1, 2, 3, 4)):
        x, info = flowed(shape, return_info=True)
        assert x.shape == shape and info.nfe_of.shape == shape[:1]
        assert x.isfinite().all() and (info.nfe > 0) == (shape[0] > 0)


def test_a_given_start_is_left_alone() -> None:
    start = 8 * draw(4, 6).double()
    kept = start.clone()
    x = flowed(x_init=start, seed=None)
    assert torch.equal(start, kept) and torch.equal(flowed(x_init=start.float()), x)


def test_info_says_what_was_done() -> None:
    calls = []

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return denoises(x, sigma)

    x, info = flowed((5, 3), model=ScoreModel(net, "x0", "sigma"), return_info=True, seed=7)
    assert info.nfe_of.dtype == torch.int64 and int(info.nfe_of.sum()) == sum(calls)
    assert info.nfe == int(info.nfe_of.max()) == len(calls) and info.seed == 7
    assert info.plan is None and info.backend in ("cpu", "eager")
    assert info.seconds == pytest.approx(info.seconds_network + info.seconds_sampler)
    assert info.seconds_network > 0 and info.seconds_sampler > 0
    assert flowed(seed=None, keys=noise.keys(0, 4), return_info=True)[1].seed is None
    plan = sample(cases.network, VE, (2, 3), method="ode", steps=3, return_info=True)[1]
    assert plan.nfe_of is None and plan.plan is not None
    eager, other = flowed((5, 3), backend="eager", return_info=True, seed=7)
    assert other.backend == "eager"
    torch.testing.assert_close(eager, x, rtol=1e-4, atol=1e-4)


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


def test_modes_of_the_caller() -> None:
    x, start = draw(4, 3), 8 * draw(4, 3, seed=1)
    net = cases.Net()
    own = ScoreModel(net, "x0", "sigma", VESDE(1e-4, 200.0))
    z, y = encode(own, VE, x, **LOOSE), flowed((4, 3), model=own, x_init=start)
    with torch.no_grad():
        assert torch.equal(encode(own, VE, x, **LOOSE), z)
    with torch.inference_mode():
        given, label = x.clone(), torch.zeros(4)
        assert given.is_inference()
        again = encode(own, VE, given, cond={"label": label}, **LOOSE)
        assert torch.equal(again, z)
        assert torch.equal(flowed((4, 3), model=own, x_init=start.clone(), batch_size=2), y)
        assert interpolate(own, VE, given[0], given[1], 3, **LOOSE).shape == (3, 3)
        grid = encode(own, VE, given, solver="heun", steps=4)
    assert grid.isfinite().all() and net.scale.grad is None
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(encode(model(), VE, x, **LOOSE), encode(model(), VE, x, **LOOSE))
        wide = encode(model(), VE, x, **LOOSE), flowed((4, 3), x_init=start)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(wide[0], encode(model(), VE, x, **LOOSE))
    assert torch.equal(wide[1], flowed((4, 3), x_init=start))


def test_the_default_device_does_not_matter_where_one_is_given() -> None:
    x = draw(4, 3)
    plain = [
        encode(model(), VE, x, **LOOSE),
        encode(model(), VE, x, solver="rk4", steps=5, schedule="log_snr"),
        encode(model(), VE, x, solver="heun", steps=5, batch_size=3),
        interpolate(model(), VE, x[0], x[1], 3, **LOOSE),
        flowed((4, 3)),
        flowed((4, 3), sde=NCSNLadder.geometric(8.0, 0.05, 9)),
    ]
    on: dict[str, Any] = {"device": "cpu"}
    with torch.device("meta"):
        there = [
            encode(model(), VE, x, **LOOSE, **on),
            encode(model(), VE, x, solver="rk4", steps=5, schedule="log_snr", **on),
            encode(model(), VE, x, solver="heun", steps=5, batch_size=3, **on),
            interpolate(model(), VE, x[0], x[1], 3, **LOOSE, **on),
            flowed((4, 3), **on),
            flowed((4, 3), sde=NCSNLadder.geometric(8.0, 0.05, 9), **on),
        ]
    assert all(torch.equal(a, b) for a, b in zip(there, plain, strict=True))


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    encode(model(), VE, draw(3, 2), progress=True, **LOOSE)
    assert "3/3" in capsys.readouterr().err
    flowed((5, 2), progress=True)
    assert "5/5" in capsys.readouterr().err
    encode(model(), VE, draw(3, 2), **LOOSE)
    assert capsys.readouterr().err == ""


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(sample_shape=(1, 8, 8))
    monkeypatch.setattr("sbm_fast.nn.shipped.digits", lambda: net)

    def run(*arguments: str) -> Any:
        out = str(tmp_path / "x.npz")
        return CliRunner().invoke(
            cli.main, ["sample", "--method", "ode", "--num", "1", "--seed", "2", "--out", out,
                       "-o", "solver=dopri5", *arguments],
        )  # fmt: skip

    result = run("-o", "rtol=0.1", "-o", "atol=0.1")
    assert result.exit_code == 0, result.output
    assert "ode, adaptive" in result.output and "seed      2" in result.output
    assert np.load(tmp_path / "x.npz")["samples"].shape == (1, 1, 8, 8)
    for arguments, message in (
        (("--steps", "5"), "steps: solver 'dopri5' follows"),
        (("-o", "rtol=-1"), "rtol: expected a finite number > 0"),
        (("-o", "rtoll=1"), "did you mean 'rtol'"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 1 and message in refused.output
