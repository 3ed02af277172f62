"""Time grids against their formulas, and against the published grids of EDM, DDIM and diffusers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbm_fast.schedule import KINDS, time_grid
from sbm_fast.sde import EDMSDE, SDE, VESDE, VPSDE, DDPMSchedule, NCSNLadder, SubVPSDE

CONTINUOUS: list[SDE] = [VESDE(), VPSDE(), SubVPSDE(), EDMSDE()]
LADDER = DDPMSchedule.linear(1000)
sdes = pytest.mark.parametrize("sde", CONTINUOUS, ids=lambda sde: type(sde).__name__)
reproducible = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@sdes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 500])
def test_grids_decrease_from_end_to_end(sde: SDE, kind: str, steps: int) -> None:
    grid = time_grid(sde, steps, kind)
    assert grid.dtype == np.float64 and grid.shape == (steps,)
    assert grid[0] == sde.t_max and (np.diff(grid) < 0).all()
    if steps > 1 and kind != "trailing":
        assert grid[-1] == sde.t_min
    assert (time_grid(sde, np.int64(steps), kind) == grid).all()


@sdes
def test_formulas(sde: SDE) -> None:
    n, high, low = 11, sde.t_max * 0.9, sde.t_min * 3
    u = np.arange(n) / (n - 1)

    def grid(kind: str, **options: float) -> np.ndarray:
        return time_grid(sde, n, kind, t_max=high, t_min=low, **options)

    r0, r1 = sde.nsr(high), sde.nsr(low)
    close: dict[str, Any] = {"rtol": 1e-12}
    np.testing.assert_allclose(grid("uniform"), high + u * (low - high), **close)
    np.testing.assert_allclose(np.sqrt(grid("quadratic")), high**0.5 * (1 - u) + low**0.5 * u)
    logs = np.log(r0) * (1 - u) + np.log(r1) * u
    np.testing.assert_allclose(sde.nsr(grid("log_snr")), np.exp(logs), **close)
    for rho in (7.0, 3.0, 1.0):
        root = r0 ** (1 / rho) * (1 - u) + r1 ** (1 / rho) * u
        np.testing.assert_allclose(sde.nsr(grid("karras", rho=rho)), root**rho, **close)
    np.testing.assert_array_equal(grid("karras"), grid("karras", rho=7))
    trailing = time_grid(sde, n, "trailing", t_max=high)
    np.testing.assert_allclose(trailing, high * (1 - np.arange(n) / n), **close)


def test_edm_grid() -> None:
    """Karras et al. 2022, eq. 5 with the paper's CIFAR-10 settings."""
    i = np.arange(18)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = time_grid(EDMSDE(), 18, "karras")
    np.testing.assert_allclose(grid, sigmas, rtol=1e-13)
    assert grid[0] == 80.0 and grid[-1] == 0.002


def test_ladder_grids_of_the_papers() -> None:
    np.testing.assert_array_equal(time_grid(LADDER, 1000, "uniform"), np.arange(999, -1, -1))
    # diffusers' "linspace" and "trailing" (Lin et al. 2024, Table 2)
    linspace = np.linspace(0, 999, 25).round()[::-1]
    np.testing.assert_array_equal(time_grid(LADDER, 25, "uniform"), linspace)
    for steps in range(2, 501):  # half levels go to the even one, as np.round and round do
        exact = [round(Fraction(999 * k, steps - 1)) for k in range(steps - 1, -1, -1)]
        np.testing.assert_array_equal(time_grid(LADDER, steps, "uniform"), exact)
    for steps in (10, 16, 50, 999, 1000):
        trailing = np.round(np.arange(steps, 0, -1) * 1000 / steps) - 1
        np.testing.assert_array_equal(time_grid(LADDER, steps, "trailing"), trailing)
    assert time_grid(LADDER, 10, "trailing").tolist() == list(range(999, 0, -100))
    # DDIM's quadratic spacing, c·i² up to rounding
    quadratic = (np.linspace(0, math.sqrt(999), 10) ** 2).round()[::-1]
    np.testing.assert_array_equal(time_grid(LADDER, 10, "quadratic"), quadratic)


