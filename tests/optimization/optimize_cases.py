"""Blocks in the styles of the field, for the tests of `sbm_fast.optimize`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

C = 8


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() * x


class OwnNorm(nn.Module):
    """GroupNorm by another class, with its weights cast to the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_groups, self.eps = 4, 1e-6
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class WideNorm(nn.GroupNorm):
    """In the weights' dtype, whatever the input's is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).type(x.dtype)


class Clamped(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1.5, 1.5))


class Block(nn.Module):
    """The parts that the blocks below use."""

    def __init__(self, act: Any = None, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        norm = norm or (lambda channels: nn.GroupNorm(4, channels, eps=1e-6))
        self.norm1, self.norm2 = norm(C), norm(C)
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.emb, self.emb2 = nn.Linear(C, C), nn.Linear(C, 2 * C)
        self.act = nn.SiLU() if act is None else act
        self.dropout = nn.Dropout(0.1)
        self.mode = "add"


class Nested(Block):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        if emb is not None:
            h += self.emb(F.silu(emb))[:, :, None, None]
        h = self.act(self.norm2(h))
        return x + self.conv2(self.dropout(h))


class Stepwise(Block):
    def forward(self, x: Tensor, emb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = x
        h = self.norm1(h)
        h = self.act(h)
        h = self.conv1(h)
        if self.mode == "add":
            h = h + self.emb(emb)[:, :, None, None]
            h = self.norm2(h)
        elif self.mode == "film":
            scale, shift = torch.chunk(self.emb2(emb)[:, :, None, None], 2, dim=1)
            h = self.norm2(h)
            h = h * (1 + scale) + shift
        else:
            h = self.norm2(h)
        h = self.act(h)
        return (x + self.conv2(self.dropout(h))) / 2


class Addcmul(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = x
        x = self.conv1(F.silu(self.norm1(x)))
        params = self.emb2(emb).unsqueeze(2).unsqueeze(3).to(x.dtype)
        if self.mode == "film":
            scale, shift = params.chunk(chunks=2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm2(x), scale + 1))
        else:
            x = F.silu(self.norm2(x.add_(params[:, :C])))
        x = self.conv2(F.dropout(x, p=0.1, training=self.training))
        return x.add_(y) * 0.5


class Functions(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = swish(self.norm1(x))
        h = self.norm2(h) * (1 + self.emb(emb)[..., None, None])
        return h * torch.sigmoid(h)


class Sliced(nn.Module):
    """The norm taken out of a Sequential, its neighbours called by a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.GroupNorm(2, C), nn.SiLU(), nn.Conv2d(C, C, 1))
        self.emb = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, rest = self.out[0], self.out[1:]
        scale, shift = self.emb(emb)[..., None, None].chunk(2, dim=1)
        h = norm(x) * (1 + scale) + shift
        h = rest(h)
        return h


class Listed(nn.Module):
    """Modules in a list, called by a running number."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.all = nn.ModuleList([nn.Conv2d(C, C, 1), nn.GroupNorm(2, C), nn.Conv2d(C, C, 1)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        modules, i = self.all, 0
        h = modules[i](x)
        i += 1
        h = self.act(modules[i](h))
        i += 1
        return modules[i](h)


def film(block: nn.Module) -> nn.Module:
    block.mode = "film"
    return block


def awake(net: nn.Module) -> nn.Module:
    """Every parameter away from its first value."""
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return net


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(4)
    x = torch.randn(3, C, 6, 5, generator=source, dtype=dtype)
    return x, torch.randn(3, C, generator=source, dtype=dtype)
