"""Samples depend on seed, method and network only: bit-equality wherever it is promised."""

from pathlib import Path
from typing import Any

import pytest
import sampling_cases as cases
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbm_fast import _load, noise

pytestmark = pytest.mark.filterwarnings("ignore:norm=:UserWarning", "ignore:the plan cancels")
SHAPE = (7, 3, 5, 6)


@pytest.mark.parametrize("name", cases.ALONE)
def test_batch_split_and_permutation(name: str) -> None:
    whole = cases.sampler(name, SHAPE)(seed=3)
    assert whole.isfinite().all() and len(whole.flatten(1).unique(dim=0)) == 7
    parts = [
        cases.sampler(name, (n, *SHAPE[1:]))(seed=3, first_sample=first)
        for first, n in ((0, 1), (1, 4), (5, 2))
    ]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    keys = noise.keys(3, 7)[order]
    assert torch.equal(cases.sampler(name, SHAPE)(keys=keys), whole[order])


@pytest.mark.parametrize("name", list(cases.METHODS))
def test_memory_format_of_start_and_network(name: str) -> None:
    sampler = cases.sampler(name, SHAPE)
    x_init = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    plain = sampler(seed=1, x_init=x_init)
    last = torch.channels_last
    assert torch.equal(sampler(seed=1, x_init=x_init.to(memory_format=last)), plain)

    def channels_last(x: Tensor, t: Tensor) -> Tensor:
        return cases.network(x, t).contiguous(memory_format=last)

    other = cases.sampler(name, SHAPE, channels_last)
    assert torch.equal(other(seed=1, x_init=x_init), plain)


@pytest.mark.parametrize("name", list(cases.METHODS))
@pytest.mark.parametrize("shape", [(37, 3), (5, 3, 41, 40)])
def test_thread_count(name: str, shape: tuple[int, ...]) -> None:
    sampler = cases.sampler(name, shape)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(sampler(seed=0))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def resumed(sampler: Any, rows: int, folder: Path | None, **more: Any) -> Tensor:
    run = sampler.start(seed=5, **more).advance(rows)
    state = run.state()
    run.advance()  # what was kept must not change with it
    if folder is not None:
        save_file(state, folder / "state.safetensors")
        state = load_file(folder / "state.safetensors")
    return sampler.resume(state).advance().result()


@pytest.mark.parametrize("name", list(cases.METHODS))
def test_resume_from_every_row(name: str) -> None:
    sampler = cases.sampler(name, (4, 9))
    whole = sampler(seed=5)
    for rows in range(sampler.plan.rows + 1):
        assert torch.equal(resumed(sampler, rows, None), whole), rows


@pytest.mark.parametrize("name", ["ode heun", "ode rk4", "edm", "em", "pc per sample"])
@pytest.mark.parametrize("net_dtype", [None, torch.bfloat16])
def test_resume_from_a_file(name: str, net_dtype: torch.dtype | None, tmp_path: Path) -> None:
    """With registers, with a buffer for the network's input, from a given start."""
    sampler = cases.sampler(name, (4, 9), net_dtype=net_dtype)
    x_init = torch.linspace(-2, 2, 36).reshape(4, 9)
    for more in ({}, {"x_init": x_init}):
        whole = sampler(seed=5, **more)
        middle = sampler.plan.rows // 2
        assert torch.equal(resumed(sampler, middle, tmp_path, **more), whole)


def test_resume_reports_where_a_bad_output_began() -> None:
    sampler = cases.sampler("em", (3, 4), lambda x, t: torch.where(t[0] > 0.9, x / 0.0, -x))
    run = sampler.start(seed=0).advance(3)
    with pytest.raises(ValueError, match=r"evaluation 1 of \d+ \(row 1, t = 1\)"):
        sampler.resume(run.state()).advance().result()


@pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
@pytest.mark.parametrize("name", list(cases.METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_and_eager_agree(name: str, dtype: torch.dtype) -> None:
    """To 2e-5 of the largest state on the way: the noise differs by up to 2e-6 a draw, and these
    networks contract, so that some ten draws do not grow beyond it."""
    kept: list[list[Tensor]] = []
    for backend in ("cpu", "eager"):
        states: list[Tensor] = []
        sampler = cases.sampler(name, (9, 65), backend=backend, dtype=dtype)
        sampler(seed=2, callback=lambda step, states=states: states.append(step.x))
        kept.append(states)
    largest = max(float(x.abs().max()) for x in kept[0])
    for a, b in zip(*kept, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * largest


def test_batch_mean_is_refused_in_shards() -> None:
    sampler = cases.sampler("pc batch mean", (4, 9))
    sampler(seed=0)
    with pytest.raises(ValueError, match=r"^norm: .*first_sample=4"):
        sampler(seed=0, first_sample=4)
