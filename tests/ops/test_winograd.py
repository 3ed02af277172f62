"""Winograd's transforms: with the products between them they are the convolution."""

from typing import Any

import noise_cases
import pytest
import torch
from op_backends import BACKENDS, TWINLESS, call
from torch import Tensor

from sbm_fast import _load
from sbm_fast.nn.winograd import convolved
from sbm_fast.ops.winograd import matrices, tiling, weights

NAN = float("nan")
BY = [name for name in TWINLESS if name != "triton"]  # it has no kernel for these
each = pytest.mark.parametrize("backend", BY)
each_side = pytest.mark.parametrize("side", [2, 4])
SHAPES = [
    (2, 20, 37, 7, 9),
    (1, 64, 48, 8, 8),
    (3, 3, 5, 1, 1),
    (2, 17, 16, 4, 13),
    (1, 1, 1, 5, 2),
]


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """x, weight, bias, plus of a convolution: batch, channels in and out, height, width."""
    batch, inputs, outputs, height, width = shape
    source = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=source).to(dtype)

    return {
        "x": last(torch.nn.functional.silu(normal(batch, inputs, height, width))),
        "weight": normal(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5,
        "bias": normal(outputs),
        "plus": last(normal(batch, outputs, height, width)),
    }


def exact(g: dict[str, Tensor], bias: bool = True, plus: bool = True, gain: float = 1.0) -> Tensor:
    d = {name: value.double() for name, value in g.items()}
    y = torch.nn.functional.conv2d(d["x"], d["weight"], d["bias"] if bias else None, padding=1)
    return gain * (y + d["plus"] if plus else y)


def through(
    backend: str, g: dict[str, Tensor], side: int, chunk: int, *rest: Any, gain: float = 1.0
) -> Tensor:
    """The convolution by a backend's ops, `chunk` tiles at a time; rest: bias, plus."""
    bias, plus = rest if rest else (None, None)
    batch, _, height, width = g["x"].shape
    of_weight = weights(g["weight"], side)
    down, across = tiling(height, width, side)
    total = batch * down * across
    y = last(torch.full((batch, len(g["weight"]), height, width), NAN))
    for first in range(0, total, chunk):
        tiles = torch.full((len(of_weight), min(chunk, total - first), of_weight.shape[1]), NAN)
        call(backend, "winograd_input_", tiles, g["x"], first)
        products = torch.bmm(tiles, of_weight)
        call(backend, "winograd_output_", y, products, bias, plus, first, gain)
    return y


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@each_side
def test_the_matrices_convolve(side: int) -> None:
    """Aᵀ[(G w) ⊙ (Bᵀ d)] is the correlation of d with w, for all d and w; A and B are exact."""
    a, g, b = matrices(side)
    form = torch.einsum("mk,kw,kd->mwd", a, g, b)
    want = torch.zeros(side, 3, side + 2, dtype=torch.float64)
    for output in range(side):
        for tap in range(3):
            want[output, tap, output + tap] = 1.0
    torch.testing.assert_close(form, want, rtol=0, atol=1e-14)
    for constants in (a, b):
        assert torch.equal(constants.float().double(), constants)


@each
@each_side
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape: tuple[int, ...], side: int, backend: str) -> None:
    g = given(shape)
    for bias, plus, gain in ((False, False, 1.0), (True, True, 0.7), (False, True, -2.0)):
        arguments = g["bias"] if bias else None, g["plus"] if plus else None
        got = through(backend, g, side, 5, *arguments, gain=gain)
        assert relative(got, exact(g, bias, plus, gain)) < (5e-7, 2e-6)[side == 4]


@each_side
@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
def test_the_kernels_are_their_references(side: int) -> None:
    """Both on whole numbers, which leave little to round."""
    for shape in SHAPES:
        g = given(shape)
        x = last((8 * g["x"]).round())
        down, across = tiling(*shape[3:], side)
        tiles = torch.empty((side + 2) ** 2, shape[0] * down * across, shape[1])
        twin = torch.empty_like(tiles)
        call("cpu", "winograd_input_", tiles, x, 0)
        call("eager", "winograd_input_", twin, x.double(), 0)
        torch.testing.assert_close(tiles, twin, rtol=1e-6, atol=1e-5)
        products = (8 * torch.randn(len(tiles), tiles.shape[1], shape[2])).round()
        y, z = last(torch.empty_like(g["plus"])), last(torch.empty_like(g["plus"]))
        call("cpu", "winograd_output_", y, products, g["bias"], g["plus"], 0, 0.5)
        call("eager", "winograd_output_", z, products, g["bias"], g["plus"], 0, 0.5)
        torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-4)


@each
@each_side
def test_a_call_writes_its_tiles_only(side: int, backend: str) -> None:
    g = given((2, 18, 18, 6, 7))
    down, across = tiling(6, 7, side)
    y = last(torch.full((2, 18, 6, 7), NAN))
    products = torch.ones((side + 2) ** 2, 1, 18)
    call(backend, "winograd_output_", y, products, None, None, down * across, 1.0)
    assert not y[0].isfinite().any()
    assert y[1, :, :side, :side].isfinite().all() and y[1].isfinite().sum() == 18 * side * side
    band = torch.full(((side + 2) ** 2 * 18 + 8,), NAN)
    tiles = band[4:-4].view(-1, 1, 18)
    call(backend, "winograd_input_", tiles, g["x"], 1)
    assert tiles.isfinite().all() and band[:4].isnan().all() and band[-4:].isnan().all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
