"""group_norm_silu and its product as torch sees them: checks, and errors by name."""

from typing import Any

import norm_cases
import pytest
import torch
from op_backends import call, either

NORM = ("out", "total", "stats", "x", "weight", "bias", "scale", "shift", "add", "residual",
        "groups", "eps", "gain", "silu")  # fmt: skip
PRODUCT = ("out", "sums", "given", "h", "stats", "weight", "bias", "scale", "shift", "weight_dot",
           "bias_dot", "groups", "gain", "silu", "forward")  # fmt: skip


def norm_arguments(case: norm_cases.Norm) -> dict[str, Any]:
    written = {"out": torch.zeros_like(case.x), "total": torch.zeros_like(case.x)}
    written["stats"] = torch.zeros(len(case.x), case.groups, 2)
    return written | {name: getattr(case, name) for name in NORM[3:]}


def product_arguments(p: norm_cases.Product) -> dict[str, Any]:
    given = {name: getattr(p, name) for name in ("given", "weight_dot", "bias_dot", "forward")}
    rest = {name: getattr(p.case, name) for name in (*NORM[4:8], "groups", "gain", "silu")}
    sums = None if p.forward else torch.zeros(*p.case.x.shape[:2], 2)
    tensors = {"out": torch.zeros_like(p.case.x), "sums": sums, "h": p.case.x}
    tensors["stats"] = torch.ones(len(p.case.x), p.case.groups, 2)
    given = tensors | given | rest
    return {name: given[name] for name in PRODUCT}


@pytest.mark.parametrize("rows", ["", "weight bias scale shift add"])
def test_opcheck_group_norm_silu(rows: str) -> None:
    case = norm_cases.norm((3, 4, 2, 5), 2, rows=rows, residual=bool(rows), last=True)
    given = norm_arguments(case)
    torch.library.opcheck(torch.ops.sbm_fast.group_norm_silu_, tuple(given.values()))
    given |= {"total": None}
    torch.library.opcheck(torch.ops.sbm_fast.group_norm_silu_, tuple(given.values()))


@pytest.mark.parametrize("forward", [False, True])
def test_opcheck_of_its_product(forward: bool) -> None:
    p = norm_cases.product((3, 4, 2, 5), 2, forward=forward)
    op = torch.ops.sbm_fast.group_norm_silu_product_
    torch.library.opcheck(op, tuple(product_arguments(p).values()))


IMAGE, ROW = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4)
LAST = IMAGE.to(memory_format=torch.channels_last)
BAD_NORM: list[tuple[str, str, dict[str, Any]]] = [
    ("x", "got 1 dimensions", {"x": torch.zeros(4)}),
    ("x", "expected float32, float64", {"x": IMAGE.int()}),
    ("x", "samples without gaps", {"x": torch.zeros(2, 4, 3, 6)[..., ::2]}),
    ("groups", "divisor of the 4 channels, got 3", {"groups": 3}),
    ("groups", "divisor of the 4 channels, got 0", {"groups": 0}),
    ("out", "shape of x", {"out": torch.zeros(2, 4, 9)}),
    ("out", "channels first", {"out": LAST}),
    ("residual", "channels first", {"residual": LAST}),
    ("residual", "shape of x", {"residual": IMAGE[:1]}),
    ("total", "shape of x", {"total": IMAGE[:1]}),
    ("stats", r"float32 CPU tensor \[2, 2, 2\]", {"stats": torch.zeros(2, 2, 2).double()}),
    ("stats", r"float64 CPU tensor \[2, 2, 2\]", {"x": IMAGE.double()}),
    ("stats", r"CPU tensor \[2, 2, 2\]", {"stats": torch.zeros(2, 4, 2)}),
    ("weight", r"CPU tensor \[4\]", {"weight": torch.zeros(5)}),
    ("bias", r"CPU tensor \[4\]", {"bias": ROW}),
    ("scale", r"CPU tensor \[samples, 4\]", {"scale": torch.zeros(4)}),
    ("shift", r"CPU tensor \[samples, 4\]", {"shift": torch.zeros(1, 4)}),
    ("add", "beside one another", {"add": torch.zeros(4, 2).T}),
    ("add", "expected float32, float64", {"add": ROW.int()}),
]


@either
@pytest.mark.parametrize(("name", "message", "change"), BAD_NORM)
def test_group_norm_silu_names_what_is_wrong(
    name: str, message: str, change: dict[str, Any], backend: str
) -> None:
    given = norm_arguments(norm_cases.norm((2, 4, 3, 3), 2, rows=" ".join(norm_cases.ROWS)))
    message = message if backend == "cpu" else message.replace("CPU ", "")
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message}"):
        call(backend, "group_norm_silu_", *(given | change).values())


@either
def test_memory_that_group_norm_silu_would_overwrite_is_refused(backend: str) -> None:
    given = norm_arguments(norm_cases.norm((2, 4, 3, 3), 2, residual=True))
    memory = torch.zeros(3, 4, 3, 3)
    for name, change in (
        ("x", {"x": memory[:2], "out": memory[1:]}),
        ("residual", {"residual": memory[:2], "out": memory[1:]}),
        ("total", {"total": memory[:2], "x": memory[:2]}),
        ("total", {"total": memory[:2], "residual": memory[1:]}),
        ("total", {"total": memory[:2], "out": memory[:2]}),
        ("out", {"out": memory[:1].expand(2, -1, -1, -1)}),
        ("total", {"total": memory[:1].expand(2, -1, -1, -1)}),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: "):
            call(backend, "group_norm_silu_", *(given | change).values())


@either
@pytest.mark.parametrize(
    ("name", "message", "change"),
    [
        ("given", "shape of h", {"given": IMAGE[:1]}),
        ("given", "channels first", {"given": LAST}),
        ("out", "samples share memory", {"out": IMAGE[:1].expand_as(IMAGE)}),
        ("sums", r"CPU tensor \[2, 4, 2\]", {"sums": torch.zeros(2, 2, 2)}),
        ("sums", "backward product only", {"forward": True}),
        ("weight_dot", "forward product only", {"weight_dot": ROW}),
        ("bias_dot", "forward product only", {"bias_dot": ROW}),
        ("stats", r"CPU tensor \[2, 2, 2\]", {"stats": torch.zeros(2, 4)}),
    ],
)
def test_its_product_names_what_is_wrong(
    name: str, message: str, change: dict[str, Any], backend: str
) -> None:
    given = product_arguments(norm_cases.product((2, 4, 3, 3), 2)) | change
    message = message if backend == "cpu" else message.replace("CPU ", "")
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message}"):
        call(backend, "group_norm_silu_product_", *given.values())


def test_a_meta_tensor_beside_others_is_refused() -> None:
    """One is enough for torch to skip an op as it does for shapes alone: out kept what it had."""
    given = norm_arguments(norm_cases.norm((3, 4, 2, 5), 2, rows="weight"))
    given["weight"] = given["weight"].to("meta")
    with pytest.raises(RuntimeError, match=r"weight: .*got a meta tensor"):
        torch.ops.sbm_fast.group_norm_silu_(*given.values())
    every = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    torch.ops.sbm_fast.group_norm_silu_(*every.values())
