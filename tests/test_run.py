"""What a run asks of a network, and plans and states from elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import VESDE, VPSDE, Sampler, ScoreModel, noise, sample


def test_time_has_the_networks_precision() -> None:
    """A float64 state over a float32 network: the time embedding must not become float64."""
    net = torch.nn.Linear(2, 2)
    seen = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append((x.dtype, t.dtype))
            return self.net(x) + torch.nn.functional.linear(t[:, None], self.net.weight[:, :1])

    model = sbm_fast.ScoreModel(Model(), predicts="eps")
    x = sbm_fast.sample(
        model, sbm_fast.VPSDE(), (3, 2), method="em", steps=2, seed=0, dtype=torch.float64
    )
    assert x.dtype == torch.float64
    assert set(seen) == {(torch.float32, torch.float32)}


def test_another_view_of_the_state_is_named() -> None:
    with pytest.raises(ValueError, match=r"model: .*another view of the state"):
        sbm_fast.sample(
            lambda x, t: x.transpose(1, 2), sbm_fast.VPSDE(), (3, 4, 4), method="em", steps=2,
            backend="cpu",
        )  # fmt: skip


def test_a_plan_of_ones_own_runs(tmp_path: Path) -> None:
    from sbm_fast.methods import PlanBuilder, make_plan
    from sbm_fast.plan import Plan

    sde = VPSDE()
    model = ScoreModel(lambda x, t: -x, sde=sde)
    b = PlanBuilder(model, sde, method="mine")
    b.start()
    for t in (1.0, 0.5, 0.1):
        e = b.evaluate(t)
        b.row(x=e.x + 0.1 * e.s + 0.2 * e.z)
    b.build().save(tmp_path / "mine.npz")
    x = sample(model, sde, (4, 3), method=Plan.load(tmp_path / "mine.npz"), seed=0)
    z = [noise.normal(0, (4, 3), draw=r, stream=min(r, 1)) for r in range(4)]
    expected = z[0]
    for r in (1, 2, 3):
        expected = 0.9 * expected + 0.2 * z[r]
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)

    written = make_plan("em", model, sde, steps=5)
    same = sample(model, sde, (4, 3), method="em", steps=5, seed=0)
    assert torch.equal(sample(model, sde, (4, 3), method=written, seed=0), same)
    with pytest.raises(ValueError, match="steps: the plan given"):
        sample(model, sde, (4, 3), method=written, steps=5)
    with pytest.raises(ValueError, match="x_init: the plan given as method draws"):
        sample(model, sde, (4, 3), method=written, x_init=torch.zeros(4, 3))


def test_a_network_may_differentiate_by_its_input() -> None:
    def energy(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            (-(x**2) / 2).sum().backward()
        assert x.grad is not None
        return x.grad

    arguments: dict[str, Any] = {"method": "em", "steps": 10, "seed": 0}
    x = sample(energy, VPSDE(), (4, 3), **arguments)
    assert not x.requires_grad
    assert torch.equal(x, sample(lambda x, t: -x, VPSDE(), (4, 3), **arguments))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_an_output_may_be_a_view_of_the_time(backend: str) -> None:
    arguments: dict[str, Any] = {"method": "em", "steps": 5, "seed": 0, "backend": backend}
    view = sample(lambda x, t: t[:, None].expand_as(x), VPSDE(), (2, 5000), **arguments)
    copy = sample(lambda x, t: t[:, None].expand_as(x).clone(), VPSDE(), (2, 5000), **arguments)
    assert torch.equal(view, copy)


def test_guidance_refuses_outputs_that_share_memory_or_changed_time() -> None:
    buffer = torch.zeros(4, 3)

    def static(x: Tensor, t: Tensor, y: float) -> Tensor:
        return torch.mul(x, y, out=buffer)

    def changes_time(x: Tensor, t: Tensor, y: float) -> Tensor:
        t.mul_(0.5)
        return -x * y

    for net, message in ((static, "same memory"), (changes_time, "in place")):
        model = ScoreModel(net, null_cond={"y": 0.0})
        with pytest.raises(ValueError, match=f"model: .*{message}"):
            sample(
                model, VPSDE(), (4, 3), method="em", steps=3, cond={"y": -1.0}, guidance=2.0,
            )  # fmt: skip


def test_two_runs_share_a_module_and_it_is_put_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = None, True

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if self.inner is None:  # a second run, begun and ended inside the first
                self.inner = 0
                sample(self, VPSDE(), (1, 2), method="em", steps=2, seed=0)
            assert not self.training
            return -x

    net = Net().train()
    sample(ScoreModel(net), VPSDE(), (4, 3), method="em", steps=3, seed=0)
    assert net.training


def test_a_state_that_overflows_is_not_returned() -> None:
    with pytest.raises(ValueError, match="x: the state of sample 0 is not finite"):
        sample(lambda x, t: torch.full_like(x, 3e38), VESDE(), (1, 2), method="em", steps=1, seed=0)


def test_a_state_goes_back_to_its_own_plan_only() -> None:
    model = ScoreModel(lambda x, t: -x)
    first = Sampler(model, VPSDE(), (4, 3), method="em", steps=4)
    other = Sampler(model, VPSDE(), (4, 3), method="reverse_diffusion", steps=4)
    state = first.start(seed=0).advance(2).state()
    with pytest.raises(ValueError, match="state: was kept from another plan"):
        other.resume(state)


def test_a_run_is_not_advanced_from_inside() -> None:
    run = Sampler(lambda x, t: -x, VPSDE(), (4, 3), method="em", steps=4).start(seed=0)
    with pytest.raises(RuntimeError, match="advance"):
        run.advance(callback=lambda step: run.advance(1))


@pytest.mark.parametrize("method", ["reverse_diffusion", "ancestral", "ddim", "pc"])
def test_times_without_noise_are_named(method: str) -> None:
    with pytest.raises(ValueError, match=r"^t"):
        sample(lambda x, t: -x, VPSDE(), (4, 3), method=method, steps=4, t_min=0.0)