@each_side
def test_chunks_and_threads_do_not_matter(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = given((3, 40, 33, 11, 9))
    own = weights(g["weight"], side)
    whole = convolved(g["x"], own, g["bias"], g["plus"], 0.7)
    assert relative(whole, exact(g, gain=0.7)) < (5e-7, 2e-6)[side == 4]
    assert whole.is_contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    for chunk in (1, 7 * (side + 2) ** 2 * 73, 10**9):
        monkeypatch.setattr("sbm_fast.nn.winograd.CHUNK", chunk)
        torch.set_num_threads(2)
        got = convolved(g["x"], own, g["bias"], g["plus"].contiguous(), 0.7)
        torch.set_num_threads(before)
        torch.testing.assert_close(got, whole, rtol=1e-6, atol=4e-6)


@each
@each_side
def test_empty(side: int, backend: str) -> None:
    g = given((0, 4, 5, 6, 6))
    assert through(backend, g, side, 3).shape == (0, 5, 6, 6)
    tiles = torch.empty((side + 2) ** 2, 0, 4)
    call(backend, "winograd_input_", tiles, last(torch.zeros(1, 4, 6, 6)), 0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
@pytest.mark.parametrize(("side", "most"), [(2, 1.2), (4, 2.5)])
@pytest.mark.parametrize("shape", [(2, 128, 128, 16, 16), (2, 256, 64, 8, 8)])
def test_errors_beside_those_of_the_direct_sum(
    shape: tuple[int, ...], side: int, most: float
) -> None:
    """F(2×2) rounds less than oneDNN's direct sum on a network's inputs, F(4×4) 1.7 times more."""
    g = given(shape)
    want = exact(g, plus=False)
    direct = torch.nn.functional.conv2d(g["x"], last(g["weight"]), g["bias"], padding=1)
    got = convolved(g["x"], weights(g["weight"], side), g["bias"])
    assert relative(got, want) < most * max(relative(direct, want), 4e-7)


@each
def test_nan_stays_in_its_tiles(backend: str) -> None:
    g = given((2, 16, 16, 8, 8))
    g["x"][1, 3, 0, 0] = NAN
    y = through(backend, g, 2, 100)
    assert y[0].isfinite().all() and y[1, :, :2, :2].isnan().all() and y[1, :, 2:].isfinite().all()


LEVEL_CODE = """
import hashlib, torch
import test_winograd as cases
from sbm_fast import _load
print(_load.host.cpu_level())
for side in (2, 4):
    g = cases.given((2, 35, 19, 5, 9))
    tiles = torch.empty((side + 2) ** 2, 4, 35)
    torch.ops.sbm_fast.winograd_input_(tiles, g["x"], 1)
    y = torch.zeros_like(g["plus"])
    products = tiles[..., :19].contiguous()
    torch.ops.sbm_fast.winograd_output_(y, products, g["bias"], g["plus"], 1, 0.7)
    for value in (tiles, y.contiguous()):
        print(hashlib.sha256(value.numpy().tobytes()).hexdigest())
"""


@pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
def test_instruction_sets_give_the_same_bits() -> None:
    found = noise_cases.by_instruction_set(LEVEL_CODE)
    assert "portable" in found and len(set(found.values())) == 1, found


IMAGE = torch.zeros(2, 4, 3, 3)
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("x", "float32 CPU tensor", {"x": last(IMAGE).double()}),
    ("x", "channels last in memory", {"x": IMAGE}),
    ("x", "got 3 dimensions", {"x": IMAGE[0]}),
    ("tiles", r"\[16 or 36, tiles, 4\]", {"tiles": torch.zeros(25, 1, 4)}),
    ("tiles", r"\[16 or 36, tiles, 4\]", {"tiles": torch.zeros(16, 1, 5)}),
    ("tiles", "contiguous", {"tiles": torch.zeros(16, 1, 8)[..., ::2]}),
    ("first", "expected 1 of the 8 tiles to lie behind it, got 8", {"first": 8}),
    ("first", "got 9223372036854775807", {"first": 2**63 - 1}),
    ("first", "got -1", {"first": -1}),
    ("y", "channels last in memory", {"y": IMAGE}),
    ("products", r"\[16 or 36, tiles, 4\]", {"products": torch.zeros(16, 1, 3)}),
    ("bias", "vector of 4", {"bias": torch.zeros(3)}),
    ("plus", "shape of y", {"plus": last(IMAGE)[:1]}),
    ("plus", "channels last in memory", {"plus": IMAGE}),
]


@pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
@pytest.mark.parametrize(("name", "message", "change"), BAD)
def test_what_is_wrong_is_named(name: str, message: str, change: dict[str, Any]) -> None:
    first = {"tiles": torch.zeros(16, 1, 4), "x": last(IMAGE), "first": 0}
    second = {"y": last(IMAGE).clone(), "products": torch.zeros(16, 1, 4)}
    second |= {"bias": torch.zeros(4), "plus": None, "first": 0, "gain": 1.0}
    op, arguments = ("input", first) if set(change) <= set(first) else ("output", second)
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message}"):
        call("cpu", f"winograd_{op}_", *(arguments | change).values())
