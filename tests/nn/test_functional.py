"""group_norm_silu as networks call it: derivatives of every kind, transforms, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from sbm_fast.nn import GroupNormSiLU
from sbm_fast.nn.functional import group_norm_silu
from sbm_fast.nn.unet import UNet

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ROWS = ("weight", "bias", "scale", "shift", "add")


def inputs(shape: tuple[int, ...], dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
    """x, weight, bias, scale, shift, add, residual"""
    g = torch.Generator().manual_seed(seed)
    sizes = (shape, shape[1:2], shape[1:2], *[shape[:2]] * 3, shape)
    return [torch.randn(size, generator=g, dtype=F64).to(dtype) for size in sizes]


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, add: Tensor,
    residual: Tensor, **options: Any,
) -> Any:  # fmt: skip
    options = {"gain": 0.7} | options
    return group_norm_silu(
        x, 2, weight, bias, scale=scale, shift=shift, add=add, residual=residual, **options
    )


def composite(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, add: Tensor,
    residual: Tensor,
) -> Tensor:  # fmt: skip
    """The same by operations that torch differentiates twice in any mode: neither its group_norm
    nor its silu have forward over reverse."""
    wide = (...,) + (None,) * (x.ndim - 2)
    h = 0.7 * (x + add[wide] + residual)
    grouped = h.reshape(h.shape[0], 2, -1)
    var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    n = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(h.shape)
    n = n * weight.reshape(-1, *(1,) * (x.ndim - 2)) + bias.reshape(-1, *(1,) * (x.ndim - 2))
    n = n * (1 + scale[wide]) + shift[wide]
    return n * torch.sigmoid(n)


def wanting(tensors: list[Tensor]) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in tensors]


@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (2, 6), (1, 4, 3), (2, 2, 1, 2, 2)])
def test_gradients(shape: tuple[int, ...]) -> None:
    """Of y and of h, by every input, in both modes, one and several at a time."""
    for options in ({"return_sum": True}, {"activation": None}):
        assert gradcheck(
            lambda *v, options=options: fused(*v, **options), wanting(inputs(shape)),
            check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
        )  # fmt: skip


@pytest.mark.parametrize("count", range(7))
def test_gradients_where_one_input_wants_them(count: int) -> None:
    tensors = inputs((2, 4, 3))
    tensors[count].requires_grad_()
    assert gradcheck(fused, tensors, check_forward_ad=True)
    if count < 3:
        bare = [v.detach() for v in tensors[:3]]
        bare[count].requires_grad_()
        assert gradcheck(lambda x, *rows: group_norm_silu(x, 4, *rows), bare, check_forward_ad=True)


def test_gradients_of_channels_last() -> None:
    x = inputs((2, 4, 3, 2))[0].to(memory_format=torch.channels_last).requires_grad_()
    assert gradcheck(lambda x: group_norm_silu(x, 2), [x], check_forward_ad=True)
    (gradient,) = torch.autograd.grad(group_norm_silu(x, 2).sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_second_derivatives() -> None:
    assert gradgradcheck(fused, wanting(inputs((2, 4, 2))), check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_have_their_inputs_dtype(dtype: torch.dtype) -> None:
    """And are within twice the error of torch's own of the float64 ones."""
    tensors = wanting(inputs((2, 4, 9, 7), dtype))
    given = inputs((2, 4, 9, 7), dtype, seed=1)[0]

    def gradients(function: Callable[..., Tensor], to: torch.dtype) -> tuple[Tensor, ...]:
        at = wanting([v.to(to) for v in tensors])
        return torch.autograd.grad(function(*at), at, given.to(to))

    exact, plain = gradients(composite, F64), gradients(composite, dtype)
    for got, e, p in zip(gradients(fused, dtype), exact, plain, strict=True):
        assert got.dtype == dtype
        bound = 2 * (p - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        assert (got - e).abs().max() <= bound


def test_functions_of_functions() -> None:
    """functorch's transforms, in every order of two."""
    x, *rest = inputs((2, 4, 3, 2))
    v = torch.randn_like(x)
    ours, theirs = (lambda x, f=f: f(x, *rest).sin().sum() for f in (fused, composite))
    jvp, grad = torch.func.jvp, torch.func.grad
    orders: list[Callable[[Any], Tensor]] = [
        lambda f: jvp(f, (x,), (v,))[1],
        lambda f: grad(f)(x),
        lambda f: jvp(grad(f), (x,), (v,))[1],
        lambda f: grad(lambda x: jvp(f, (x,), (v,))[1])(x),
        lambda f: jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (v,))[1],
        lambda f: grad(lambda x: (grad(f)(x) * v).sum())(x),
        lambda f: torch.func.hessian(f)(x),
    ]
    for order in orders:
        torch.testing.assert_close(order(ours), order(theirs))