@pytest.mark.parametrize("kind", ["karras", "log_snr"])
def test_ladder_levels_are_nearest_to_the_wanted_noise(kind: str) -> None:
    grid = time_grid(LADDER, 10, kind)
    u = np.linspace(0, 1, 10)
    high, low = LADDER.nsr(999), LADDER.nsr(0)
    wanted = (
        (high ** (1 / 7) * (1 - u) + low ** (1 / 7) * u) ** 7
        if kind == "karras"
        else np.exp(np.log(high) * (1 - u) + np.log(low) * u)
    )
    log_nsr = np.log(LADDER.nsr(np.arange(1000)))
    nearest = [int(np.argmin(abs(log_nsr - math.log(r)))) for r in wanted]
    np.testing.assert_array_equal(grid, nearest)


@reproducible
@given(
    levels=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    ladder=st.sampled_from(["ncsn", "linear", "cosine"]),
    data=st.data(),
)
def test_ladder_grids_are_distinct_levels(
    levels: int, kind: str, ladder: str, data: st.DataObject
) -> None:
    sde: SDE = {
        "ncsn": lambda: NCSNLadder(np.geomspace(1e-3, 1e3, levels)),
        "linear": lambda: DDPMSchedule.linear(levels),
        "cosine": lambda: DDPMSchedule.cosine(levels),
    }[ladder]()
    low = data.draw(st.integers(0, levels - 1))
    high = data.draw(st.integers(low, levels - 1))
    steps = data.draw(st.integers(1, high - low + 1))
    grid = time_grid(sde, steps, kind, t_max=high, t_min=low)
    assert grid.shape == (steps,) and grid[0] == high and grid[-1] >= low
    assert (grid == np.rint(grid)).all() and (np.diff(grid) <= -1).all()
    if steps > 1 and kind != "trailing":
        assert grid[-1] == low
    if steps == high - low + 1:
        np.testing.assert_array_equal(grid, np.arange(high, low - 1, -1))
    with pytest.raises(ValueError, match=r"^steps: the ladder has \d+ levels in its range"):
        time_grid(sde, high - low + 2, kind, t_max=high, t_min=low)


def test_duplicates_move_down() -> None:
    # √t linear over 0…9 in 8 steps wants 9 7 5 3 2 1 0 0.
    wanted = np.rint(np.linspace(3, 0, 8) ** 2)
    assert len(set(wanted)) < 8
    grid = time_grid(DDPMSchedule.linear(10), 8, "quadratic")
    assert grid.tolist() == [9, 7, 5, 4, 3, 2, 1, 0]


def test_times_of_ones_own() -> None:
    own = [0.9, 0.5, 1e-4]
    grid = time_grid(VPSDE(), None, own)
    assert grid.tolist() == own and grid.dtype == np.float64
    assert time_grid(VPSDE(), 3, np.array(own, dtype=np.float32)).shape == (3,)
    assert time_grid(LADDER, None, [999, 10, 0]).tolist() == [999.0, 10.0, 0.0]
    assert time_grid(VPSDE(), None, [0.4]).tolist() == [0.4]
    assert time_grid(VPSDE(), None, [1 + 1e-12, 0.4])[0] == 1.0
    array = np.array(own)
    time_grid(VPSDE(), 3, array)[0] = 7
    assert array[0] == 0.9


def test_one_step() -> None:
    assert time_grid(VPSDE(), 1, t_max=5e-4).tolist() == [5e-4]  # below the SDE's own t_min
    assert time_grid(LADDER, 1, t_max=0).tolist() == [0.0]
    assert time_grid(NCSNLadder([1.0]), 1).tolist() == [0.0]
    assert time_grid(VPSDE(), 1, "log_snr", t_max=0.5, t_min=0.5).tolist() == [0.5]


def test_a_range_of_ones_own() -> None:
    grid = time_grid(VPSDE(), 5, t_max=0.5, t_min=1e-5)
    np.testing.assert_allclose(grid, np.linspace(0.5, 1e-5, 5))
    assert time_grid(VPSDE(), 3, "uniform", t_min=0.0)[-1] == 0
    assert time_grid(VPSDE(), 3, "quadratic", t_min=0.0)[-1] == 0


