"""`sbm_fast.optimize` on blocks in the styles of the field: what is joined, what is left."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbm_fast
import sbm_fast.nn
from sbm_fast.optimization import joined

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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each call of the op had: "add film silu", …"""
    made: list[str] = []
    op = joined.group_norm_silu

    def recorded(*args: Any, **kwargs: Any) -> Any:
        film = kwargs["scale"] is not None
        parts = {"add": kwargs["add"] is not None, "film": film, "silu": bool(kwargs["activation"])}
        made.append(" ".join(part for part, there in parts.items() if there))
        return op(*args, **kwargs)

    monkeypatch.setattr(joined, "group_norm_silu", recorded)
    return made


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
