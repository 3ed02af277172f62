"""The divergence's products with a network: vjp and jvp, dtypes, batches, backends, modes."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from divergence_cases import (
    CPU,
    KINDS,
    Convolutions,
    Network,
    columns,
    curved,
    linear,
    made,
    matrices,
    states,
)
from torch import Tensor

from sbm_fast import noise
from sbm_fast.backend import choose_backend
from sbm_fast.divergence import Divergence


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
