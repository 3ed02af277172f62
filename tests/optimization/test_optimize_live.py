"""What `sbm_fast.optimize` leaves as it was: copies, training, layouts; and diffusers' networks."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optimize_cases import (
    Addcmul,
    Listed,
    Nested,
    OwnNorm,
    Stepwise,
    awake,
    film,
    given,
)
from torch import Tensor, nn

import sbm_fast
import sbm_fast.nn

pytestmark = pytest.mark.usefixtures("seeded")


def test_twice_is_once(calls: list[str]) -> None:
    block = Stepwise()
    first, second = sbm_fast.optimize(block), sbm_fast.optimize(block)
    assert first.replaced == second.replaced and not second.left
    assert type(block).__mro__[2] is Stepwise
    block(*given())
    assert calls == ["silu", "add silu"]
    second.restore()
    assert type(block) is Stepwise and type(block.norm1) is nn.GroupNorm


def test_copies_pickles_and_state(calls: list[str]) -> None:
    block = awake(Stepwise()).eval()
    names = [name for name, _ in block.named_parameters()]
    held = list(block.parameters())
    sbm_fast.optimize(block)
    assert [name for name, _ in block.named_parameters()] == names
    assert all(a is b for a, b in zip(held, block.parameters(), strict=True))
    assert isinstance(block, Stepwise) and type(block).__name__ == "Stepwise"
    should = block(*given())

    twin = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    calls.clear()
    torch.testing.assert_close(twin(*given()), should)
    assert calls == ["silu", "add silu"]

    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert type(read) is Stepwise and type(read.norm1) is nn.GroupNorm
    assert type(read.conv1) is nn.Conv2d
    torch.testing.assert_close(read(*given()), should)
    assert type(pickle.loads(pickle.dumps(twin))) is Stepwise
    block.load_state_dict(read.state_dict())
    torch.testing.assert_close(block(*given()), should)


@pytest.mark.parametrize("make", [Nested, Stepwise, Listed, lambda: film(Addcmul())])
def test_compiles_in_one_graph(make: Any, calls: list[str]) -> None:
    block = awake(make()).eval()
    should = block(*given())
    sbm_fast.optimize(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given()), should)


def test_same_training_curve() -> None:
    curves = []
    for fuse in (False, True):
        torch.manual_seed(7)
        net = nn.ModuleList([Nested(), film(Stepwise()), Addcmul(norm=OwnNorm)])
        if fuse:
            sbm_fast.optimize(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        losses = []
        for _ in range(10):
            x, emb = given()
            for block in net:
                x = block(x, emb)
            loss = x.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


def test_layout_and_dtype_and_back() -> None:
    block = awake(Stepwise()).eval()
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    should = block(*given())
    report = sbm_fast.optimize(
        block,
        channels_last=True,
        dtype=torch.bfloat16,
        example={"x": given()[0], "emb": given()[1]},
    )
    assert block.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert block.conv1.weight.dtype == torch.bfloat16 and block.norm1.weight.dtype == torch.float32
    out = block(*given())
    assert out.dtype == torch.float32 and not torch.equal(out, should)
    torch.testing.assert_close(out, should, rtol=0.05, atol=0.05)
    assert "torch.bfloat16" in str(report) and "channels_last" in str(report)
    with pytest.raises(ValueError, match="bfloat16"):
        sbm_fast.optimize(block, dtype=torch.float16)
    assert torch.equal(block(*given()), out)

    with torch.no_grad():
        block.conv2.weight.mul_(2)
    report.restore()
    for name, parameter in block.named_parameters():
        old = before[name]
        if name == "conv2.weight":
            old = 2 * old.bfloat16().float()
        assert torch.equal(parameter, old) and parameter.stride() == old.stride()
    block.conv2.weight.data = before["conv2.weight"]
    assert torch.equal(block(*given()), should)


def test_a_difference_undoes_all() -> None:
    class Counting(Nested):
        calls = 0

        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x, emb) + self.calls

    block = Counting()
    with pytest.raises(RuntimeError, match="differ by"):
        sbm_fast.optimize(block, example=given())
    assert type(block) is Counting and type(block.norm1) is nn.GroupNorm


DIFFUSERS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "sample_size": 8,
}


@pytest.mark.parametrize("film", ["default", "scale_shift"])
def test_diffusers_unet(film: str, calls: list[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    net = awake(
        diffusers.UNet2DModel(
            **DIFFUSERS,
            resnet_time_scale_shift=film,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            dropout=0.1,
        )
    ).train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    plain = copy.deepcopy(net)
    report = sbm_fast.optimize(net, example=(x, t))
    patterns = [r.pattern for r in report.replaced]
    blocks = sum(name.endswith("norm2") for name, _ in net.named_modules())
    second = "GroupNorm + FiLM + SiLU" if film == "scale_shift" else "vector + GroupNorm + SiLU"
    assert not report.left and patterns.count(second) == blocks
    assert patterns.count("GroupNorm + SiLU") == blocks + 1
    outs = []
    calls.clear()
    for model in (net, plain):
        torch.manual_seed(8)
        outs.append(model(x, t).sample)
        outs[-1].square().mean().backward()
    assert len(calls) == len(patterns)
    torch.testing.assert_close(*outs)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    report.restore()
    assert torch.equal(net.eval()(x, t).sample, plain.eval()(x, t).sample)


def test_diffusers_conditional_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    net = awake(
        diffusers.UNet2DConditionModel(
            **DIFFUSERS,
            cross_attention_dim=6,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    states = torch.randn(2, 5, 6)
    example = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": states}
    should = net.eval()(**example).sample
    report = sbm_fast.optimize(net, example=example)
    assert not report.left
    assert report.replaced[-1].pattern == "GroupNorm + SiLU"
    torch.testing.assert_close(net(**example).sample, should)
    half = sbm_fast.optimize(net, dtype=torch.bfloat16)
    out = net(**example).sample
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, should, rtol=0, atol=0.05 * should.abs().max().item())
    half.restore()
    assert torch.equal(net(**example).sample, should)
