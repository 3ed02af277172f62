"""The probability flow and its network: conditioning, guidance, outputs, dtypes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sampling_cases as cases
import torch
from ode_cases import NoHostReads
from probability_flow_cases import KERNELS, draw, elementwise
from torch import Tensor, nn

from sbm_fast import sample
from sbm_fast.encoding import encode
from sbm_fast.flow import FlowSystem, ProbabilityFlow
from sbm_fast.model import ScoreModel
from sbm_fast.noise import keys
from sbm_fast.parameterization import PREDICTIONS
from sbm_fast.sde import VESDE, VPSDE, DDPMSchedule


def encoded(net: Any, x: Tensor, **more: Any) -> Tensor:
    """Under a VE SDE of few steps."""
    null_cond = more.pop("null_cond", None)
    model = ScoreModel(net, "eps", "sigma", null_cond=null_cond)
    return encode(model, VESDE(0.1, 5.0), x, rtol=1e-4, atol=1e-4, **more)


def uneven(n: int = 9, *shape: int) -> Tensor:
    """Samples that take different numbers of steps."""
    x = draw(n, *(shape or (3,))).float()
    scale = torch.logspace(-0.5, 2.5, n)[torch.randperm(n, generator=torch.Generator())]
    return x * scale.reshape(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("batch_size", [None, 4, 1])
def test_conditioning_follows_its_sample(batch_size: int | None) -> None:
    x, shift = uneven(), torch.linspace(-40, 40, 9)
    z, info = encoded(elementwise, x, cond={"shift": shift}, return_info=True,
                      batch_size=batch_size)  # fmt: skip
    assert len(set(info.nfe.tolist())) >= 3
    alone = [encoded(elementwise, x[[i]], cond={"shift": float(shift[i])}) for i in range(9)]
    assert torch.equal(z, torch.cat(alone))


def test_conditioning_that_is_no_sample_s_is_left_alone() -> None:
    x, seen = uneven(), []

    def net(x: Tensor, label: Tensor, number: float, vector: Tensor, names: str | None) -> Tensor:
        seen.append((number, vector.shape, names))
        return elementwise(x, label, shift=number + vector.sum())

    vector = torch.tensor([0.5, 0.25, 0.5, 0.25])
    z = encoded(net, x, cond={"number": 0.5, "vector": vector, "names": None}, batch_size=5)
    assert torch.equal(z, encoded(elementwise, x, cond={"shift": 2.0}))
    assert set(seen) == {(0.5, (4,), None)}
    assert torch.equal(z, encoded(elementwise, x, cond={"shift": torch.tensor(2.0)}, batch_size=2))
    assert torch.equal(z, encoded(elementwise, x, cond={"shift": torch.tensor([2.0])}))


def guided(x_init: Tensor, solver: str, **more: Any) -> Any:
    net = more.pop("net", elementwise)
    model = ScoreModel(net, "eps", "sigma", null_cond=more.pop("null_cond", {"shift": -0.5}))
    return sample(model, VESDE(0.1, 5.0), tuple(x_init.shape), method="ode", solver=solver,
                  x_init=x_init, **more)  # fmt: skip


def test_guidance_is_that_of_the_plans() -> None:
    start, w = uneven(), torch.linspace(-1, 3, 9)
    cond = {"shift": torch.linspace(-1, 1, 9)}
    x, info = guided(start, "dopri5", guidance=w, cond=cond, return_info=True)
    plan = guided(start, "rk4", guidance=w, cond=cond, steps=80, schedule="log_snr")
    torch.testing.assert_close(x, plan, rtol=1e-4, atol=2e-4)
    for batch_size in (1, 4):
        parts = guided(start, "dopri5", guidance=w, cond=cond, batch_size=batch_size)
        assert torch.equal(parts, x)
    assert info.nfe == int(info.nfe_of.max()) and (info.nfe_of % 2 == 0).all()
    # null_cond may belong to the samples too
    per_sample = guided(start, "dopri5", guidance=w, cond=cond, batch_size=4,
                        null_cond={"shift": torch.full((9,), -0.5)})  # fmt: skip
    assert torch.equal(per_sample, x)
    one = guided(start, "dopri5", guidance=1.0, cond=cond)
    plain, of_plain = guided(start, "dopri5", cond=cond, return_info=True)
    torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
    assert (of_plain.nfe_of % 6 == 1).all()


def test_guidance_of_one_memory_is_refused() -> None:
    kept = torch.zeros(9, 3)
    with pytest.raises(ValueError, match=r"^model: both outputs under guidance are the same"):
        guided(uneven(), "dopri5", guidance=2.0, net=lambda x, t, shift=0.0: kept)


class Doubled(nn.Module):
    def forward(self, x: Tensor, label: Tensor, shift: Any = 0.25) -> Tensor:
        return torch.cat([elementwise(x, label, shift), torch.full_like(x, math.nan)], dim=1)


def test_a_learned_variance_is_left_out() -> None:
    x = uneven(5, 2, 3)
    for net, variance in ((elementwise, None), (Doubled(), "learned_range")):
        model = ScoreModel(net, "eps", "sigma", variance=variance, null_cond={"shift": 0.0})
        z = encode(model, VESDE(0.1, 5.0), x, rtol=1e-4, atol=1e-4)
        y = sample(model, VESDE(0.1, 5.0), (5, 2, 3), method="ode", solver="dopri5", guidance=2.0,
                   x_init=x, rtol=1e-4, atol=1e-4)  # fmt: skip
        if variance is None:
            expected = z, y
        assert torch.equal(z, expected[0]) and torch.equal(y, expected[1])


BAD_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "shape": lambda x, t: x[:, :1],
    "more": lambda x, t: torch.cat([x, x], 1),
    "dtype": lambda x, t: x.long(),
    "none": lambda x, t: None,
    "tuple": lambda x, t: (x, t),
    "meta": lambda x, t: x.to("meta"),
    "array": lambda x, t: x.numpy(),
    "complex": lambda x, t: x * 1j,
    "in place": lambda x, t: x.mul_(-1.0),
    "time in place": lambda x, t: x * t.mul_(2.0)[:, None],
}


@pytest.mark.parametrize("solver", ["dopri5", "heun", "torchdiffeq:dopri5"])
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
@pytest.mark.parametrize("predicts", ["eps", "edm"])
def test_outputs_that_are_none(kind: str, solver: str, predicts: str) -> None:
    model = ScoreModel(BAD_OUTPUTS[kind], predicts)
    with pytest.raises(ValueError, match=r"^model: (expected|the network changed its input)"):
        encode(model, VESDE(0.1, 5.0), uneven(), solver=solver)


@pytest.mark.parametrize("net", [elementwise, lambda x, t: None, lambda x, t: x[..., :1]])
def test_outputs_that_are_no_learned_variance(net: Any) -> None:
    model = ScoreModel(net, "eps", variance="learned_range")
    with pytest.raises(ValueError, match=r"^model: expected a floating tensor of shape \(9, 6\)"):
        encode(model, VESDE(0.1, 5.0), uneven())
    with pytest.raises(ValueError, match=r"^model: .*expected samples with channels"):
        encode(model, VESDE(0.1, 5.0), uneven()[:, 0])


def test_outputs_may_be_views_and_kept_memory() -> None:
    x = uneven()
    kept: dict[int, Tensor] = {}

    def keeps(x: Tensor, label: Tensor) -> Tensor:
        out = kept.setdefault(len(x), torch.empty_like(x))
        return out.copy_(elementwise(x, label))

    def transposed(x: Tensor, label: Tensor) -> Tensor:
        return elementwise(x, label).t().contiguous().t()

    expected = encoded(elementwise, x, batch_size=4)
    assert torch.equal(encoded(keeps, x, batch_size=4), expected)
    assert torch.equal(encoded(transposed, x, batch_size=4), expected)
    # An input that is given back, and one value for all
    identity = encoded(lambda x, t: x, x)
    assert torch.equal(identity, encoded(lambda x, t: x.clone(), x))
    zero = torch.zeros(1, 1)
    assert torch.equal(
        encoded(lambda x, t: zero.expand(x.shape), x), encoded(lambda x, t: 0 * x, x)
    )


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_network_gets_its_own_dtype(net_dtype: torch.dtype) -> None:
    net, x = cases.Net(net_dtype), uneven()
    model = ScoreModel(net, "eps", "sigma")
    run: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    z = encode(model, VESDE(0.1, 5.0), x, **run)
    label_dtype = torch.float64 if net_dtype == torch.float64 else torch.float32
    assert z.dtype == torch.float32 and set(net.seen) == {(net_dtype, label_dtype)}
    net.scale.data = net.scale.detach().double()
    exact = encode(model, VESDE(0.1, 5.0), x, dtype=torch.float64, **run)
    assert exact.dtype == torch.float64
    bound = 200 * torch.finfo(net_dtype).eps + 5e-3
    assert float((z - exact).abs().max()) <= bound * float(exact.abs().max())
    fixed = encode(model, VESDE(0.1, 5.0), x, solver="rk4", steps=9, net_dtype=net_dtype)
    assert net.seen[-1] == (net_dtype, label_dtype) and fixed.isfinite().all()


def test_modes_are_put_back_and_no_gradient_is_kept() -> None:
    net = cases.Net()
    net.inner[1].eval()
    before = [m.training for m in net.modules()]
    assert before[0] and not before[-1]
    z = encode(ScoreModel(net, "eps", "sigma"), VESDE(0.1, 5.0), uneven().requires_grad_())
    assert [m.training for m in net.modules()] == before
    assert not z.requires_grad and net.scale.grad is None
    with pytest.raises(ValueError, match="not finite"):
        encode(ScoreModel(net, "eps"), VESDE(0.1, 5.0), uneven(), cond={"label": math.nan})
    assert [m.training for m in net.modules()] == before


def poisoned(sample: int, above: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Not finite for one sample above a noise level."""

    def net(x: Tensor, sigma: Tensor, number: Tensor) -> Tensor:
        bad = (number == sample) & (sigma > above)
        return torch.where(bad[:, None], math.inf, elementwise(x, sigma))

    return net


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "torchdiffeq:dopri5"])
def test_what_is_not_finite_is_reported(solver: str) -> None:
    x, cond = uneven(), {"number": torch.arange(9)}
    sde, steps = VESDE(0.1, 5.0), 20 if solver == "rk4" else None
    model = ScoreModel(poisoned(6, 1.3), "eps", "sigma")
    pattern = (
        r"^model: its outputs, or their derivatives, are not finite for 1 samples, first for "
        r"sample 6 after (\d+) evaluations \(t = (.*)\)$"
    )
    with pytest.raises(ValueError, match=pattern) as caught:
        encode(model, sde, x, solver=solver, steps=steps, batch_size=4, cond=cond)
    t = float(str(caught.value).split("t = ")[1].rstrip(")"))
    where = float(sde.time_at_nsr(1.3))
    # The beginning of rk4's step; with torchdiffeq an evaluation of the step that fails.
    slack = {"dopri5": 1e-5, "rk4": 1 / 20, "torchdiffeq:dopri5": 0.2}[solver]
    assert abs(t - where) <= slack


def test_the_host_reads_nothing_for_a_slope() -> None:
    x = uneven().float()
    for predicts in PREDICTIONS:
        for sde in (VPSDE(), DDPMSchedule.linear(100)):
            model = ScoreModel(elementwise, predicts, "sigma", sde)
            flow = ProbabilityFlow(model, sde)
            cond = {"shift": torch.linspace(-1, 1, 9)}
            system = FlowSystem(flow, keys(0, 9), KERNELS, torch.float32, cond)
            position = torch.linspace(flow.data.position, flow.prior.position, 9).double()
            index = torch.tensor([4, 2, 8])
            with NoHostReads():
                system.select(index)
                at = flow.at(position[None].expand(3, -1))[1]
                system.select(torch.arange(9))
                system.slope(at, x, x, torch.empty_like(x), integrals=False)
