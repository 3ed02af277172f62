"""`sbm_fast.optimize` on forwards that write where a norm or a sum could wait, and on modules that
do more than their forward says: outputs, gradients and errors stay those of the plain network."""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sbm_fast

C = 8


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(4, C), nn.SiLU()
        self.conv, self.lin = nn.Conv2d(C, C, 3, padding=1), nn.Linear(C, C)
        for name, part in parts.items():
            setattr(self, name, part)


class WritesAnElement(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        x[:, 0] = 0
        return self.act(h)


class WritesAView(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.view(-1)
        h = self.norm(x)
        flat[:] = 0
        return self.act(h)


class ChangesTheNorm(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        self.norm.eps = 10.0
        h = self.act(h)
        self.norm.eps = 1e-5
        return h


class SetsAProperty(Block):
    def doubled(self, x: Tensor) -> None:
        x.mul_(2)

    last = property(None, doubled)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        self.last = x
        return self.act(h)


class Generator(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        later = (self.act(h) for _ in range(1))
        x.mul_(2)
        return next(later)


class Closure(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        def double() -> int:
            x.mul_(2)
            return 0

        h = self.norm(x)
        return double() + self.act(h)


class KeptByACondition(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(x)
        if (kept := h).ndim == 4:
            h += emb[:, :, None, None]
            h = self.act(self.norm(h))
        return h + kept


class OwnHelper(Block):
    def doubled(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x * 1.0
        h = x + emb[:, :, None, None]
        h = self.act(self.norm(h))
        return h + self.doubled(x)


class InPlaceByPosition(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        v = self.lin(emb)[:, :, None, None]
        h = x + v
        h = self.act(self.norm(h))
        return h + F.relu(v, True)


class InAComprehension(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x * 1.0
        h = x + emb[:, :, None, None]
        h = self.act(self.norm(h))
        [y.mul_(2) for y in (x,)]
        return h + x


class RandomFactorFirst(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return (1 + F.dropout(emb)[:, :, None, None]) * self.norm(F.dropout(x))


class ByKeyword(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(input=self.norm(input=x))
        return nn.Sequential.forward(self.out, input=h) + self.out(input=h)


class CalledTwice(nn.GroupNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(super().__call__(x) * 3 + 1)


class TwiceSiLU(nn.SiLU):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Conditional(nn.GroupNorm):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        return h if emb is None else h * (1 + emb[:, :, None, None])


class Wide(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Plain(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.act(self.norm(x))


class WithEmbedding(Block):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.act(self.norm(x, emb))


class Frozen(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("no other class")
        super().__setattr__(name, value)


class Decorator:
    """A decorator that is an object, with __wrapped__ and without a closure."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self.function, instance)


class Decorated(Block):
    @Decorator
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.act(self.norm(x))


def out() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, C), nn.SiLU())


CASES: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (
            WritesAnElement, WritesAView, ChangesTheNorm, SetsAProperty, Generator, Closure,
            KeptByACondition, OwnHelper, InPlaceByPosition, InAComprehension, RandomFactorFirst,
            Frozen, Decorated,
        )
    },
    "arguments by keyword": lambda: ByKeyword(out=out()),
    "a norm's own __call__": lambda: Plain(norm=CalledTwice(4, C)),
    "an activation's own __call__": lambda: Plain(act=TwiceSiLU()),
    "a norm with an optional argument": lambda: WithEmbedding(norm=Conditional(4, C)),
    "a scripted activation": lambda: Plain(act=torch.jit.script(nn.SiLU())),
}  # fmt: skip


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x, emb = torch.randn(2, C, 4, 3, generator=source), torch.randn(2, C, generator=source)
    return x.to(dtype), emb.to(dtype)


def results(net: nn.Module) -> list[Tensor]:
    """The output, what it left in its inputs, and the gradients, where torch can make them."""
    x, emb = given()
    torch.manual_seed(2)
    with torch.no_grad():
        made = [net(x, emb), x, emb]
    x, emb = (v.requires_grad_() for v in given())
    torch.manual_seed(2)
    try:
        net(x * 1.0, emb).square().sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return made
    grads = [x.grad, emb.grad, *(p.grad for p in net.parameters())]
    return made + [g for g in grads if g is not None]


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_same_results(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make().double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    fused = copy.deepcopy(plain)
    report = sbm_fast.optimize(fused)
    torch.testing.assert_close(results(fused), results(plain))
    report.restore()
    assert type(fused) is type(plain) and type(fused.norm) is type(plain.norm)


def test_an_activation_may_be_scripted_later() -> None:
    net = Plain().double()
    should = net(*given())
    sbm_fast.optimize(net)
    net.act = torch.jit.script(nn.SiLU())
    torch.testing.assert_close(net(*given()), should)


def test_a_norm_with_private_state_is_left() -> None:
    class Gained(nn.GroupNorm):
        def __init__(self) -> None:
            super().__init__(4, C)
            self._gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self._gain

    net = nn.Sequential(Gained(), nn.SiLU())
    assert [entry.path for entry in sbm_fast.optimize(net).left] == ["0"]


def test_private_state_that_forward_does_not_read_is_no_matter() -> None:
    """EDM's persistent classes keep the arguments that they were made with."""

    class Persistent(nn.GroupNorm):
        def __init__(self) -> None:
            super().__init__(4, C)
            self._init_args = (4, C)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = nn.Sequential(Persistent(), nn.SiLU())
    report = sbm_fast.optimize(net)
    assert not report.left and report.replaced[0].pattern == "GroupNorm + SiLU"


def test_a_norm_may_change_the_dtype() -> None:
    net = nn.Sequential(Wide(4, C), nn.SiLU())
    x, _ = given(torch.bfloat16)
    sbm_fast.optimize(net)
    assert net(x).dtype == torch.float32


def test_trying_a_norm_calls_no_hooks() -> None:
    class Own(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = Plain(norm=Own(4, C))
    seen: list[object] = []
    net.norm.register_forward_hook(lambda *given: seen.append(given))
    sbm_fast.optimize(net)
    assert type(net.norm) is not Own and not seen


def test_classes_that_register_subclasses_see_none() -> None:
    known: list[str] = []

    class Registered(Plain):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            assert cls.__name__ not in known
            known.append(cls.__name__)

    class Kind(Registered):
        pass

    net = Kind()
    sbm_fast.optimize(net)
    assert known == ["Kind"] and type(net) is not Kind
    type("Later", (type(net),), {})
    assert known == ["Kind", "Later"]


class SuperOfItsClass(Plain):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.act(self.norm(super(self.__class__, self).forward(x, emb)))


class SuperOfItsType(Plain):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.act(self.norm(super(type(self), self).forward(x, emb)))


@pytest.mark.parametrize("kind", [SuperOfItsClass, SuperOfItsType])
def test_classes_that_no_subclass_can_have_are_left(kind: type[Block]) -> None:
    net = kind()
    should = net(*given(torch.float32))
    report = sbm_fast.optimize(net)
    assert "super(self.__class__, self)" in report.left[0].reason and type(net) is kind
    torch.testing.assert_close(net(*given(torch.float32)), should)


def test_parametrizations_can_be_taken_away() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    net = Plain().double()
    parametrize.register_parametrization(net.norm, "weight", Double())
    should = net(*given())
    report = sbm_fast.optimize(net)
    assert [entry.path for entry in report.left] == ["norm"] and "parametrize" in str(report)
    torch.testing.assert_close(net(*given()), should)
    parametrize.remove_parametrizations(net.norm, "weight")
    torch.testing.assert_close(net(*given()), should)


@pytest.mark.parametrize(
    "make",
    [
        lambda act: nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(2, C), act),
        lambda act: SequentialForward(act=act),
    ],
)
def test_a_second_optimize_keeps_the_dtype(make: Callable[[nn.Module], nn.Module]) -> None:
    net = make(nn.GELU())
    x, _ = given(torch.float32)
    sbm_fast.optimize(net, dtype=torch.bfloat16)
    name = next(name for name, child in net.named_children() if isinstance(child, nn.GELU))
    setattr(net, name, nn.SiLU())
    report = sbm_fast.optimize(net, dtype=torch.bfloat16)
    assert report.replaced[0].pattern == "GroupNorm + SiLU"
    assert net(x).dtype == torch.float32


class SequentialForward(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("cast_first", [True, False])
def test_reports_are_restored_in_any_order(cast_first: bool) -> None:
    net = SequentialForward()
    x, _ = given(torch.float32)
    should = net(x)
    how: list[dict[str, Any]] = [{"dtype": torch.bfloat16}, {"channels_last": True}]
    reports = [sbm_fast.optimize(net, **h) for h in (how if cast_first else how[::-1])]
    for report in reports:
        report.restore()
    assert net.conv.weight.dtype == torch.float32
    torch.testing.assert_close(net(x), should, rtol=0, atol=1e-6)


def test_an_example_is_not_written_into() -> None:
    net = WritesAnElement()
    x, emb = given(torch.float32)
    kept = x.clone()
    assert sbm_fast.optimize(net, example=(x, emb)).difference is not None
    assert torch.equal(x, kept)


def test_an_example_without_tensors_in_its_output_is_told() -> None:
    class Boxed(Plain):
        def forward(self, x: Tensor, emb: Tensor) -> Any:
            return SimpleNamespace(sample=super().forward(x, emb))

    net = Boxed()
    with pytest.raises(RuntimeError, match=r"example: nothing to compare: .* SimpleNamespace"):
        sbm_fast.optimize(net, example=given(torch.float32))
    assert type(net) is Boxed and type(net.norm) is nn.GroupNorm
