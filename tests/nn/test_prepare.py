"""Time tables: `Network.prepare` against the forward with labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_cases import CASES, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sbm_fast.nn import UNet
from sbm_fast.nn.network import Prepared

PLAN = {"index": (0.0, 3.0, 500.0, 998.0, 12.5), "sigma": (0.01, 0.3, 49.0, 7.0, 1.0)}
UNIT = 2.0**-24


def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet(3, channels=8, film=True, attention_levels=(1,))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def plan_of(case: Case) -> Tensor:
    return torch.tensor(PLAN["sigma" if case.config.get("scale_by_sigma") else "index"])


@pytest.mark.parametrize("name", [*CASES, "unet"])
def test_it_is_the_network_at_those_labels(name: str) -> None:
    if name == "unet":
        net: Any = unet()
        x, cond, labels = torch.randn(2, 3, 8, 8), {}, torch.tensor(PLAN["index"])
    else:
        case = CASES[name]
        net, x, cond, labels = case.network(), case.image(), case.cond, plan_of(case)
    prepared = net.prepare(labels)
    with torch.no_grad():
        for row, index in (([0, 4], torch.int32), ([3, 3], torch.int64)):
            rows = torch.tensor(row, dtype=index)
            for given in (cond, {}) if cond else ({},):
                ours, want = prepared(x, rows, **given), net(x, labels[rows], **given)
                assert (ours - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_the_bound_of_the_table(name: str) -> None:
    """Two sums of the same W products and the bias, in whatever order: 2 (W + 1) u Σ|w e|."""
    case = CASES[name]
    net, labels = case.network(), plan_of(case)
    prepared = net.prepare(labels)
    with torch.no_grad():
        emb = net.embedding(net.time_part(labels))
        vs = prepared._held["v"][: len(labels)].split(prepared._widths, dim=1)
        for block, v in zip(net.blocks, vs, strict=True):
            size = emb.abs() @ block.time.weight.abs().T + block.time.bias.abs()
            bound = 2 * (emb.shape[1] + 1) * UNIT * size
            assert ((v - block.time(emb)).abs() <= bound).all()


class Recorder(TorchDispatchMode):
    """Names of the aten ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))


def products(prepared: Prepared, case: Case, **cond: Tensor) -> int:
    with torch.no_grad(), Recorder() as recorder:
        prepared(case.image(), torch.tensor([0, 1]), **cond)
    assert "aten._local_scalar_dense" not in recorder.names, "a host read"
    return sum(name in ("aten.addmm", "aten.mm", "aten.linear") for name in recorder.names)


def test_no_product_is_left_in_a_call() -> None:
    for name in ("ddpmpp", "ncsnpp", "song_ncsnpp", "adm", "song_ddpmpp"):
        case = CASES[name]
        assert products(case.network().prepare(plan_of(case)), case) == 0


def test_labels_that_join_before_a_nonlinearity_end_the_table() -> None:
    """One product for all blocks; before it ADM has its label's, SongUNet those of the MLP too."""
    adm, song = CASES["adm"], CASES["song_ddpmpp"]
    assert products(adm.network().prepare(plan_of(adm)), adm, **adm.cond) == 2
    cond = {"class_labels": song.cond["class_labels"]}
    assert products(song.network().prepare(plan_of(song)), song, **cond) == 4


def test_rows_beyond_the_plan_are_refused() -> None:
    case = CASES["song_ddpmpp"]
    net, x = case.network(), case.image()
    prepared = net.prepare(torch.tensor(case.labels))
    row = torch.tensor([0, len(case.labels)])
    for cond in ({}, {"class_labels": torch.tensor([0, 1])}):
        with pytest.raises(IndexError):
            prepared(x, row, **cond)


def test_none_is_no_conditioning() -> None:
    case = CASES["adm"]
    prepared = case.network().prepare(plan_of(case))
    x, row = case.image(), torch.tensor([0, 1])
    assert torch.equal(prepared(x, row, class_labels=None), prepared(x, row))
    for nothing in ({"size": None}, {"class_labels": None, "size": None}):
        with pytest.raises(TypeError, match="size"):
            prepared(x, row, **nothing)
    assert products(prepared, case, class_labels=None) == 0  # type: ignore[arg-type]


def test_a_plan_without_labels_and_an_empty_batch() -> None:
    case = CASES["ncsnpp"]
    net = case.network()
    empty = net.prepare(torch.zeros(0))
    assert empty(case.image()[:0], torch.zeros(0).long()).shape == (0, 3, 16, 16)
    case = CASES["song_ddpmpp"]
    empty, none = case.network().prepare(torch.zeros(0)), torch.zeros(0).long()
    assert empty(case.image()[:0], none, class_labels=none).shape[0] == 0


def test_gradients_with_respect_to_the_image() -> None:
    case = CASES["ncsnpp"]
    net, labels = case.network().double(), plan_of(case)
    x, row = case.image().double().requires_grad_(), torch.tensor([1, 2])
    (ours,) = torch.autograd.grad(net.prepare(labels)(x, row).square().sum(), x)
    (want,) = torch.autograd.grad(net(x, labels[row]).square().sum(), x)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("row", "error", "named"),
    [
        (torch.tensor([0]), ValueError, r"row must be \[2\]"),
        (torch.tensor([[0, 1]]), ValueError, "row"),
        (torch.tensor([0.0, 1.0]), TypeError, "row must be int32 or int64"),
    ],
)
def test_wrong_rows_are_named(row: Tensor, error: type[Exception], named: str) -> None:
    case = CASES["ddpmpp"]
    prepared = case.network().prepare(plan_of(case))
    with pytest.raises(error, match=named):
        prepared(case.image(), row)
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\]"):
        prepared(case.image()[:, :1], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels must be \[R\]"):
        case.network().prepare(torch.zeros(2, 2))
