"""A row recorded once and replayed is the loop, to the bit."""

import threading
from collections.abc import Callable
from typing import Any

import capture_cases
import pytest
import sampling_cases as cases
import torch
from capture_cases import SHAPE, guided_model, pair, recorded
from torch import Tensor, nn

from sbm_fast import noise
from sbm_fast.row_step import RowStep
from sbm_fast.sampler import Step

pytestmark = pytest.mark.filterwarnings("ignore:norm=:UserWarning", "ignore:the plan cancels")


@pytest.mark.parametrize("name", list(cases.METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replay_is_the_loop(name: str, dtype: torch.dtype) -> None:
    """Whole plans, new seeds and keys, a given start; one recording for each kind of row."""
    loop, replay, recorder = pair(name, dtype=dtype)
    x_init = torch.linspace(-2, 2, 60).reshape(SHAPE)
    kinds = len(set(loop.plan.norm[loop.plan.evaluates]))
    for _ in range(2):
        for seed in (0, 1):
            assert torch.equal(replay(seed=seed), loop(seed=seed))
        keys = noise.keys(5, 4).flip(0)
        assert torch.equal(replay(keys=keys), loop(keys=keys))
        assert len(recorder.tapes) == kinds
    if loop.plan.evaluates.any():
        assert torch.equal(replay(seed=2, x_init=x_init), loop(seed=2, x_init=x_init))
        assert len(recorder.tapes) == 2 * kinds


@pytest.mark.parametrize("name", ["em", "ode heun", "edm", "pc per sample"])
def test_a_network_of_another_dtype(name: str) -> None:
    loop, replay, _ = pair(name, net_dtype=torch.bfloat16)
    assert torch.equal(replay(seed=0), loop(seed=0))


@pytest.mark.parametrize("kind", ["learned variance", "dynamic threshold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_inputs(kind: str, dtype: torch.dtype) -> None:
    loop, replay = (capture_cases.row_input_sampler(kind, dtype=dtype) for _ in range(2))
    recorder = recorded(replay)
    for seed in (0, 1):
        assert torch.equal(replay(seed=seed), loop(seed=seed))
    assert len(recorder.tapes) == 1


@pytest.mark.parametrize("name", ["em", "pc sigma", "pc per sample", "ddim", "edm", "2m"])
def test_new_conditioning_and_guidance_enter_the_graph(name: str) -> None:
    loop, replay, recorder = pair(name, guided_model())
    kinds = len(set(loop.plan.norm[loop.plan.evaluates]))
    for k in range(3):
        given: dict[str, Any] = {
            "cond": {"factor": 2.0, "label": torch.linspace(0, k, 4)},
            "guidance": torch.linspace(-1, 1 + k, 4) if k else 2.5,
        }
        assert torch.equal(replay(seed=k, **given), loop(seed=k, **given))
    assert len(recorder.tapes) == kinds
    given.pop("guidance")
    assert torch.equal(replay(seed=3, **given), loop(seed=3, **given))
    assert len(recorder.tapes) == 2 * kinds


def test_conditioning_is_read_when_a_run_goes_on() -> None:
    """What the caller changes in place is seen; what the caller holds is not changed."""
    loop, replay, _ = pair("em", guided_model())
    for sampler in (loop, replay):
        label = torch.zeros(4)
        run = sampler.start(seed=0, cond={"label": label}).advance(3)
        label += 0.5
        run.advance()
        assert torch.equal(label, torch.full((4,), 0.5))
        if sampler is loop:
            expected = run.result()
    assert torch.equal(run.result(), expected)


def test_a_run_owns_its_state() -> None:
    """Several runs of one sampler are alive, in turns, with callbacks that look at them."""
    loop, replay, recorder = pair("pc per sample")
    first, second = replay.start(seed=0), replay.start(seed=1)
    seen: list[Tensor] = []
    while first.row < first.plan.rows:
        first.advance(1, callback=lambda step: seen.append(first.x))
        second.advance(1)
        assert torch.equal(first.x, seen[-1])
    results = first.result(), second.result()
    kept = [x.clone() for x in results]
    replay(seed=7)
    for x, k, seed in zip(results, kept, (0, 1), strict=True):
        assert torch.equal(x, k) and torch.equal(x, loop(seed=seed))
    assert len(recorder.tapes) == 2


def test_callbacks_progress_and_states(capsys: pytest.CaptureFixture[str]) -> None:
    loop, replay, _ = pair("ode heun")
    steps: tuple[list[Step], list[Step]] = ([], [])
    for sampler, kept in zip((loop, replay), steps, strict=True):
        sampler(seed=0, callback=kept.append, progress=True)
    assert "row" in capsys.readouterr().err
    for a, b in zip(*steps, strict=True):
        assert a.row == b.row and torch.equal(a.x, b.x)
    for rows in range(loop.plan.rows + 1):
        states = [s.start(seed=3).advance(rows).state() for s in (loop, replay)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        crossed = [s.resume(k).advance().result() for s, k in zip((replay, loop), states)]  # noqa: B905
        assert all(torch.equal(x, loop(seed=3)) for x in crossed)


def test_a_callback_keeps_what_it_gets() -> None:
    loop, replay, _ = pair("em")
    kept: list[Tensor] = []
    run = replay.start(seed=0)

    def callback(step: Step) -> None:
        if step.row == step.rows - 1:
            kept.append(run.result())

    run.advance(callback=callback)
    replay(seed=1)
    assert torch.equal(kept[0], loop(seed=0))


def test_a_callback_that_raises_leaves_the_run_where_it_was() -> None:
    loop, replay, _ = pair("pc sigma")

    def explode(step: Step) -> None:
        if step.row == 2:
            raise KeyboardInterrupt

    run = replay.start(seed=0)
    with pytest.raises(KeyboardInterrupt):
        run.advance(callback=explode)
    assert run.row == 3 and torch.equal(replay(seed=1), loop(seed=1))
    assert torch.equal(run.advance().result(), loop(seed=0))


def test_another_run_is_not_advanced_from_a_callback() -> None:
    _, replay, _ = pair("em")
    with pytest.raises(RuntimeError, match="advance: another run of this sampler"):
        replay(seed=0, callback=lambda step: replay(seed=1))


def test_threads_take_turns() -> None:
    loop, replay, recorder = pair("em")
    results: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        results[seed] = replay(seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.tapes) == 1
    assert all(torch.equal(results[seed], loop(seed=seed)) for seed in range(4))


def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_anew() -> None:
    net = capture_cases.Labelled()
    cond = {"label": torch.zeros(4)}
    loop, replay, recorder = pair("em", net, cond=cond)
    replay(seed=0)
    with torch.no_grad():
        net.scale.mul_(0.5)
    assert torch.equal(replay(seed=0), loop(seed=0)) and len(recorder.tapes) == 1
    net.scale = nn.Parameter(torch.tensor(0.3))
    assert torch.equal(replay(seed=0), loop(seed=0)) and len(recorder.tapes) == 2


def test_inference_mode_may_come_and_go() -> None:
    loop, replay, _ = pair("pc per sample", guided_model(), cond={"label": torch.zeros(4)})
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert torch.equal(replay(seed=0, guidance=2.0), loop(seed=0, guidance=2.0))


def test_a_network_may_differentiate_by_its_input() -> None:
    def energy(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            return torch.autograd.grad((-(x**2) / 2).sum(), x)[0]

    loop, replay, _ = pair("em", energy)
    assert torch.equal(replay(seed=0), loop(seed=0))
    assert torch.equal(replay(seed=1), loop(seed=1))


def test_a_compiled_network_is_recorded_as_it_is() -> None:
    net = torch.compile(cases.network, fullgraph=True, backend="aot_eager")
    loop, replay, _ = pair("em", net)
    assert torch.equal(replay(seed=0), loop(seed=0))


def test_bad_outputs_are_reported_where_they_began() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.reshape(-1, 1, 1) > 0.5, -x, x / 0.0)

    loop, replay, _ = pair("em", net)
    messages = []
    for sampler in (loop, replay):
        with pytest.raises(ValueError, match=r"evaluation 5 of \d+") as caught:
            sampler(seed=0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_an_empty_batch_records_nothing() -> None:
    sampler = cases.sampler("em", (0, 3))
    recorder = recorded(sampler)
    assert sampler(seed=0).shape == (0, 3) and not recorder.tapes


def counting() -> Callable[[Tensor, Tensor], Tensor]:
    calls: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return cases.network(x, t) * (1 + 0.01 * len(calls))

    return net


def test_a_python_value_in_the_network_would_show() -> None:
    """The comparison above is able to fail: this network's number of calls is baked in."""
    loop, replay, _ = pair("em")
    loop, replay = (cases.sampler("em", SHAPE, counting()) for _ in range(2))
    recorded(replay)
    assert not torch.equal(replay(seed=0), loop(seed=0))


def test_a_python_value_in_the_step_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is it for our own part: a row number that is baked in."""
    update = RowStep._update

    def baked(self: RowStep, network: Any, uncond: Any, epsilon: Any) -> None:
        present = self.row.clone()
        self.row.fill_(2 if network is not None else 0)
        update(self, network, uncond, epsilon)
        self.row.copy_(present + 1)

    loop, replay, _ = pair("em")
    assert torch.equal(replay(seed=0), loop(seed=0))
    monkeypatch.setattr(RowStep, "_update", baked)
    _, replay, _ = pair("em")
    assert not torch.equal(replay(seed=0), loop(seed=0))
