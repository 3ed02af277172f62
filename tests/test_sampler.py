"""`sample`, `Sampler` and `Run`: what every argument does."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import VESDE, VPSDE, Sampler, ScoreModel, noise, sample
from sbm_fast.sampler import Step

pytestmark = pytest.mark.filterwarnings("ignore:the plan cancels", "ignore:norm=:UserWarning")
SHAPES = [(5,), (5, 2), (5, 3, 4), (5, 3, 4, 2), (2, 3, 2, 4, 2), (0, 3), (0,), (3, 0)]
EM: dict[str, Any] = {"method": "em", "steps": 5}


def em(shape: tuple[int, ...] = (4, 6), net: Any = cases.network, **more: Any) -> Any:
    return sample(net, cases.VP, shape, **{**EM, "seed": 0, **more})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["em", "pc per sample", "edm"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_any_shape(shape: tuple[int, ...], name: str, backend: str) -> None:
    x, info = cases.sampler(name, shape, backend=backend)(seed=0, return_info=True)
    assert x.shape == shape and x.isfinite().all()
    assert info.backend == backend or backend == "auto"


def test_shape_of_the_model() -> None:
    model = ScoreModel(cases.network, sample_shape=(3, 4))
    assert sample(model, cases.VP, **EM).shape == (16, 3, 4)
    assert sample(model, cases.VP, num_samples=2, **EM).shape == (2, 3, 4)
    assert sample(model, cases.VP, (5, 3, 4), **EM).shape == (5, 3, 4)


def test_samples_follow_their_seed_and_keys() -> None:
    assert torch.equal(em(), em()) and not torch.equal(em(), em(seed=1))
    assert torch.equal(em(seed=None, keys=noise.keys(0, 4)), em())
    assert torch.equal(em(seed=2**64 - 1), em(seed=-1))


def test_no_seed_is_drawn_from_torch_and_reported() -> None:
    torch.manual_seed(9)
    x, info = em(seed=None, return_info=True)
    again, other = em(seed=None, return_info=True)
    torch.manual_seed(9)
    assert torch.equal(em(seed=None), x) and not torch.equal(x, again)
    assert isinstance(info.seed, int) and info.seed != other.seed
    assert torch.equal(em(seed=info.seed), x)
    assert em(seed=None, keys=noise.keys(0, 4), return_info=True)[1].seed is None


def test_the_global_generator_is_left_alone_when_a_seed_is_given() -> None:
    before = torch.get_rng_state()
    em()
    assert torch.equal(torch.get_rng_state(), before)


class TheirVPSDE:
    """What score_sde's object has."""

    def __init__(self) -> None:
        self.beta_0, self.beta_1, self.N = 0.1, 20.0, 1000


def test_sde_objects_of_score_sde() -> None:
    theirs = type("VPSDE", (TheirVPSDE,), {})()
    assert torch.equal(sample(cases.network, theirs, (4, 6), seed=0, **EM), em())


def test_callables_models_and_declared_networks_are_one() -> None:
    class Declared(nn.Module):
        predicts, time, sample_shape = "score", "t", (6,)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return cases.network(x, t)

    assert torch.equal(em(net=ScoreModel(cases.network)), em())
    assert torch.equal(em(net=Declared()), em())
    assert sample(Declared(), cases.VP, **EM).shape == (16, 6)


def test_time_reaches_a_callable_as_floats_of_the_batch() -> None:
    times: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.clone())
        return -x

    em(net=net)
    assert all(t.shape == (4,) and t.dtype == torch.float32 for t in times)
    assert [float(t[0]) for t in times] == sorted((float(t[0]) for t in times), reverse=True)
    assert times[0][0] == 1.0 and times[-1][0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_network_gets_its_own_dtype(net_dtype: torch.dtype, dtype: torch.dtype) -> None:
    net = cases.Net(net_dtype)
    x = em(net=net, dtype=dtype)
    assert x.dtype == dtype and {seen[0] for seen in net.seen} == {net_dtype}
    net.scale.data = net.scale.detach().float()
    reference = em(net=net, dtype=dtype, net_dtype=torch.float32)
    assert float((x - reference).abs().max()) <= 64 * torch.finfo(net_dtype).eps


def test_modes_are_put_back_for_each_submodule() -> None:
    def modes(net: nn.Module) -> list[bool]:
        return [m.training for m in net.modules()]

    net = cases.Net()
    net.inner[1].eval()
    before = modes(net)
    assert before[0] and not before[-1]
    em(net=net)
    assert modes(net) == before

    def explode(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        em(net=net, callback=explode)
    assert modes(net) == before


def test_no_gradient_is_kept_and_inference_mode_is_fine() -> None:
    net = cases.Net()
    x = em(net=net)
    assert not x.requires_grad and net.scale.grad is None
    with torch.inference_mode():
        assert torch.equal(em(net=net).clone(), x)


@pytest.mark.parametrize("method", ["em", "ode", "ddim", "pc"])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 5.0)])
def test_given_start_is_in_the_scale_of_the_sde(sde: Any, method: str) -> None:
    """One row further the state is near x_init, whichever coordinate the plan runs in."""
    sampler = Sampler(cases.network, sde, (4, 6), method=method, steps=400)
    x_init = sde.prior_std * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    run = sampler.start(seed=0, x_init=x_init).advance(1)
    start = run.x / run.plan.start_scale
    torch.testing.assert_close(start, x_init, rtol=1e-6, atol=0)
    assert run.plan.start_scale in (1.0, pytest.approx(1 / float(sde.mean_scale(sde.t_max))))


