"""The recorded step is a function of device tensors: it compiles whole and runs without values."""

from collections.abc import Iterator
from typing import Any

import capture_cases
import pytest
import sampling_cases as cases
import torch
import torch._dynamo.testing
from capture_cases import SHAPE, guided_model
from torch import Tensor

from sbm_fast import Sampler
from sbm_fast.backend import Kernels
from sbm_fast.ops.affine_step import affine_step_
from sbm_fast.row_step import RowStep
from sbm_fast.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:norm=:UserWarning", "ignore:the plan cancels")
OP = Kernels("op", affine_step_)

SAMPLERS: dict[str, Any] = {
    "em": lambda **more: cases.sampler("em", SHAPE, **more),
    "pc sigma": lambda **more: cases.sampler("pc sigma", SHAPE, **more),
    "pc per sample": lambda **more: cases.sampler("pc per sample", SHAPE, **more),
    "pc batch mean": lambda **more: cases.sampler("pc batch mean", SHAPE, **more),
    "guided": lambda **more: cases.sampler(
        "pc per sample", SHAPE, guided_model(more.get("device", "cpu")),
        cond={"label": torch.linspace(0, 1, 4, device=more.get("device"))}, guidance=2.0, **more,
    ),
    "edm": lambda **more: cases.sampler("edm", SHAPE, net_dtype=torch.bfloat16, **more),
    "2m": lambda **more: cases.sampler("2m", SHAPE, **more),
    **{
        kind: lambda kind=kind, **more: capture_cases.row_input_sampler(kind, **more)
        for kind in ("learned variance", "dynamic threshold")
    },
}  # fmt: skip


def sampler_of(name: str, **more: Any) -> Sampler:
    sampler = SAMPLERS[name](**more)
    sampler.kernels = OP
    return sampler


def step_of(run: Run) -> RowStep:
    row = torch.full_like(run.memory.first_bad, run.row)
    return run.row_step(run.memory, row, run.cond, run.null_cond)


def run_whole(run: Run, evaluate: Any) -> Tensor:
    """A run's plan by its step, the row number living on the device."""
    step = step_of(run)
    with torch.no_grad():
        for evaluates, norm in zip(run.plan.evaluates, run.plan.norm, strict=True):
            if evaluates:
                evaluate(step, bool(norm))
            else:
                step.start()
    assert step.row.tolist() == [run.plan.rows] * len(step.row)
    return step.memory.x


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_call(step: RowStep, norm: bool) -> None:
    step(norm)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_it_compiles_whole_and_is_the_loop(name: str, dtype: torch.dtype) -> None:
    """fullgraph: dynamo finds no value that the host reads; and as many graphs as kinds of rows."""
    sampler = sampler_of(name, dtype=dtype)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(by_call, fullgraph=True, backend=counter, dynamic=False)
    for seed in (0, 1):
        assert torch.equal(run_whole(sampler.start(seed=seed), step), sampler(seed=seed))
    kinds = len(set((sampler.plan.norm != 0)[sampler.plan.evaluates]))
    assert counter.frame_count == kinds


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_it_compiles_with_inductor() -> None:
    """Equal but for the roundings of the network, which inductor makes in its own way."""
    sampler = sampler_of("em")
    step = torch.compile(by_call, fullgraph=True, dynamic=False)
    got, expected = run_whole(sampler.start(seed=0), step), sampler(seed=0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Seen:
    """The op, and what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((*args, *kwargs.values()))
        affine_step_(*args, **kwargs)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("by_loop", [False, True])
def test_it_runs_on_gpu_tensors_without_values(name: str, by_loop: bool) -> None:
    """On fake CUDA tensors, that have no values: nothing in the step or in the loop asks for one.

    A norm's room and promise are given on a GPU; ε at rows with a norm only.
    """
    plan = sampler_of(name).plan
    with capture_cases.fake_gpu():
        sampler = sampler_of(name, device="cuda", backend="eager")
        seen = Seen()
        sampler.kernels = Kernels("seen", seen)
        weights = sampler.guidance
        sampler.guidance = None  # its values are looked at when the run begins
        run = sampler.start(seed=0)
        if weights is not None:
            object.__setattr__(run.memory, "guidance", torch.full_like(run.memory.net_time, 2.0))
        if by_loop:
            run._checked = True  # under guidance it asks where the outputs lie
            run.advance()
        else:
            step = step_of(run)
            for evaluates, norm in zip(plan.evaluates, plan.norm, strict=True):
                step(bool(norm)) if evaluates else step.start()
    rows = [call for call in seen.calls if call[13] is not None]  # not those of row inputs
    assert len(rows) == plan.rows and rows[0][0].device.type == "cuda"
    assert [call[9] is not None for call in rows] == (plan.norm != 0).tolist()
    if plan.norm.any():
        assert all(call[14] is run.memory.workspace for call in rows)
        assert all(call[15] is (name == "pc batch mean") for call in rows)
        assert run.memory.workspace is not None
