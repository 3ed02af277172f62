"""What a run asks of a network, and plans and states from elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import VESDE, VPSDE, DynamicThreshold, Sampler, ScoreModel, noise, sample
from sbm_fast.backend import Kernels


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


LATER: dict[str, Any] = {
    "tuple": lambda out: (out,),
    "list": lambda out: [out],
    "ndarray": lambda out: out.numpy(),
    "None": lambda out: None,
    "one channel more": lambda out: torch.cat([out, out[:, :1]], 1),
    "half the channels": lambda out: out.chunk(2, 1)[0],
    "more channels": lambda out: torch.cat([out, out.chunk(2, 1)[0]], 1),
    "one sample": lambda out: out[:1],
    "int64": lambda out: out.long(),
    "complex": lambda out: out.to(torch.complex64),
    "float8": lambda out: out.to(torch.float8_e5m2),
    "sparse": lambda out: out.to_sparse(),
}


class Later:
    """A network whose output is spoilt from evaluation `first` on."""

    def __init__(self, spoil: Any, doubled: bool, first: int) -> None:
        self.spoil, self.doubled, self.first, self.calls = spoil, doubled, first, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out = torch.cat([-x / 2, -x / 9], 1) if self.doubled else -x / 2
        return self.spoil(out) if self.calls >= self.first else out


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])  # ddim reads no learned variance
@pytest.mark.parametrize("kind", ["plain", "threshold", "learned"])
@pytest.mark.parametrize("name", list(LATER))
@pytest.mark.parametrize("first", [1, 3])
def test_outputs_that_go_wrong_are_the_models(
    first: int, name: str, kind: str, method: str, backend: str
) -> None:
    net = Later(LATER[name], kind == "learned", first)
    variance = "learned_range" if kind == "learned" else None
    model = ScoreModel(net, "eps", variance=variance)
    clip = DynamicThreshold() if kind == "threshold" else None
    with pytest.raises(ValueError, match=r"^model: expected a floating tensor of shape .*, got "):
        sample(
            model, VPSDE(), (3, 2, 4), method=method, steps=5, seed=0, clip_denoised=clip,
            backend=backend,
        )  # fmt: skip
    assert net.calls == first


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, NotImplementedError])
def test_errors_of_the_network_itself_are_left_as_they_are(error: type[Exception]) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        if float(t[0]) < 0.5:
            raise error("mine")
        return -x

    with pytest.raises(error, match=r"^mine$"):
        sample(net, VPSDE(), (4, 3), method="em", steps=4, seed=0)


def test_errors_of_the_step_that_are_not_the_models_are_left_as_they_are() -> None:
    """Also in a row without evaluation, which has no output to blame."""
    for row in (0, 2):
        sampler = Sampler(lambda x, t: -x, VPSDE(), (4, 3), method="em", steps=4)
        own = sampler.kernels.affine_step_

        def step(*args: Any, at: int = row, own: Any = own) -> None:
            if int(args[6][0]) == at:
                raise TypeError("the step's own")
            own(*args)

        sampler.kernels = Kernels("mine", step)
        with pytest.raises(TypeError, match=r"^the step's own$"):
            sampler(seed=0)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda z: z * float("nan"), "finite in torch.float32"),
        (lambda z: z.double() + 1e300, "finite in torch.float32"),
        (lambda z: z.to(torch.float8_e5m2), "got torch.float8_e5m2"),
        (lambda z: z.to_sparse(), "got torch.sparse_coo"),
        (lambda z: z.numpy(), "got ndarray"),
    ],
)
def test_faults_of_the_noise_hook_are_its_own(spoil: Any, got: str, at: int) -> None:
    def hook(draw: int, stream: int) -> Any:
        return spoil(torch.ones(4, 3)) if draw == at else torch.ones(4, 3)

    where = rf"\(draw, stream\) = \({at}, {min(at, 1)}\)"
    with pytest.raises(ValueError, match=f"^noise: expected .*{where}") as caught:
        sample(lambda x, t: -x, VPSDE(), (4, 3), method="em", steps=4, noise=hook)
    assert got in str(caught.value)


def test_what_a_row_makes_of_finite_outputs_may_be_to_blame() -> None:
    arguments: dict[str, Any] = {"steps": 5, "seed": 0}
    with pytest.raises(ValueError, match=r"^model: its outputs, or what the row made of them, are"):
        sample(
            ScoreModel(lambda x, t: torch.full_like(x, 3e38), "eps"), VPSDE(), (3, 2, 4),
            method="ddim", clip_denoised=DynamicThreshold(), **arguments,
        )  # fmt: skip


def test_a_state_goes_back_to_its_own_plan_only() -> None:
    model = ScoreModel(lambda x, t: -x)
    first = Sampler(model, VPSDE(), (4, 3), method="em", steps=4)
    other = Sampler(model, VPSDE(), (4, 3), method="reverse_diffusion", steps=4)
    state = first.start(seed=0).advance(2).state()
    with pytest.raises(ValueError, match="state: was kept from another plan"):
        other.resume(state)


def test_numbers_of_a_state_are_what_a_run_keeps() -> None:
    sampler = Sampler(lambda x, t: -x, VPSDE(), (4, 3), method="dpmpp_2m", steps=5)
    run = sampler.start(seed=0).advance(3)
    nan, bad = float("nan"), torch.full((4,), -1, dtype=torch.int32)
    for change in (
        {"row": torch.tensor(2.7)}, {"row": torch.tensor(nan)}, {"row": torch.tensor(True)},
        {"plan": torch.tensor(1j)}, {"plan": torch.tensor(0.5)},
        {"given_start": torch.tensor(nan)},
        {"first_bad": bad * nan}, {"first_bad": bad - 1}, {"first_bad": bad + 4},
        {"registers": run.state()["registers"] * nan}, {"registers": run.state()["x"].double()},
        {"guidance": torch.ones(2)}, {"guidance": torch.ones(4).double()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^state: "):
            sampler.resume({**run.state(), **change})
    kept = run.state()
    assert torch.equal(sampler.resume(kept).advance().result(), sampler(seed=0))


def test_guidance_is_not_forgotten_by_a_resume() -> None:
    model = ScoreModel(lambda x, t, y=0.5: -x * y, null_cond={"y": 0.25})
    arguments: dict[str, Any] = {"method": "em", "steps": 4}
    bare = Sampler(model, VPSDE(), (4, 3), **arguments)
    guided = Sampler(model, VPSDE(), (4, 3), guidance=2.0, **arguments)
    for weight in (2.0, torch.tensor([0.0, 1.0, 2.0, 3.0])):
        kept = bare.start(seed=0, guidance=weight).advance(2).state()
        with pytest.raises(ValueError, match=r"^guidance: .*weights.*got none"):
            bare.resume(kept)
        whole = bare(seed=0, guidance=weight)
        assert torch.equal(bare.resume(kept, guidance=weight).advance().result(), whole)
    with pytest.raises(ValueError, match=r"^guidance: .*weights.*got others"):
        guided.resume(kept)
    assert guided.resume(kept, guidance=weight).nfe == guided.resume(kept, guidance=3.0).nfe == 2
    assert torch.equal(
        guided.resume(guided.start(seed=0).advance(1).state()).advance().result(), guided(seed=0)
    )

    kept = bare.start(seed=0).advance(2).state()
    for sampler, more in ((guided, {}), (bare, {"guidance": 2.0})):
        with pytest.raises(ValueError, match=r"^guidance: .*without it.*, got weights"):
            sampler.resume(kept, **more)
    del kept["guidance"]
    with pytest.raises(ValueError, match=r"^state: no tensors for \['guidance'\]"):
        bare.resume(kept)


def test_a_guided_run_without_samples_is_resumed() -> None:
    model = ScoreModel(lambda x, t: -x, null_cond={})
    sampler = Sampler(model, VPSDE(), (0, 3), method="em", steps=4, guidance=2.0)
    assert sampler.resume(sampler.start(seed=0).advance(2).state()).advance().row == 5


def test_a_run_is_not_advanced_from_inside() -> None:
    run = Sampler(lambda x, t: -x, VPSDE(), (4, 3), method="em", steps=4).start(seed=0)
    with pytest.raises(RuntimeError, match="advance"):
        run.advance(callback=lambda step: run.advance(1))


@pytest.mark.parametrize("method", ["reverse_diffusion", "ancestral", "ddim", "pc"])
def test_times_without_noise_are_named(method: str) -> None:
    with pytest.raises(ValueError, match=r"^t"):
        sample(lambda x, t: -x, VPSDE(), (4, 3), method=method, steps=4, t_min=0.0)