def test_edm_under_vp_runs_in_the_other_coordinate() -> None:
    sampler = Sampler(cases.network, cases.VP, (4, 6), method="edm", steps=5)
    x_init = torch.full((4, 6), 0.5)
    run = sampler.start(seed=0, x_init=x_init)
    assert run.plan.start_scale != 1.0
    assert torch.equal(run.x, x_init * run.plan.start_scale)
    assert run.advance().result().isfinite().all()


def test_x_init_is_not_changed_and_may_be_of_another_dtype() -> None:
    x_init = torch.randn(4, 6, dtype=torch.float64)
    kept = x_init.clone()
    x = em(x_init=x_init)
    assert torch.equal(x_init, kept) and torch.equal(em(x_init=x_init.float()), x)


def guided_model() -> ScoreModel:
    return ScoreModel(cases.Net(), null_cond={"label": -0.3})


def test_conditioning_reaches_the_network() -> None:
    net = cases.Net()
    label = torch.tensor([0.1, 0.2, 0.3, 0.4])
    shifted = em(net=lambda x, t: net.eval()(x, t, label))
    assert torch.equal(em(net=net, cond={"label": label}), shifted)
    prepared = Sampler(net, cases.VP, (4, 6), cond={"label": label}, **EM)
    assert torch.equal(prepared(seed=0), shifted)
    assert torch.equal(prepared(seed=0, cond={"label": 0.0}), em(net=net))


def test_guidance_equals_the_network_combined_by_hand() -> None:
    model = guided_model()
    label, w = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 1.0, 2.5, -1.0])

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        assert isinstance(model.net, nn.Module)
        net = model.net.eval()
        c, u = net(x, t, label), net(x, t, -0.3)
        return u + w[:, None] * (c - u)

    for name in ("em", "pc per sample", "ode heun", "edm"):
        got = cases.sampler(name, (4, 6), model)(seed=0, cond={"label": label}, guidance=w)
        expected = cases.sampler(name, (4, 6), by_hand)(seed=0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_guidance_of_one_and_per_sample() -> None:
    model, cond = guided_model(), {"label": 0.2}
    plain = em(net=model, cond=cond)
    one, info = em(net=model, cond=cond, guidance=1.0, return_info=True)
    torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-6)
    assert info.nfe == 2 * info.plan.nfe
    mixed = em(net=model, cond=cond, guidance=torch.tensor([3.0, 0.0, 3.0, 0.0]))
    three, zero = em(net=model, cond=cond, guidance=3.0), em(net=model, cond=cond, guidance=0.0)
    assert torch.equal(mixed[::2], three[::2]) and torch.equal(mixed[1::2], zero[1::2])


@pytest.mark.parametrize("name", ["em", "pc sigma", "pc per sample", "ddim", "edm", "ald"])
def test_noise_hook_with_the_own_noise_changes_nothing(name: str) -> None:
    keys = noise.keys(0, 4)
    asked: list[tuple[int, int]] = []

    def hook(draw: int, stream: int) -> Tensor:
        asked.append((draw, stream))
        return noise.normal(None, (4, 6), draw=draw, stream=stream, keys=keys)

    sampler = cases.sampler(name, (4, 6))
    assert torch.equal(sampler(seed=0, noise=hook), sampler(seed=0))
    assert asked[0] == (0, noise.PRIOR) and len(set(asked)) == len(asked)
    assert all(stream == noise.TRAJECTORY for _, stream in asked[1:])