def test_dual_tensors_of_what_wants_a_gradient() -> None:
    """Reverse over forward and forward over reverse without functorch."""
    x, *rest = inputs((2, 4, 3, 2))
    v = torch.randn_like(x)
    results = []
    for function in (fused, composite):
        at = x.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(at, v)
            y = function(dual, *rest)
            tangent = forward_ad.unpack_dual(y).tangent
            over_forward = torch.autograd.grad(tangent.sin().sum(), at, retain_graph=True)[0]
            gradient = torch.autograd.grad(y.sin().sum(), dual)[0]
            results.append((over_forward, forward_ad.unpack_dual(gradient).tangent.detach()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("last", [False, True])
def test_vmap(last: bool) -> None:
    """Over jvp, as the likelihood has it, over gradients, and over every input."""
    x, *rest = inputs((2, 4, 3, 5))
    x = x.to(memory_format=torch.channels_last) if last else x
    vectors = torch.randn(3, *x.shape, dtype=F64)

    def pushed(v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: fused(x, *rest), (x,), (v,))

    y, products = torch.vmap(pushed, out_dims=(None, 0))(vectors)
    torch.testing.assert_close(y, fused(x, *rest))
    torch.testing.assert_close(products, torch.stack([pushed(v)[1] for v in vectors]))

    gradient = torch.func.grad(lambda x: fused(x, *rest).sin().sum())
    expected = torch.stack([gradient(v) for v in vectors])
    torch.testing.assert_close(torch.func.vmap(gradient)(vectors), expected)

    many = [torch.stack([v, 2 * v, v + 1]) for v in (x, *rest)]
    for mapped in ([0], [1], [3, 5], list(range(7))):
        dims = tuple(0 if i in mapped else None for i in range(7))
        at = [many[i] if i in mapped else (x, *rest)[i] for i in range(7)]
        calls = [[v[k] if d == 0 else v for v, d in zip(at, dims, strict=True)] for k in range(3)]
        got = torch.vmap(fused, in_dims=dims)(*at)
        torch.testing.assert_close(got, torch.stack([fused(*call) for call in calls]))


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_a_full_graph(backend: str, wants: bool) -> None:
    torch._dynamo.reset()
    at = [v.requires_grad_(wants) for v in inputs((2, 4, 3, 5), F32)]
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    results = [f(*at, return_sum=True) for f in (fused, compiled)]
    torch.testing.assert_close(*results)
    if wants:
        gradients = [torch.autograd.grad((y.sin() + h).sum(), at) for y, h in results]
        torch.testing.assert_close(*gradients)


def by_weight(x: Tensor, weight: Tensor) -> Tensor:
    return group_norm_silu(x, 2, weight, torch.ones(4), gain=0.7)


TRANSFORMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "grad": lambda x, w: torch.func.grad(lambda *v: by_weight(*v).square().sum(), (0, 1))(x, w),
    "vjp": lambda x, w: torch.func.vjp(by_weight, x, w)[1](x.cos()),
    "jvp": lambda x, w: torch.func.jvp(by_weight, (x, w), (x.cos(), w.sin())),
    "vmap": lambda x, w: torch.func.vmap(by_weight, (None, 0))(x, torch.stack([w, 2 * w])),
    "jacfwd": lambda x, w: torch.func.jacfwd(by_weight)(x, w),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiles_transforms(name: str) -> None:
    """The op alone would have no derivatives there: they were zeros."""
    torch._dynamo.reset()
    x, weight = inputs((2, 4, 3), F32)[:2]
    with torch.no_grad():
        want = TRANSFORMED[name](x, weight)
        compiled = torch.compile(TRANSFORMED[name], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight), want)


def test_dual_tensors_in_compiled_functions() -> None:
    torch._dynamo.reset()
    x, weight = inputs((2, 4, 3), F32)[:2]
    compiled = torch.compile(by_weight, fullgraph=True, backend="aot_eager")
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()), weight)).tangent
            for f in (compiled, by_weight)
        ]
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


