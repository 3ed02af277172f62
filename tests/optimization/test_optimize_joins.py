"""`sbm_fast.optimize` on blocks in the styles of the field: what is joined, what is left."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimize_cases import (
    Addcmul,
    Block,
    C,
    Clamped,
    Functions,
    Listed,
    Nested,
    OwnNorm,
    Sliced,
    Stepwise,
    Swish,
    WideNorm,
    awake,
    film,
    given,
    swish,
)
from torch import Tensor, nn

import sbm_fast
import sbm_fast.nn

pytestmark = pytest.mark.usefixtures("seeded")


CASES = {
    "nested": (lambda: Nested(), ["silu", "add silu"]),
    "nested, an own norm": (lambda: Nested(norm=OwnNorm), ["silu", "add silu"]),
    "nested, a wide norm": (
        lambda: Nested(norm=lambda c: WideNorm(2, c)),
        ["silu", "add silu"],
    ),
    "nested, no affine": (
        lambda: Nested(norm=lambda c: nn.GroupNorm(2, c, affine=False)),
        ["silu", "add silu"],
    ),
    "nested, Swish module": (lambda: Nested(act=Swish()), ["silu", "add silu"]),
    "nested, swish function": (lambda: Nested(act=swish), ["silu", "add silu"]),
    "nested, SiLU in place": (lambda: Nested(act=nn.SiLU(inplace=True)), ["silu", "add silu"]),
    "stepwise": (lambda: Stepwise(), ["silu", "add silu"]),
    "stepwise, SiLU in place": (lambda: Stepwise(act=nn.SiLU(True)), ["silu", "add silu"]),
    "stepwise, FiLM": (lambda: film(Stepwise()), ["silu", "film silu"]),
    "addcmul": (lambda: film(Addcmul()), ["silu", "film silu"]),
    "add_": (lambda: Addcmul(norm=OwnNorm), ["silu", "add silu"]),
    "functions": (lambda: Functions(), ["silu", "film silu"]),
    "sliced": (lambda: Sliced(), ["film silu"]),
    "listed": (lambda: Listed(), ["silu"]),
    "ReLU": (lambda: Nested(act=nn.ReLU()), ["", "add"]),
}


@pytest.mark.parametrize("make, expected", CASES.values(), ids=CASES)
def test_joins(make: Any, expected: list[str], calls: list[str]) -> None:
    block = awake(make()).double()
    plain = copy.deepcopy(block)
    report = sbm_fast.optimize(block)
    for mode in (True, False):
        calls.clear()
        block.train(mode), plain.train(mode)
        xs = [tuple(t.clone().requires_grad_() for t in given(torch.float64)) for _ in range(2)]
        outs = []
        for net, x in zip((block, plain), xs, strict=True):
            torch.manual_seed(5)
            outs.append(net(*x))
            net.zero_grad()
            outs[-1].square().mean().backward()
        assert calls == expected
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
        grads = [[*(t.grad for t in x), *(p.grad for p in net.parameters())]
                 for net, x in zip((block, plain), xs, strict=True)]  # fmt: skip
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    report.restore()
    calls.clear()
    x = given(torch.float64)
    assert torch.equal(block(*x), plain(*x))
    assert not calls and type(block) is type(plain)


def test_an_optional_embedding_may_be_missing(calls: list[str]) -> None:
    block = Nested().eval()
    x, _ = given()
    should = block(x)
    sbm_fast.optimize(block)
    torch.testing.assert_close(block(x), should)
    assert calls == ["silu", "silu"]


def test_changed_attributes_mean_what_they_meant(calls: list[str]) -> None:
    """Nothing of a module's state is baked in: mode, activation and norms can change later."""
    block = Stepwise().eval()
    plain = copy.deepcopy(block)
    sbm_fast.optimize(block)
    for net in (block, plain):
        net.mode, net.act = "film", nn.GELU()
        torch.manual_seed(6)
        net.norm1 = nn.BatchNorm2d(C).eval()
    torch.testing.assert_close(block(*given()), plain(*given()))
    assert calls == ["film"]


