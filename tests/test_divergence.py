"""The divergence of a flow: against matrices whose trace is known, and on the digits' Jacobian.

Statistical tests are of fixed seeds; each compares with its expectation at Z standard errors.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from sbm_fast import noise
from sbm_fast.backend import choose_backend
from sbm_fast.data import digits
from sbm_fast.divergence import Divergence
from sbm_fast.nn import shipped

CPU = torch.device("cpu")
KERNELS = choose_backend("auto", CPU)
Z = 4.5
SHAPE = (3, 2, 2)
KINDS = [("hutchinson", 1), ("hutchinson", 3), ("hutchinson", 18), ("exact", 1), ("xtrace", 8)]
Network = Callable[[Tensor], Tensor]


def made(kind: str = "hutchinson", probes: int = 1, **options: object) -> Divergence:
    return Divergence(kind, probes, kernels=KERNELS, **options)  # type: ignore[arg-type]


def columns(
    divergence: Divergence,
    network: Network,
    x: Tensor,
    *,
    coef: Tensor | None = None,
    keys: Tensor | None = None,
    **options: object,
) -> Tensor:
    """The divergence's columns; by default those of tr J itself."""
    keys = noise.keys(5, len(x)) if keys is None else keys
    if coef is None:
        coef = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).repeat(len(x), 1)
    state = x if x.dtype in (torch.float32, torch.float64) else x.float()
    out = torch.full_like(state, math.nan)
    return divergence.slope(network, x, state, keys, coef, out, **options)  # type: ignore[arg-type]


