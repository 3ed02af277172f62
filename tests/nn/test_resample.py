"""Filters and resampling convolutions against upfirdn2d written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sbm_fast.nn import resample
from sbm_fast.nn.blocks import Downsample, Upsample

KERNELS = [(1, 1), (1, 3, 3, 1), (1, 2, 1), (1, 2, 3, 5, 2, 1), (3, 1)]


def upfirdn(
    x: np.ndarray, kernel: tuple[float, ...], up: int, down: int, pad: tuple[int, int], gain: float
) -> np.ndarray:
    """Zeros between, zeros around, convolution with the normalised filter, every down-th pixel."""
    taps = np.asarray(kernel, dtype=np.float64)
    square = gain * np.outer(taps, taps) / taps.sum() ** 2
    batch, channels, height, width = x.shape
    wide = np.zeros((batch, channels, height * up, width * up))
    wide[:, :, ::up, ::up] = x
    wide = np.pad(wide, ((0, 0), (0, 0), pad, pad))
    size = len(taps)
    rows, columns = wide.shape[2] - size + 1, wide.shape[3] - size + 1
    y = np.zeros((batch, channels, rows, columns))
    for i in range(size):
        for j in range(size):
            y += square[size - 1 - i, size - 1 - j] * wide[:, :, i : i + rows, j : j + columns]
    return y[:, :, ::down, ::down]


def conv3x3(x: np.ndarray, conv: nn.Conv2d, stride: int = 1) -> np.ndarray:
    """Without padding."""
    weight, bias = conv.weight.double(), conv.bias.double()  # type: ignore[union-attr]
    return nn.functional.conv2d(torch.from_numpy(x), weight, bias, stride).detach().numpy()


def image(memory: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    x = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(memory_format=memory)


def awake(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module.double()


def close(ours: torch.Tensor, want: np.ndarray) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", KERNELS)
def test_up_and_down(kernel: tuple[float, ...], memory: torch.memory_format) -> None:
    x, extra = image(memory), len(kernel) - 2
    up, down = resample.Up(kernel).double()(x), resample.Down(kernel).double()(x)
    pad = (extra + 1) // 2 + 1, extra // 2
    close(up, upfirdn(x.numpy(), kernel, 2, 1, pad, 4.0))
    close(down, upfirdn(x.numpy(), kernel, 1, 2, ((extra + 1) // 2, extra // 2), 1.0))
    for y in (up, down):
        assert y.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("kernel", KERNELS)
def test_convolutions_see_what_the_filter_leaves_outside(kernel: tuple[float, ...]) -> None:
    """Filter and convolution are one linear map: padding is made once, in front of both."""
    x, extra = image(), len(kernel) - 2
    down = awake(Downsample(3, 5, conv=True, kernel=kernel, smooth=True))
    smooth = upfirdn(x.numpy(), kernel, 1, 1, ((extra + 3) // 2, (extra + 2) // 2), 1.0)
    close(down(x), conv3x3(smooth, down.conv, 2))
    if kernel == resample.BOX:
        return
    up = awake(Upsample(3, 5, conv=True, kernel=kernel))
    low, high = (extra + 1) // 2 + 2, extra // 2 + 1
    close(up(x), conv3x3(upfirdn(x.numpy(), kernel, 2, 1, (low, high), 4.0), up.conv))


def test_plain_convolutions() -> None:
    x = image()
    near, far = (awake(Downsample(3, conv=True, far=far)) for far in (False, True))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    close(near(x), conv3x3(padded, near.conv, 2))
    close(far(x), conv3x3(padded[:, :, 1:, 1:], far.conv, 2))
    up = awake(Upsample(3, conv=True))
    doubled = x.numpy().repeat(2, axis=2).repeat(2, axis=3)
    close(up(x), conv3x3(np.pad(doubled, ((0, 0), (0, 0), (1, 1), (1, 1))), up.conv))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_keeps_its_value_inside(kernel: tuple[float, ...]) -> None:
    # Up, only filters of which both halves (every second tap) have the same sum do that.
    ones = torch.ones(1, 1, 16, 16)
    inner = slice(4, -4)
    assert torch.allclose(resample.Down(kernel)(ones)[..., 2:-2, 2:-2], torch.ones(()))
    if sum(kernel[::2]) == sum(kernel[1::2]):
        assert torch.allclose(resample.Up(kernel)(ones)[..., inner, inner], torch.ones(()))


def test_filters_follow_the_network_and_are_not_stored() -> None:
    up = resample.Up((1, 3, 3, 1))
    assert not up.state_dict() and not list(up.parameters())
    # Sixteenths are exact in bf16, so half precision has the same filter.
    assert torch.equal(up.bfloat16().weight.float(), resample.Up((1, 3, 3, 1)).weight)


def test_second_derivatives_and_forward_mode() -> None:
    x = image()[:, :1, :4, :4].contiguous()
    for module in (resample.Up((1, 3, 3, 1)).double(), resample.Down((1, 3, 3, 1)).double()):
        _, tangent = torch.func.jvp(module, (x,), (x,))
        torch.testing.assert_close(tangent, module(x))
        assert torch.autograd.gradcheck(module, x.requires_grad_(), check_forward_ad=True)
