"""`encode` and `interpolate`: inverses, grids, batches, kinds of data, paths, callers' modes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from encoding_cases import LOOSE, VE, denoises, draw, every_sde, flowed, model
from torch import Tensor

from sbm_fast import VESDE, VPSDE, NCSNLadder, ScoreModel, encode, interpolate, sample
from sbm_fast.sde import SDE


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