def matrices(batch: int, *, rank: int | None = None, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Matrices [B, d, d] that are not symmetric."""
    generator = torch.Generator().manual_seed(1)
    d = math.prod(shape)
    parts = (
        torch.randn(batch, d, d if rank is None else rank, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    left, right = parts
    return left @ right.mT / d + (torch.eye(d) if rank is None else 0.0)


def linear(a: Tensor) -> Network:
    """x -> A x in x's dtype, sample by sample."""

    def network(x: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", a.to(x.dtype), x.reshape(len(x), -1)).reshape(x.shape)

    return network


def states(
    batch: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> Tensor:
    return noise.normal(9, (batch, *shape)).to(dtype)


def trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=1, dim2=2).sum(1)


def curved(x: Tensor) -> Tensor:
    """Mixes neighbours, by elementwise operations alone: equal samples give equal bits."""
    flat = x.flatten(1)
    return (flat.roll(1, 1) * flat.cos() + 0.3 * flat.roll(-1, 1) ** 2 - flat).reshape(x.shape)


class Convolutions(nn.Module):
    """What networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.silu(self.norm(self.enter(x))))


@pytest.mark.parametrize("product", ["vjp", "jvp"])
@pytest.mark.parametrize("shape", [(1,), (7,), SHAPE, (1, 5, 8)])
def test_exact_is_the_trace(product: str, shape: tuple[int, ...]) -> None:
    a = matrices(6, shape=shape)
    found = columns(made("exact", product=product), linear(a), states(6, shape))
    assert found.shape == (1, 6) and found.dtype == torch.float64
    torch.testing.assert_close(found[0], trace(a), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("kind", "probes"), KINDS)
def test_slope_and_divergence_have_the_flows_coefficients(kind: str, probes: int) -> None:
    a, x, keys = matrices(6), states(6), noise.keys(5, 6)
    coef = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = torch.full_like(x, math.nan)
    divergence = made(kind, probes)
    found = divergence.slope(linear(a), x, x, keys, coef, out)
    p, q, r = coef.T
    f = linear(a)(x)
    torch.testing.assert_close(out, p.view(-1, 1, 1, 1) * x + q.view(-1, 1, 1, 1) * f)
    torch.testing.assert_close(found, p * 12 + r * columns(made(kind, probes), linear(a), x))
    assert found.shape == (divergence.columns, 6)


def close_in_law(values: Tensor, mean: float, variance: float) -> None:
    """Mean and variance of the values, each within Z of its own standard errors."""
    n, off = values.numel(), values - mean
    assert abs(float(off.mean())) < Z * math.sqrt(variance / n)
    squares = off**2
    assert abs(float(squares.mean()) - variance) < Z * float(squares.std()) / math.sqrt(n)


@pytest.mark.parametrize("gaussian", [False, True])
def test_hutchinson_has_its_mean_and_variance(gaussian: bool) -> None:
    """Var vᵀAv = 2 (‖A‖²_F − Σ a_ii²) with signs, 2 ‖A‖²_F with normals, A symmetric."""
    a = matrices(1, shape=(8,))
    a = (a + a.mT) / 2
    many, probes = 20_000, 3
    found = columns(
        made("hutchinson", probes, gaussian=gaussian), linear(a.expand(many, 8, 8)),
        states(1, (8,)).expand(many, 8).contiguous(),
    )  # fmt: skip
    diagonal = a.diagonal(dim1=1, dim2=2)
    variance = 2 * float((a**2).sum() - (0 if gaussian else (diagonal**2).sum()))
    for column in found:
        close_in_law(column, float(trace(a)), variance)
    close_in_law(found.mean(0), float(trace(a)), variance / probes)


def test_signs_do_not_see_the_identity() -> None:
    x = states(50)
    coef = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64).repeat(50, 1)
    found = columns(made("hutchinson", 2), curved, x, coef=coef)
    assert torch.equal(found, torch.full_like(found, 3.0 * 12))


def test_what_cancels_in_the_slope_cancels_for_normal_probes() -> None:
    """p I + r J with J = −(p/r) I, as a network that predicts ε holds it: no noise is left."""
    x = states(50)
    coef = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64).repeat(50, 1)
    opposite = torch.eye(12, dtype=torch.float64).expand(50, 12, 12) * -3.0
    found = columns(made("hutchinson", 20, gaussian=True), linear(opposite), x, coef=coef)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_probes_are_those_of_the_contract() -> None:
    """Draw first_draw + k, stream PROBE, of each sample's key; others are others."""
    a, x, keys = matrices(4), states(4), noise.keys(8, 4)
    found = columns(made("hutchinson", 4), linear(a), x, keys=keys)
    for k in range(4):
        v = noise.rademacher(8, (4, 12), draw=k, stream=noise.PROBE, dtype=torch.float64)
        torch.testing.assert_close(found[k], torch.einsum("bi,bij,bj->b", v, a, v))
    later = columns(made("hutchinson", 2, first_draw=2), linear(a), x, keys=keys)
    assert torch.equal(later, found[2:])


@pytest.mark.parametrize("product", ["vjp", "jvp"])
@pytest.mark.parametrize("probes", [4, 8, 24])
@pytest.mark.parametrize("less", [1, 2, 3])
def test_xtrace_is_exact_below_its_rank(product: str, probes: int, less: int) -> None:
    rank = probes // 2 - less
    if rank < 0:
        pytest.skip("no such rank")
    a = matrices(30, rank=rank)
    found = columns(made("xtrace", probes, product=product), linear(a), states(30))
    torch.testing.assert_close(found, trace(a).expand_as(found), rtol=1e-9, atol=1e-9)


def test_xtrace_is_exact_where_it_spans_everything() -> None:
    a = matrices(30)
    found = columns(made("xtrace", 24), linear(a), states(30))
    torch.testing.assert_close(found, trace(a).expand_as(found), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [None, -1.5, 40.0])
def test_xtrace_is_unbiased_and_knows_its_error(shift: float | None) -> None:
    """Also for a matrix that is not symmetric, with a shift or without; every column by itself.

    The columns share their range, so their spread tells somewhat less than the error: by a factor
    of about 1 − k/d in d dimensions, k = 4 of 12 here."""
    a, many = matrices(1), 20_000
    shifts = None if shift is None else torch.full((many,), shift, dtype=torch.float64)
    found = columns(
        made("xtrace", 8), linear(a.expand(many, 12, 12)),
        states(1).expand(many, *SHAPE).contiguous(), shift=shifts,
    )  # fmt: skip
    for estimate in (*found, found.mean(0)):
        error = float(estimate.std()) / math.sqrt(many)
        assert abs(float(estimate.mean() - trace(a))) < Z * error
    told = float((found.var(0) / 4).mean().sqrt())
    assert 0.6 < told / float(found.mean(0).std()) < 1.1


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_a_multiple_of_the_identity_costs_xtrace_nothing(shift: float) -> None:
    a = 3.0 * torch.eye(12, dtype=torch.float64).expand(5, 12, 12)
    shifts = torch.full((5,), shift, dtype=torch.float64)
    found = columns(made("xtrace", 6), linear(a), states(5), shift=shifts)
    torch.testing.assert_close(found, torch.full_like(found, 36.0))


@pytest.mark.parametrize(("kind", "probes"), [*KINDS, ("hutchinson", 33)])
@pytest.mark.parametrize("network", [curved, Convolutions().double()])
def test_both_products_and_both_ways_to_take_them_agree(
    kind: str, probes: int, network: Network
) -> None:
    """XTrace looks at Jᵀ or J: other estimates of the same trace, so there the two ways alone."""
    x = states(5)
    found = {}
    for product in ("vjp", "jvp"):
        for batched in (None, False):
            divergence = made(kind, probes, product=product)
            divergence.batched = batched
            found[product, batched] = columns(divergence, network, x)
        torch.testing.assert_close(found[product, None], found[product, False])
    if kind != "xtrace":
        torch.testing.assert_close(found["vjp", None], found["jvp", None])


@pytest.mark.parametrize("product", ["vjp", "jvp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_of_other_dtypes(product: str, dtype: torch.dtype) -> None:
    """The probes are exact in each, and the sums are those of the state's dtype or of a wider."""
    a, x = matrices(4), states(4, dtype=dtype)
    rounding = 40 * torch.finfo(dtype).eps
    for kind, probes in KINDS:
        found = columns(made(kind, probes, product=product), linear(a), x)
        close = columns(
            made(kind, probes, product=product), linear(a.to(dtype).double()), x.double()
        )
        if kind == "xtrace":  # its basis moves with the rounding, its estimate far less
            found, close = found.mean(0), close.mean(0)
        torch.testing.assert_close(found, close, rtol=rounding, atol=rounding)


def test_sums_of_float32_states_may_run_in_float64() -> None:
    def network(x: Tensor) -> Tensor:
        return 1.1 * x

    x = states(1, (5000,), torch.float32)
    wide, narrow = (columns(made(), network, x, dtype=t) for t in (torch.float64, None))
    exact = 5000 * float(torch.tensor(1.1))
    assert abs(float(wide) - exact) < 1e-9 < abs(float(narrow) - exact) < 1e-2


@pytest.mark.parametrize(("kind", "probes"), KINDS)
@pytest.mark.parametrize("product", ["vjp", "jvp"])
def test_a_sample_is_the_same_in_every_batch(kind: str, probes: int, product: str) -> None:
    """To the bit: splits, order and memory format."""
    x, keys = states(6, (3, 4, 4), torch.float32), noise.keys(5, 6)
    coef = torch.rand(6, 3, dtype=torch.float64)

    def at(samples: Tensor, memory_format: torch.memory_format) -> Tensor:
        state = x[samples].contiguous(memory_format=memory_format)
        divergence = made(kind, probes, product=product)
        return columns(divergence, curved, state, coef=coef[samples], keys=keys[samples])

    whole = at(torch.arange(6), torch.contiguous_format)
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    assert torch.equal(at(order, torch.contiguous_format), whole[:, order])
    assert torch.equal(at(torch.arange(6), torch.channels_last), whole)
    for b in range(6):
        assert torch.equal(at(torch.tensor([b]), torch.contiguous_format), whole[:, [b]])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_backends_agree(backend: str) -> None:
    try:
        kernels = choose_backend(backend, CPU)
    except ValueError as error:
        pytest.skip(str(error))
    for kind, probes in KINDS:
        found = columns(Divergence(kind, probes, kernels=kernels), curved, states(3))
        torch.testing.assert_close(found, columns(made(kind, probes), curved, states(3)))


class Counted:
    def __init__(self, network: Network) -> None:
        self.network, self.calls = network, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)


@pytest.mark.parametrize("product", ["vjp", "jvp"])
@pytest.mark.parametrize(("kind", "probes"), [("hutchinson", 1), ("hutchinson", 16), ("exact", 1)])
def test_one_forward_an_evaluation(product: str, kind: str, probes: int) -> None:
    network = Counted(curved)
    columns(made(kind, probes, product=product), network, states(3))
    assert network.calls == 1


MODES: list[Callable[[], AbstractContextManager[object]]] = [
    nullcontext,
    torch.no_grad,
    torch.inference_mode,
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", ["vjp", "jvp", "auto"])
@pytest.mark.parametrize(("kind", "probes"), KINDS)
def test_runs_under_the_callers_mode(
    mode: Callable[[], AbstractContextManager[object]], product: str, kind: str, probes: int
) -> None:
    network, expected = Convolutions(), None
    expected = columns(made(kind, probes, product=product), network, states(3, dtype=torch.float32))
    with mode():
        x = states(3, dtype=torch.float32)  # an inference tensor where the mode makes those
        before = x.clone()
        found = columns(made(kind, probes, product=product), network, x)
    assert torch.equal(found, expected) and torch.equal(x, before)
    assert not found.requires_grad and not x.requires_grad
    assert all(p.grad is None for p in network.parameters())


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return curved(x)


def energy(x: Tensor) -> Tensor:
    """A score that is a gradient itself."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad((curved(x) ** 2).sum(), x, create_graph=True)[0]


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None: ...


def unimplemented(x: Tensor) -> Tensor:
    return NoBackward.apply(x)  # type: ignore[no-any-return]


def test_auto_takes_what_the_network_has() -> None:
    divergence = made()
    assert divergence.products == "auto"
    columns(divergence, curved, states(2))
    assert divergence.products == "vjp"

    divergence = made("hutchinson", 3)
    found = columns(divergence, without_grad, states(2))
    assert divergence.products == "jvp" and divergence.batched is True
    torch.testing.assert_close(found, columns(made("hutchinson", 3), curved, states(2)))
    network = Counted(without_grad)
    columns(divergence, network, states(2))
    assert network.calls == 1  # it does not try vjp again


def test_networks_without_vmap_run_in_a_loop() -> None:
    divergence = made("hutchinson", 3, product="jvp")
    found = columns(divergence, energy, states(2))
    assert divergence.batched is False and not found.requires_grad
    torch.testing.assert_close(found, columns(made("hutchinson", 3), energy, states(2)))


def test_native_group_norm_has_no_jvp_on_channels_last() -> None:
    network = Convolutions().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = states(2, (3, 4, 4), torch.float32)
    columns(made("hutchinson", 2), network, x)
    with pytest.raises(ValueError, match=r"model: .*GroupNorm.*channels_last.*contiguous_format"):
        columns(made("hutchinson", 2, product="jvp"), network, x)


DETACHED: list[Network] = [
    lambda x: curved(x.detach()),
    lambda x: curved(x).detach(),
    lambda x: Convolutions().double()(x.detach()),
    torch.zeros_like,
    lambda x: torch.from_numpy(x.detach().numpy() * 2),
    torch.inference_mode()(curved),
]


@pytest.mark.parametrize("network", DETACHED)
@pytest.mark.parametrize(("kind", "probes"), [("hutchinson", 1), ("exact", 1), ("xtrace", 4)])
def test_networks_that_cannot_be_differentiated(network: Network, kind: str, probes: int) -> None:
    for product in ("vjp", "jvp"):
        with pytest.raises(ValueError, match=r"^model: its output does not depend"):
            columns(made(kind, probes, product=product), network, states(2))
    with pytest.raises(ValueError, match=r"^model: cannot be .*; vjp: its out.*; jvp: its out"):
        columns(made(kind, probes), network, states(2))


def test_a_network_that_autograd_stops() -> None:
    def network(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    with pytest.raises(ValueError, match=r"^model: its forward under autograd failed \(.*numpy"):
        columns(made(product="vjp"), network, states(2))
    with pytest.raises(
        ValueError, match=r"^model: cannot be .*; vjp: its forward .*; jvp: its out"
    ):
        columns(made(), network, states(2))


def test_derivatives_that_are_not_implemented() -> None:
    with pytest.raises(ValueError, match=r"^model: its backward failed \(.+\)"):
        columns(made(product="vjp"), unimplemented, states(2))
    with pytest.raises(ValueError, match=r"^model: its forward-mode derivative failed \(.+\)"):
        columns(made(product="jvp"), unimplemented, states(2))
    with pytest.raises(ValueError, match=r"^model: .*; vjp: its backward .*; jvp: its forward"):
        columns(made(), unimplemented, states(2))


@pytest.mark.parametrize("product", ["vjp", "jvp", "auto"])
def test_a_network_that_changes_its_input(product: str) -> None:
    with pytest.raises(ValueError, match="model: the network changed its input in place"):
        columns(made("hutchinson", 2, product=product), lambda x: curved(x.mul_(2)), states(2))


@pytest.mark.parametrize("product", ["vjp", "jvp", "auto"])
def test_outputs_that_are_none(product: str) -> None:
    bad: list[tuple[Network, str]] = [
        (lambda x: x[:1], r"model: expected a floating tensor of shape \(2, 3, 2, 2\), got"),
        (lambda x: x.flatten(1), r"model: expected a floating tensor of shape"),
        (lambda x: (x, x), "model: expected a floating tensor .* got tuple"),  # type: ignore[return-value, dict-item]
        (lambda x: x.to(torch.complex64), "model: expected a floating tensor"),
    ]
    for network, words in bad:
        with pytest.raises(ValueError, match=words):
            columns(made("hutchinson", 2, product=product), network, states(2))


def test_a_networks_own_error_is_its_own() -> None:
    def network(x: Tensor) -> Tensor:
        raise KeyError("mine")

    for product in ("vjp", "jvp", "auto"):
        with pytest.raises(KeyError, match="mine"):
            columns(made("hutchinson", 2, product=product), network, states(2))


def test_a_sample_that_is_not_finite_is_alone() -> None:
    a = matrices(4)
    a[1, 0, 0] = math.nan
    for kind, probes in KINDS:
        found = columns(made(kind, probes), linear(a), states(4)).isfinite().all(0)
        assert found.tolist() == [True, False, True, True]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    for kind, probes in KINDS:
        found = columns(made(kind, probes), curved, torch.zeros(shape))
        assert torch.equal(found, torch.zeros(made(kind, probes).columns, shape[0]).double())


BAD: list[tuple[str, type[Exception], dict[str, object]]] = [
    ("estimator", ValueError, {"kind": "hutch++"}),
    ("estimator", ValueError, {"kind": None}),
    ("product", ValueError, {"product": "both"}),
    ("product", ValueError, {"product": True}),
    ("probes", TypeError, {"probes": 1.0}),
    ("probes", TypeError, {"probes": True}),
    ("probes", TypeError, {"probes": "2"}),
    ("probes", ValueError, {"probes": 0}),
    ("probes", ValueError, {"probes": -1}),
    ("probes", ValueError, {"kind": "xtrace", "probes": 7}),
    ("probes", ValueError, {"kind": "xtrace", "probes": 2}),
    ("gaussian", TypeError, {"gaussian": 1}),
    ("first_draw", TypeError, {"first_draw": 0.0}),
    ("first_draw", ValueError, {"first_draw": -1}),
    ("first_draw", ValueError, {"first_draw": 2**32 - 1, "probes": 2}),
]


@pytest.mark.parametrize(("name", "error", "options"), BAD)
def test_bad_options(name: str, error: type[Exception], options: dict[str, object]) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        Divergence(**{"kernels": KERNELS, **options})  # type: ignore[arg-type]


def test_more_vectors_than_dimensions() -> None:
    with pytest.raises(ValueError, match=r"^probes: xtrace takes at most 2 d = 24 .* got 26"):
        columns(made("xtrace", 26), curved, states(2))


def test_bad_tensors() -> None:
    x = states(2)
    good = {
        "inputs": x, "x": x, "keys": noise.keys(0, 2), "coef": torch.ones(2, 3).double(),
        "out": torch.empty_like(x), "shift": torch.ones(2).double(), "dtype": torch.float64,
    }  # fmt: skip
    made("xtrace", 4).slope(curved, **good)
    for name, value in good.items():
        wrong = {"dtype": torch.float16} if name == "dtype" else {name: value.int()}  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match=f"^{name}: "):
            made().slope(curved, **(good | wrong))
        if name not in ("dtype", "x"):
            with pytest.raises(ValueError, match=f"^{name}: "):
                made().slope(curved, **(good | {name: value[:1]}))  # type: ignore[index]


@pytest.fixture(scope="module")
def digit_states() -> Callable[[float, int], tuple[Network, Tensor, Tensor]]:
    """At σ/m = r: the network, inputs of 8 held-out digits, each `copies` times, and the shift to
    the denoiser's Jacobian."""
    net, images = shipped.digits().eval(), digits().held_out[::40][:8]

    def at(r: float, copies: int) -> tuple[Network, Tensor, Tensor]:
        h = math.hypot(r, net.sigma_data)
        u = (images + r * noise.normal(1, images.shape)) / h
        label = torch.full((len(u) * copies,), math.log(r) / 4)
        shift = torch.full((len(u) * copies,), net.sigma_data / r, dtype=torch.float64)
        return lambda x: net(x, label[: len(x)]), u.repeat_interleave(copies, 0), shift

    return at


def test_estimates_agree_with_the_exact_trace_of_digits(
    digit_states: Callable[[float, int], tuple[Network, Tensor, Tensor]],
) -> None:
    network, x, _ = digit_states(0.3, 1)
    exact = columns(made("exact"), network, x)[0]
    for kind, probes in (("hutchinson", 24), ("xtrace", 24)):
        found = columns(made(kind, probes), network, x)
        error = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - exact).abs() < Z * error).all()), kind


@pytest.mark.parametrize(("r", "at_most"), [(1.0, 0.75), (3.0, 0.6)])
def test_xtrace_gains_on_digits_at_high_noise(
    digit_states: Callable[[float, int], tuple[Network, Tensor, Tensor]],
    r: float,
    at_most: float,
) -> None:
    """Its error against Rademacher's, both with 32 products (docs/likelihood.md: not at low)."""
    copies = 12
    network, x, shift = digit_states(r, copies)
    single, y, _ = digit_states(r, 1)
    exact = columns(made("exact"), single, y)[0].repeat_interleave(copies)

    def deviation(kind: str, a: Tensor | None) -> float:
        found = columns(made(kind, 32), network, x, shift=a)
        return float(((found.mean(0) - exact) ** 2).mean().sqrt())

    assert deviation("xtrace", shift) < at_most * deviation("hutchinson", None)
