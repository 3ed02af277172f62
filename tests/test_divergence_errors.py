"""Networks without a divergence, bad options and bad tensors: each is named."""

import pytest
import torch
from divergence_cases import KERNELS, Convolutions, Network, columns, curved, made, states
from torch import Tensor

from sbm_fast import noise
from sbm_fast.divergence import Divergence


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None: ...


def unimplemented(x: Tensor) -> Tensor:
    return NoBackward.apply(x)  # type: ignore[no-any-return]


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