def test_compiles_with_a_gain_that_changes() -> None:
    torch._dynamo.reset()
    x = inputs((2, 4, 3), F32)[0]
    compiled = torch.compile(
        lambda gain: group_norm_silu(x, 2, gain=gain), fullgraph=True, backend="aot_eager"
    )
    for gain in (0.5, 0.7, 0.9):
        torch.testing.assert_close(compiled(gain), group_norm_silu(x, 2, gain=gain))


@pytest.mark.parametrize("mapped", [(0,), (1,), (0, 1)])
def test_vmap_over_nothing(mapped: tuple[int, ...]) -> None:
    x, weight = inputs((2, 4, 3), F32)[:2]
    at = [v.new_zeros(0, *v.shape) if i in mapped else v for i, v in enumerate((x, weight))]
    dims = tuple(0 if i in mapped else None for i in range(2))
    assert torch.vmap(by_weight, in_dims=dims)(*at).shape == (0, 2, 4, 3)


def test_memory_formats() -> None:
    x = torch.randn(2, 6, 4, 5)
    plain = group_norm_silu(x, 3)
    last = group_norm_silu(x.to(memory_format=torch.channels_last), 3)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)
    spread = torch.randn(2, 6, 8, 5)[:, :, ::2].copy_(x)
    assert torch.equal(group_norm_silu(spread, 3), plain)
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(group_norm_silu(swapped, 3), plain)
    assert torch.equal(group_norm_silu(x, 3, residual=swapped), group_norm_silu(x, 3, residual=x))
    words = torch.randn(2, 7, 6).transpose(1, 2)
    assert group_norm_silu(words, 3).stride() == words.stride()
    scale, shift = torch.randn(2, 12).chunk(2, dim=1)
    torch.testing.assert_close(
        group_norm_silu(x, 3, scale=scale, shift=shift),
        group_norm_silu(x, 3, scale=scale.clone(), shift=shift.clone()),
    )


def test_the_sum_is_x_itself_where_nothing_is_added() -> None:
    x = torch.randn(2, 4, 3)
    assert group_norm_silu(x, 2, return_sum=True)[1] is x
    assert group_norm_silu(x, 2, gain=2.0, return_sum=True)[1].equal(2 * x)


@pytest.mark.parametrize("wants", [False, True])
def test_empty(wants: bool) -> None:
    for shape in ((0, 4, 3, 3), (0, 4), (2, 4, 0)):
        x = torch.randn(shape, requires_grad=wants)
        y = group_norm_silu(x, 2, torch.ones(4, requires_grad=wants))
        assert y.shape == shape
        if wants:
            y.sum().backward()
            assert x.grad is not None and x.grad.shape == shape