def test_sequential(calls: list[str]) -> None:
    net = awake(
        nn.Sequential(nn.Conv1d(C, C, 1), nn.GroupNorm(1, C), nn.SiLU(), nn.GroupNorm(C, C))
    )
    x = torch.randn(2, C, 7)
    should = net(x)
    report = sbm_fast.optimize(net, example=(x,))
    torch.testing.assert_close(net(x), should)
    assert calls[-2:] == ["silu", ""]
    assert [(r.path, r.pattern) for r in report.replaced] == [
        ("1", "GroupNorm + SiLU"),
        ("3", "GroupNorm"),
    ]
    assert isinstance(net, nn.Sequential) and isinstance(net[:3], nn.Sequential)
    assert report.difference is not None and report.difference < 1e-6


class Aliases(Block):
    """Sums and norms whose parts are read, or written into, in between."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        v = emb[:, :, None, None]
        same = x.view_as(x)
        same += v  # writes into the caller's x
        a = self.act(self.norm1(same))
        h = self.norm1(x)
        x.mul_(2)  # after the norm has read it
        b = self.act(h)
        h = x + v
        c = self.act(self.norm2(h)) + h
        h = self.norm2(c)
        d = torch.relu_(self.conv1(c))
        d = self.act(h) + d
        h = self.conv1(d)
        kept = h
        h += v
        e = self.act(self.norm2(h)) + kept
        for _ in range(2):
            h = self.norm1(e)
            e = h * 2 + self.act(h)
        h = self.norm1(e)
        h *= 2
        f = sum(self.act(h) for _ in range(2)) + h.mean()
        return a + b + c + d + e + f


def scaled(by: float) -> Callable[..., Any]:
    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            return by * forward(self, *args, **kwargs)

        return wrapper

    return decorate


def outer(factor: float) -> type[nn.Module]:
    class Pythonic(Block):
        """What a forward may have that is hard to make anew."""

        def __init__(self) -> None:
            super().__init__()
            self.__private = 0.5

        @scaled(0.5)
        def forward(self, x: Tensor, emb: Tensor, *, more: float = 0.25) -> Tensor:
            match self.mode:
                case "add":
                    h = x + emb[:, :, None, None]
                    h = self.act(self.norm1(h))
                case _:
                    h = x
            try:
                h = self.norm2(h)
                h = self.act(h)
            except ValueError:
                h = x
            inner = lambda y: self.act(self.norm1(y)) * factor  # noqa: E731
            if (k := self.conv1(h)).ndim == 4:
                h = inner(k) + self.__private
            text = """
            over two lines"""
            with torch.enable_grad():
                h = self.act(self.norm1(h)) + more + len(text)
            return super().__call__ and h + h.new_tensor(factor)

    return Pythonic


def test_forwards_of_all_kinds(calls: list[str]) -> None:
    block = outer(3.0)().eval()
    should = block(*given(), more=1.0)
    report = sbm_fast.optimize(block)
    assert not report.left
    torch.testing.assert_close(block(*given(), more=1.0), should)
    assert calls == ["add silu", "", "", "silu"]
    assert torch.equal(block(*given()), block(*given(), more=0.25))


def test_order_of_reads_and_writes_is_kept() -> None:
    block = awake(Aliases())
    x, emb = given()
    mine = x.clone()
    should = block(x, emb)
    sbm_fast.optimize(block)
    torch.testing.assert_close(block(mine, emb), should)
    torch.testing.assert_close(mine, x)


class ItsInput(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return input


class ItsInputBelow(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return input


class ReadsWhatWasAddedTo(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = x * 2
        h = self.conv1(y)
        h += self.emb(emb)[:, :, None, None]
        h = self.act(self.norm2(h))
        return h + y


class WritesBehindTheConvolution(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = x * 2
        h = self.conv1(y)
        h = h + self.emb(emb)[:, :, None, None]
        h = self.act(self.norm2(h))
        y[:, 0] = 0
        return h + y


@pytest.mark.parametrize("conv", [ItsInput, ItsInputBelow])
@pytest.mark.parametrize(
    ("make", "put_in_later"),
    [
        (ReadsWhatWasAddedTo, False),
        (ReadsWhatWasAddedTo, True),
        (WritesBehindTheConvolution, False),
    ],
)
def test_a_convolution_that_returns_its_input(make: Any, put_in_later: bool, conv: Any) -> None:
    block = awake(make())
    plain = copy.deepcopy(block)
    if put_in_later:
        sbm_fast.optimize(block)
    block.conv1, plain.conv1 = conv(8, 8, 3), conv(8, 8, 3)
    if not put_in_later:
        sbm_fast.optimize(block)
    outs = [net(*given()) for net in (block, plain)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().mean().backward()
    torch.testing.assert_close(block.emb.weight.grad, plain.emb.weight.grad)


def test_hooks_are_called(calls: list[str]) -> None:
    block = Nested()
    seen: list[Tensor] = []
    handle = block.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
    report = sbm_fast.optimize(block)
    assert [entry.path for entry in report.left] == ["norm2"]
    assert "hooks" in report.left[0].reason
    block(*given())
    assert len(seen) == 1 and calls == ["silu", ""]
    handle.remove()
    calls.clear()
    block(*given())
    assert len(seen) == 1 and calls == ["silu", "add silu"]


def test_left_and_why() -> None:
    net = nn.ModuleDict(
        {
            "clamped": Nested(norm=lambda c: Clamped(2, c)),
            "compiled": torch.compile(
                nn.Sequential(nn.GroupNorm(2, C), nn.SiLU()), backend="eager"
            ),
            "patched": Nested(),
            "made": Nested(),
            "ours": sbm_fast.nn.GroupNormSiLU(2, C),
        }
    )
    net["patched"].forward = lambda x, emb: x
    exec("def forward(self, x):\n    return self.act(self.norm1(x))", space := {})
    net["made"].__class__ = type("Made", (Nested,), space)
    report = sbm_fast.optimize(net)
    left = {entry.path: entry.reason for entry in report.left}
    assert left["clamped.norm1"] == "a forward of its own that is not group_norm"
    assert "torch.compile" in left["compiled"]
    assert "set on the instance" in left["patched"]
    assert "source" in left["made"]
    assert "fused by itself" in left["ours"]
    assert {r.path: r.pattern for r in report.replaced} == {
        f"{block}.{norm}": "GroupNorm"
        for block in ("patched", "made")
        for norm in ("norm1", "norm2")
    }
    table = str(report)
    assert all(path in table for path in left) and "4 norms replaced, 0 of them" in table


def test_a_class_may_carry_its_source(calls: list[str]) -> None:
    """EDM's pickles hold the source of their classes' module; it counts if it is what runs."""
    text = (
        "class Made(Nested):\n    def forward(self, x):\n        return self.act(self.norm1(x))\n"
    )
    for carried, expected in ((text, ["silu"]), (text.replace("norm1", "norm2"), [""])):
        exec(text, space := {"Nested": Nested})
        space["Made"]._orig_module_src = carried
        block = space["Made"]()
        report = sbm_fast.optimize(block)
        assert bool(report.left) == (carried != text)
        calls.clear()
        block(given()[0])
        assert calls == expected


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got int"):
        sbm_fast.optimize(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype must be"):
        sbm_fast.optimize(Nested(), dtype=torch.int8)
    with pytest.raises(TypeError, match="example must be"):
        sbm_fast.optimize(Nested(), example=given()[0])  # type: ignore[arg-type]


def test_a_class_put_on_top_is_not_taken_away() -> None:
    block = Nested()
    report = sbm_fast.optimize(block)
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(TypeError, match="Sharded"):
        report.restore()
    assert type(block).__name__ == "Sharded" and type(block.norm1) is not nn.GroupNorm
