"""Packed convolutions are torch's convolutions."""

import copy
import pickle

import pytest
import torch

from sbm_fast.nn.conv import Conv2d, packed


def case(kernel: int = 3, stride: int = 1, padding: int = 1, bias: bool = True) -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(64, 72, kernel, stride, padding, bias=bias)


def image(batch: int = 2, side: int = 9) -> torch.Tensor:
    x = torch.randn(batch, 64, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


def expected(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    x, weight = x.double(), conv.weight.double()
    return torch.nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding)


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 2, 0)], ids=["3x3", "1x1", "down", "no padding"]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [1.0, 0.7])
def test_the_formula(shape: tuple[int, int, int], bias: bool, gain: float) -> None:
    conv = case(*shape, bias)
    for batch, side in ((1, 8), (3, 17)):
        x = image(batch, side)
        want = expected(conv, x)
        plus = torch.randn(want.shape)
        with torch.no_grad():
            plain, joined = conv(x, gain=gain), conv(x, gain=gain, plus=plus)
            with packed(conv):
                packs = conv(x, gain=gain), conv(x, gain=gain, plus=plus)
                assert conv._pack is not None
        torch.testing.assert_close(packs[0].double(), gain * want, rtol=0, atol=1e-5)
        torch.testing.assert_close(packs[1].double(), gain * (want + plus), rtol=0, atol=1e-5)
        torch.testing.assert_close(packs, (plain, joined), rtol=1e-5, atol=1e-5)


def test_channels_last_stays() -> None:
    conv = case()
    with torch.no_grad(), packed(conv):
        assert conv(image()).is_contiguous(memory_format=torch.channels_last)


def test_new_weights_are_noticed() -> None:
    conv, x = case(), image()
    with torch.no_grad(), packed(conv):
        conv(x)
        conv.weight.mul_(2.0)
        conv.bias.add_(1.0)
        torch.testing.assert_close(conv(x).double(), expected(conv, x), rtol=1e-5, atol=1e-5)
        conv.weight = torch.nn.Parameter(conv.weight * 3)
        torch.testing.assert_close(conv(x).double(), expected(conv, x), rtol=1e-5, atol=1e-5)


def test_packs_live_as_long_as_the_outermost_block() -> None:
    conv = case()
    with torch.no_grad(), packed(torch.nn.Sequential(conv)):
        with packed(conv):
            conv(image())
        assert conv._pack is not None
        twin, read = copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))
        assert twin._pack is None and read._pack is None and twin._users == 0
        torch.testing.assert_close(twin(image()), conv(image()), rtol=1e-5, atol=1e-5)
    assert conv._pack is None and conv._users == 0


def test_derivatives_go_torchs_way() -> None:
    conv, x = case(), image().requires_grad_()
    with packed(conv):
        conv(x).square().sum().backward()
        assert conv.weight.grad is not None and x.grad is not None and conv._pack is None
        with torch.no_grad():
            _, tangent = torch.func.jvp(conv, (x.detach(),), (torch.ones_like(x),))
        assert tangent.abs().sum() > 0 and conv._pack is None


def test_other_inputs_go_torchs_way() -> None:
    conv = case()
    with torch.no_grad(), packed(conv):
        assert conv(image(batch=0)).shape == (0, 72, 9, 9)
        assert conv(image()[0]).shape == (72, 9, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert conv(image()).dtype == torch.bfloat16
        assert conv.double()(image().double()).dtype == torch.float64
        compiled = torch.compile(conv.float(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image()), conv(image()), rtol=1e-5, atol=1e-5)