IMAGE = torch.zeros(2, 4, 3, 3)
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"x: expected \[B, C, …\], got the shape \[4\]", {"x": torch.zeros(4)}),
    (TypeError, "x: .*got torch.int64", {"x": IMAGE.long()}),
    (TypeError, "num_groups: expected an int, got float 2.0", {"num_groups": 2.0}),
    (ValueError, "num_groups: expected a divisor of 4 channels, got 3", {"num_groups": 3}),
    (ValueError, "num_groups: expected a divisor of 4 channels, got 0", {"num_groups": 0}),
    (ValueError, r"weight: .*\[4\], got \[5\]", {"weight": torch.zeros(5)}),
    (ValueError, r"bias: .*\[4\], got \[2, 4\]", {"bias": torch.zeros(2, 4)}),
    (ValueError, r"scale: .*\[2, 4\], got \[4\]", {"scale": torch.zeros(4)}),
    (ValueError, r"shift: .*\[2, 4\], got \[2, 4, 1, 1\]", {"shift": torch.zeros(2, 4, 1, 1)}),
    (ValueError, r"add: .*\[2, 4\], got \[1, 4\]", {"add": torch.zeros(1, 4)}),
    (TypeError, "add: .*got torch.complex64", {"add": torch.zeros(2, 4, dtype=torch.complex64)}),
    (ValueError, r"residual: .*got \[2, 4, 3\]", {"residual": torch.zeros(2, 4, 3)}),
    (ValueError, r"residual: .*got \[2, 1, 1, 1\]", {"residual": torch.zeros(2, 1, 1, 1)}),
    (ValueError, r"residual: .*got \[4, 3, 3\]", {"residual": torch.zeros(4, 3, 3)}),
    (ValueError, r"residual: .*got \[\]", {"residual": torch.tensor(1.0)}),
    (ValueError, "weight: .*on cpu, got one on meta", {"weight": torch.ones(4, device="meta")}),
    (
        ValueError,
        "residual: .*on cpu, got one on meta",
        {"residual": torch.zeros(2, 4, 3, 3, device="meta").transpose(2, 3)},
    ),
    (TypeError, "x: expected a tensor, got list", {"x": [[1.0]]}),
    (TypeError, "bias: expected a tensor, got float", {"bias": 1.0}),
    (TypeError, "num_groups: expected an int, got bool True", {"num_groups": True}),
    (TypeError, "num_groups: .*got Tensor", {"num_groups": torch.tensor(2)}),
    (TypeError, "eps: expected a number, got NoneType", {"eps": None}),
    (TypeError, "gain: expected a number, got Tensor", {"gain": torch.tensor(2.0)}),
    (ValueError, "eps: .*got -1.0", {"eps": -1.0}),
    (ValueError, "eps: .*got nan", {"eps": float("nan")}),
    (ValueError, "gain: .*got 0.0", {"gain": 0.0}),
    (ValueError, "gain: .*got inf", {"gain": float("inf")}),
    (ValueError, "activation: .*got 'relu'", {"activation": "relu"}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, change: dict[str, Any]
) -> None:
    at = {"x": IMAGE, "num_groups": 2} | change
    with pytest.raises(error, match=message):
        group_norm_silu(**at)
    with pytest.raises(error, match=message):  # the op alone is called otherwise
        group_norm_silu(**({"shift": torch.zeros(2, 4, requires_grad=True)} | at))


def test_module() -> None:
    """It takes the weights of nn.GroupNorm, and pickles of the parameters' names."""
    plain, ours = nn.GroupNorm(3, 6, eps=1e-3), GroupNormSiLU(3, 6, eps=1e-3)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    x, add = torch.randn(2, 6, 5), torch.randn(2, 6)
    torch.testing.assert_close(ours(x), nn.functional.silu(plain(x)))
    bare = GroupNormSiLU(3, 6, 1e-3, affine=False, activation=None)
    y, h = bare(x, add=add, gain=0.5, return_sum=True)
    torch.testing.assert_close(h, 0.5 * (x + add[..., None]))
    torch.testing.assert_close(y, nn.functional.group_norm(h, 3, eps=1e-3))
    assert "activation='silu'" in repr(ours)
    with pytest.raises(ValueError, match=r"activation: .*got 'gelu'"):
        GroupNormSiLU(3, 6, activation="gelu")


def test_networks_train_with_double_backward() -> None:
    """Implicit score matching differentiates the divergence."""
    net = UNet(channels=8, channel_mult=(1, 2)).double()
    x = torch.randn(2, 1, 4, 4, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x, torch.rand(2).double()).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