Error = tuple[Any, Any, Any, dict[str, Any], type[Exception], str]
ERRORS: list[Error] = [
    (VPSDE(), 0, "uniform", {}, ValueError, "steps: expected an integer ≥ 1, got 0"),
    (VPSDE(), 2.0, "uniform", {}, TypeError, "steps: expected an integer"),
    (VPSDE(), True, "uniform", {}, TypeError, "steps: expected an integer"),
    (VPSDE(), None, "uniform", {}, TypeError, "steps: expected an integer"),
    (VPSDE(), 5, "cosine", {}, ValueError, "schedule: expected one of 'uniform'.*'cosine'"),
    (VPSDE(), 5, None, {}, TypeError, "schedule: expected a real number"),
    (VPSDE(), 3, [0.5, 0.1], {}, ValueError, "steps: the schedule has 2 times, got steps=3"),
    (VPSDE(), None, [], {}, ValueError, "schedule: expected times in one dimension"),
    (VPSDE(), None, [[0.5]], {}, ValueError, "schedule: expected times in one dimension"),
    (VPSDE(), None, [0.1, 0.5], {}, ValueError, "schedule: .*strictly decreasing"),
    (VPSDE(), None, [0.5, 0.5], {}, ValueError, "schedule: .*strictly decreasing"),
    (VPSDE(), None, [0.5, math.nan], {}, ValueError, "schedule: expected finite"),
    (VPSDE(), None, ["a"], {}, TypeError, "schedule: expected a real number"),
    (VPSDE(), None, [1.5, 0.5], {}, ValueError, r"schedule: expected times in \[0, 1\]"),
    (VPSDE(), None, [0.5, -0.1], {}, ValueError, r"schedule: expected times in \[0, 1\]"),
    (VPSDE(), None, [0.9, 0.1], {"t_max": 0.5}, ValueError, "schedule: expected times in"),
    (VPSDE(), None, [0.5, 0.1], {"t_min": 0.2}, ValueError, "schedule: expected times in"),
    (LADDER, None, [5.5, 1], {}, ValueError, "schedule: the times of a ladder are whole levels"),
    (LADDER, 1001, "uniform", {}, ValueError, "steps: the ladder has 1000 levels"),
    (LADDER, 5, "uniform", {"t_max": 10.5}, ValueError, "t_max: the times of a ladder are whole"),
    (LADDER, 5, "uniform", {"t_min": 0.5}, ValueError, "t_min: the times of a ladder are whole"),
    (LADDER, 2, "uniform", {"t_max": 3, "t_min": 4}, ValueError, "t_min: expected less than"),
    (VPSDE(), 5, "uniform", {"t_max": 1.01}, ValueError, r"t_max: expected a time in \[0, 1\]"),
    (VPSDE(), 5, "uniform", {"t_max": -0.5}, ValueError, "t_max: expected a time"),
    (VPSDE(), 5, "uniform", {"t_max": math.nan}, ValueError, "t_max: expected a finite"),
    (VPSDE(), 5, "uniform", {"t_max": "1"}, TypeError, "t_max: expected a number"),
    (VPSDE(), 5, "uniform", {"t_min": -1e-9}, ValueError, "t_min: expected a time ≥ 0"),
    (VPSDE(), 5, "uniform", {"t_min": 1.0}, ValueError, "t_min: expected less than t_max = 1"),
    (VPSDE(), 5, "log_snr", {"t_min": 0.0}, ValueError, "t_min: a 'log_snr' schedule needs noise"),
    (VPSDE(), 5, "karras", {"t_min": 0.0}, ValueError, "t_min: a 'karras' schedule needs noise"),
    (VPSDE(), 5, "karras", {"rho": 0.0}, ValueError, "rho: expected a finite number > 0"),
    (VPSDE(), 5, "karras", {"rho": "7"}, TypeError, "rho: expected a number"),
    (VPSDE(), 5, "uniform", {"rho": 7.0}, TypeError, "rho: no option of this schedule"),
    (VPSDE(), None, [0.5], {"rho": 7.0}, TypeError, "rho: no option of this schedule"),
    (VPSDE(), 5, "karras", {"roh": 7.0}, TypeError, "roh: no option of this schedule"),
    (VPSDE(), 2000, "trailing", {}, ValueError, "steps: a trailing schedule of 2000 steps"),
    ("vp", 5, "uniform", {}, TypeError, "sde: expected an SDE, got 'vp'"),
]


@pytest.mark.parametrize(("sde", "steps", "kind", "options", "error", "message"), ERRORS)
def test_errors(
    sde: Any, steps: Any, kind: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        time_grid(sde, steps, kind, **options)


def test_more_times_than_float64_holds() -> None:
    with pytest.raises(ValueError, match=r"^steps: 1000 times between .* are not all different"):
        time_grid(VPSDE(), 1000, t_max=0.5, t_min=0.5 * (1 - 1e-14))