def test_callback_sees_every_row_and_cannot_disturb() -> None:
    steps: list[Step] = []

    def callback(step: Step) -> None:
        steps.append(dataclasses.replace(step, x=step.x.clone()))
        step.x.zero_()

    x, info = em(callback=callback, return_info=True)
    assert torch.equal(x, em()) and torch.equal(steps[-1].x, x)
    assert [s.row for s in steps] == list(range(info.plan.rows)) and math.isnan(steps[0].time)
    assert [s.time for s in steps[1:]] == info.plan.time[1:].tolist()


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    em(progress=True)
    assert "row" in capsys.readouterr().err
    em()
    assert capsys.readouterr().err == ""


def test_info_says_what_was_done() -> None:
    calls = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return -x

    _, info = em(net=net, return_info=True)
    assert info.nfe == len(calls) == info.plan.nfe == 5 and info.seed == 0
    assert info.backend in ("cpu", "eager")
    assert info.seconds == pytest.approx(info.seconds_network + info.seconds_sampler)
    assert info.seconds_network > 0 and info.seconds_sampler > 0


def test_options_reach_the_plan() -> None:
    def plan(**more: Any) -> sbm_fast.plan.Plan:
        return Sampler(cases.network, cases.VP, (4, 6), **{**EM, **more}).plan

    base = plan()
    for more in (
        {"steps": 7}, {"t_max": 0.8}, {"t_min": 0.1}, {"schedule": "log_snr"},
        {"denoise": "tweedie"}, {"schedule": np.linspace(1.0, 0.01, 6)}, {"clip_denoised": 1.0},
        {"method": "ode"},
    ):  # fmt: skip
        changed = plan(**more)
        assert base.difference(changed) != "" or changed.denoiser[-1, 2] == 1.0, more


@pytest.mark.parametrize("name", ["dtype", "net_dtype", "device"])
def test_arrays_are_no_dtypes_and_no_devices(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: ") as caught:
        em(**{name: np.ones(2)})
    assert name == "device" or caught.type is TypeError


@pytest.mark.parametrize("value", [1, 0, np.True_, None, torch.ones(2), np.ones(2)])
def test_what_equals_a_truth_is_no_answer_to_cuda_graph(value: Any) -> None:
    with pytest.raises(TypeError, match=r'^cuda_graph: expected "auto", True or False, got <class'):
        em(cuda_graph=value)


def test_run_goes_row_by_row() -> None:
    sampler = Sampler(cases.network, cases.VP, (4, 6), **EM)
    run = sampler.start(seed=0)
    with pytest.raises(ValueError, match="rows are left"):
        run.result()
    while run.row < run.plan.rows:
        row = run.row
        assert run.advance(1) is run and run.row == row + 1
    assert torch.equal(run.result(), em()) and run.nfe == 5
    assert torch.equal(run.advance().result(), em())


def test_a_sampler_can_be_called_again() -> None:
    sampler = Sampler(cases.network, cases.VP, (4, 6), **EM)
    first = sampler(seed=0)
    kept = first.clone()
    sampler(seed=1, x_init=torch.zeros(4, 6))
    assert torch.equal(first, kept) and torch.equal(sampler(seed=0), kept)


def test_ddim_inversion_carries_data_up_and_ddim_brings_it_back() -> None:
    data = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)) / 2 + 1

    sde = sbm_fast.VPSDE()

    def score(x: Tensor, t: Tensor) -> Tensor:  # of N(1, 1/4) data
        levels = (sde.mean_scale(t.numpy()), sde.std(t.numpy()))
        m, s = (torch.as_tensor(v, dtype=x.dtype)[:, None] for v in levels)
        return (m - x) / (0.25 * m**2 + s**2)

    grid: dict[str, Any] = {"schedule": "log_snr", "t_min": 1e-3}
    up = sample(score, sde, (3, 2), method="ddim_inversion", steps=400, x_init=data, **grid)
    back = sample(score, sde, (3, 2), method="ddim", steps=401, x_init=up, **grid)
    # The flow takes N(1, 1/4) to N(0, 1), so it doubles distances.
    spread = [float((v - v.mean()).norm()) for v in (data, up)]
    assert spread[1] / spread[0] == pytest.approx(2, abs=0.05)
    assert float((back - data).abs().max()) < 0.02
    with pytest.raises(ValueError, match="x_init"):
        sample(score, sde, (3, 2), method="ddim_inversion", steps=20)
