"""Packed convolutions are torch's convolutions."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad

from sbm_fast import _load
from sbm_fast.nn import UNet, winograd
from sbm_fast.nn.conv import Conv2d, packed

needs_kernels = pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)


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
                assert conv._packs
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


def test_new_weights_at_an_old_address_are_noticed() -> None:
    conv, x = case(), image()
    with torch.no_grad(), packed(conv):
        for _ in range(10):
            conv(x)
            for _ in range(2):
                new = {name: torch.randn_like(v) for name, v in conv.state_dict().items()}
                conv.load_state_dict(new, assign=True)
            torch.testing.assert_close(conv(x).double(), expected(conv, x), rtol=1e-4, atol=1e-4)
        conv(x)
        conv.weight = torch.nn.Parameter(conv.weight.data)  # its version counts anew
        conv.weight.mul_(2.0)
        conv(x)
        conv.weight = torch.nn.Parameter(conv.weight.data)
        conv.weight.mul_(2.0)
        torch.testing.assert_close(conv(x).double(), expected(conv, x), rtol=1e-4, atol=1e-4)


def test_packs_live_as_long_as_the_outermost_block() -> None:
    conv = case()
    with torch.no_grad(), packed(torch.nn.Sequential(conv)):
        with packed(conv):
            conv(image())
        assert conv._packs
        twin, read = copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))
        assert twin._packs is None and read._packs is None and twin._users == 0
        torch.testing.assert_close(twin(image()), conv(image()), rtol=1e-5, atol=1e-5)
    assert conv._packs is None and conv._users == 0


def test_backwards_go_torchs_way() -> None:
    conv, x = case(), image().requires_grad_()
    with packed(conv):
        conv(x).square().sum().backward()
        assert conv.weight.grad is not None and x.grad is not None and conv._packs is None
        torch.func.grad(lambda x: conv(x).sum())(x.detach())
        with torch.no_grad():  # forward over forward, and by the weights
            inner = lambda x: torch.func.jvp(conv, (x,), (x,))[1]  # noqa: E731
            torch.func.jvp(inner, (x.detach(),), (torch.ones_like(x),))
            weights = {"weight": conv.weight.detach(), "bias": conv.bias.detach()}
            call = lambda w: torch.func.functional_call(conv, w, (x.detach(),))  # noqa: E731
            _, tangent = torch.func.jvp(call, (weights,), (weights,))
        assert tangent.abs().sum() > 0 and conv._packs is None


@pytest.mark.parametrize(("batch", "size"), [(1, 8), (3, 19)])
def test_the_gradient_of_what_is_added(batch: int, size: int) -> None:
    """Also where nothing else wants one."""
    conv, x = case().requires_grad_(False), image(batch, size)
    plus = torch.zeros_like(expected(conv, x), dtype=torch.float32, requires_grad=True)
    with packed(conv):
        conv(x, plus=plus, gain=0.5).sum().backward()
    assert plus.grad is not None and plus.grad.eq(0.5).all()


@pytest.mark.parametrize("batch", [1, 4])  # torch's own, and Winograd
def test_gradients_by_the_input_alone(batch: int) -> None:
    conv, x = case().requires_grad_(False), image(batch).requires_grad_()
    want = conv(x, gain=0.7)
    dy, plus = torch.randn_like(want), torch.randn_like(want).requires_grad_()
    (dx,) = torch.autograd.grad(want, x, dy)
    with packed(conv):
        y = conv(x, gain=0.7, plus=plus)
        torch.testing.assert_close(y, want + 0.7 * plus, rtol=1e-5, atol=1e-5)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = dy.contiguous(memory_format=layout)
            got = torch.autograd.grad(y, (x, plus), given, retain_graph=True)
            torch.testing.assert_close(got[0], dx, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got[1], 0.7 * dy)
        packs = {(2, False), (2, True)} if batch == 4 and _load.COMPILED else set()
        assert set(conv._packs or ()) == packs
        twice = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(twice.sum(), x, retain_graph=True)[0].abs().sum() > 0
        both = torch.stack([dy, 2 * dy])
        many = torch.autograd.grad(y, x, both, retain_graph=True, is_grads_batched=True)[0]
        torch.testing.assert_close(many[1], 2 * dx, rtol=1e-5, atol=1e-5)
    assert conv._packs is None
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dx, rtol=1e-5, atol=1e-5)
    assert conv._packs is None  # also after the block


@needs_kernels
def test_weights_changed_before_the_backward() -> None:
    conv, x = case().requires_grad_(False), image(4).requires_grad_()
    with packed(conv):
        y = conv(x)
        conv.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="weights were changed"):
            y.sum().backward()


@pytest.mark.parametrize("batch", [1, 4])  # the direct sum, and Winograd
@pytest.mark.parametrize("joined", ["", "primal", "dual"])
@pytest.mark.parametrize("last", [True, False])
def test_forward_mode_reads_packs(batch: int, joined: str, last: bool) -> None:
    conv, x = case(), image(batch)
    x = x if last else x.contiguous()
    vectors = torch.randn(3, *x.shape)
    plus = torch.randn(batch, 72, 9, 9) if joined else None
    changes = torch.randn(3, *plus.shape) if joined == "dual" else None

    def one(k: int, in_dual_level: bool) -> tuple[torch.Tensor, torch.Tensor]:
        change = None if changes is None else changes[k]
        if in_dual_level:
            with torch.no_grad(), forward_ad.dual_level():
                add = plus if change is None else forward_ad.make_dual(plus, change)
                y = conv(forward_ad.make_dual(x, vectors[k]), gain=0.7, plus=add)
                return forward_ad.unpack_dual(y)
        with torch.no_grad():
            if change is None:
                call = lambda x: conv(x, gain=0.7, plus=plus)  # noqa: E731
                return torch.func.jvp(call, (x,), (vectors[k],))
            call = lambda x, add: conv(x, gain=0.7, plus=add)  # noqa: E731
            return torch.func.jvp(call, (x, plus), (vectors[k], change))

    def all_at_once() -> tuple[torch.Tensor, torch.Tensor]:
        def both(vector: torch.Tensor, change: torch.Tensor | None) -> object:
            if change is None:
                return torch.func.jvp(lambda x: conv(x, gain=0.7, plus=plus), (x,), (vector,))
            call = lambda x, add: conv(x, gain=0.7, plus=add)  # noqa: E731
            return torch.func.jvp(call, (x, plus), (vector, change))

        axes = (0, None if changes is None else 0)
        with torch.no_grad():
            return torch.vmap(both, in_dims=axes, out_dims=(None, 0))(vectors, changes)

    want = [one(k, True) for k in range(3)]
    with packed(conv):
        for in_dual_level in (True, False):
            for k in range(3):
                torch.testing.assert_close(
                    one(k, in_dual_level), want[k], rtol=1e-5, atol=1e-5, check_stride=False
                )
        assert conv._packs
        output, products = all_at_once()
    torch.testing.assert_close(output, want[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products, torch.stack([w[1] for w in want]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_mapped_dimension_of_nothing(axis: int, batch: int) -> None:
    """The result has the images of one call, also in a derivative and where only what is added is
    mapped. (torch's own rule, as of 2.13, forgets them: [0, 0, 72, 9, 9].)"""
    conv, x = case().requires_grad_(False), image(batch)
    nothing = torch.empty(0, *x.shape).movedim(0, axis)
    plus = torch.empty(batch, 0, 72, 9, 9)
    product = torch.vmap(lambda x: torch.func.jvp(conv, (x,), (x,)), axis)
    added = torch.vmap(lambda plus: conv(x, plus=plus), 1)
    with packed(conv):
        y, (outputs, products) = torch.vmap(conv, axis)(nothing), product(nothing)
        assert added(plus).shape == (0, batch, 72, 9, 9)
    assert y.shape == outputs.shape == products.shape == (0, batch, 72, 9, 9)


def test_other_inputs_go_torchs_way() -> None:
    conv = case()
    with torch.inference_mode():
        bias = torch.nn.Parameter(torch.zeros(72))  # has no version counter
    inferring = case()
    inferring.bias = bias
    with torch.no_grad(), packed(inferring):
        assert inferring(image()).shape == (2, 72, 9, 9) and inferring._packs is None
    with torch.no_grad(), packed(conv):
        assert conv(image(batch=0)).shape == (0, 72, 9, 9)
        assert conv(image()[0]).shape == (72, 9, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert conv(image()).dtype == torch.bfloat16
        assert conv.double()(image().double()).dtype == torch.float64
        compiled = torch.compile(conv.float(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image()), conv(image()), rtol=1e-5, atol=1e-5)


def test_when_winograd_is_used() -> None:
    """By the number of tiles; never for few channels, for channels first, or without kernels."""
    sides = {(1, 9): 0, (2, 9): 2, (1, 11): 2, (4, 16): 4, (1, 29): 4, (64, 4): 4, (8, 4): 2}
    for (batch, size), side in sides.items():
        assert winograd.side(image(batch, size), 72) == (side if _load.COMPILED else 0)
    assert winograd.side(image(4, 32), 63) == 0 == winograd.side(image(4, 32)[:, :63], 64)
    assert winograd.side(image(4, 32).contiguous(), 72) == 0


@needs_kernels
@pytest.mark.parametrize(("batch", "size", "side"), [(1, 8, 0), (1, 13, 2), (3, 19, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_to_convolve(batch: int, size: int, side: int, bias: bool) -> None:
    conv, x = case(bias=bias), image(batch, size)
    want = expected(conv, x)
    plus = torch.randn(want.shape)
    with torch.no_grad(), packed(conv):
        got = conv(x, gain=0.7, plus=plus)
        assert list(conv._packs) == [(side, False)]
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.double(), 0.7 * (want + plus), rtol=0, atol=1e-5)
        conv.weight.mul_(2.0)
        want = expected(conv, x)
        torch.testing.assert_close(conv(x).double(), want, rtol=1e-5, atol=2e-5)
    with torch.inference_mode(), packed(conv):
        torch.testing.assert_close(conv(x).double(), want, rtol=1e-5, atol=2e-5)
    with torch.no_grad(), packed(conv):
        torch.testing.assert_close(conv(x).double(), want, rtol=1e-5, atol=2e-5)


@needs_kernels
def test_both_packs_are_kept_where_both_are_used() -> None:
    conv = case()
    with torch.no_grad(), packed(conv):
        for batch in (1, 4, 1):
            conv(image(batch))
        assert sorted(conv._packs) == [(0, False), (2, False)]
    assert conv._packs is None


@needs_kernels
def test_a_network_by_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative error of a whole network against float64, less than 3 times that of oneDNN's."""
    torch.manual_seed(3)
    net = UNet(channels=64, channel_mult=(1, 2)).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    x, label = torch.randn(4, 1, 32, 32), torch.rand(4)
    errors = {}
    with torch.no_grad():
        want = copy.deepcopy(net).double()(x.double(), label.double())
        for rule in ({}, {2: 1}, {4: 1}, winograd.FEWEST):
            monkeypatch.setattr(winograd, "FEWEST", rule)
            with packed(net):
                got = net(x, label).double()
                sides = {s for m in net.modules() for s, _ in getattr(m, "_packs", None) or ()}
            assert not rule or sides & set(rule)
            errors[str(rule)] = float((got - want).norm() / want.norm())
    assert max(errors.values()) < 3 * errors["{}"], errors
