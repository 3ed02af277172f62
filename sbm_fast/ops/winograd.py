"""Ops `winograd_input_` and `winograd_output_`: what stands before and behind the products of a
3×3 convolution (stride 1, padding 1) by Winograd's minimal filtering F(M×M, 3×3), M = 2 or 4.

An image is cut into tiles of M×M outputs, in the order sample, row, column; the last ones of a row
or column may stick out. With d the (M + 2)×(M + 2) inputs that a tile reads, zero outside the
image, and w the 3×3 weights of a pair of channels:

    y = gain·(Aᵀ [ Σ_channels (Bᵀ d B) ⊙ (G w Gᵀ) ] A + bias + plus)

The sum over channels is (M + 2)² products of matrices, [tiles, Cin] × [Cin, Cout], which the caller
makes between the two ops. They take 9·M²/(M + 2)² times fewer multiplications than the direct sum:
2.25 and 4 times.

Sources: Winograd, "Arithmetic complexity of computations", 1980; Lavin and Gray, "Fast algorithms
for convolutional neural networks", 2016. A, G and B are Toom's and Cook's for the points 0, ±1, ∞
(M = 2) and 0, ±11/16, ±3/2, ∞ (M = 4). The latter were found by trying: they round half as much as
Lavin's 0, ±1, ±2, ∞ (see Alam et al., "Winograd convolution for deep neural networks: efficient
point selection", 2022), and all constants of A and B are exact in float32.

Arguments (B samples, C channels, float32; images [B, C, H, W] with channels last in memory):
    tiles, products [(M + 2)², T, C], contiguous: row i·(M + 2) + j holds entry (i, j) of tiles
        first … first + T − 1. The first op writes tiles, the second reads products.
    x: read. y: written where these tiles are.
    bias [C], contiguous, or None.
    plus: like y, or None. It may be y.
"""

from fractions import Fraction
from functools import cache
from math import isqrt

import torch
from torch import Tensor

from sbm_fast.ops._library import register

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(11, 16), Fraction(-11, 16), Fraction(3, 2), Fraction(-3, 2)),
}
"""The finite points of F(M×M, 3×3) by M."""


@cache
def matrices(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ [M, M + 2], G [M + 2, 3] and Bᵀ [M + 2, M + 2] in float64, for M = side."""
    points = POINTS[side]
    a, g, b = [], [], []
    for point in points:
        others = [other for other in points if other != point]
        a.append([point**i for i in range(side)])
        g.append([point**i / _monic(others, point) for i in range(3)])
        b.append([*_coefficients(others), Fraction(0)])
    a.append([Fraction(i == side - 1) for i in range(side)])
    g.append([Fraction(i == 2) for i in range(3)])
    b.append(_coefficients(points))
    of_a, of_g, of_b = (
        torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64)
        for rows in (a, g, b)
    )
    return of_a.T, of_g, of_b


def _monic(roots: list[Fraction], x: Fraction) -> Fraction:
    value = Fraction(1)
    for root in roots:
        value *= x - root
    return value


def _coefficients(roots: list[Fraction] | tuple[Fraction, ...]) -> list[Fraction]:
    """Of the monic polynomial with these roots, the constant first."""
    found = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *found], [*(-root * v for v in found), Fraction(0)]
        found = [v + w for v, w in zip(shifted, scaled, strict=True)]
    return found


def weights(weight: Tensor, side: int) -> Tensor:
    """G w Gᵀ [(M + 2)², Cin, Cout] in the dtype of weight [Cout, Cin, 3, 3]; made in float64."""
    g = matrices(side)[1].to(weight.device)
    made = torch.einsum("ik,ockl,jl->ijco", g, weight.double(), g)
    return made.flatten(0, 1).to(weight.dtype).contiguous()


def tiling(height: int, width: int, side: int) -> tuple[int, int]:
    """Tiles down and across an image."""
    return -(-height // side), -(-width // side)


def input_reference(tiles: Tensor, x: Tensor, first: int) -> None:
    """The same in plain torch, on any device."""
    side = isqrt(tiles.shape[0]) - 2
    down, across = tiling(x.shape[2], x.shape[3], side)
    beyond = side * across - x.shape[3] + 1, side * down - x.shape[2] + 1
    padded = torch.nn.functional.pad(x, (1, beyond[0], 1, beyond[1]))
    cut = padded.unfold(2, side + 2, side).unfold(3, side + 2, side)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[first : first + tiles.shape[1]]
    b = matrices(side)[2].to(x)
    tiles.copy_(torch.einsum("ik,tckl,jl->ijtc", b, cut, b).flatten(0, 1))


def output_reference(
    y: Tensor,
    products: Tensor,
    bias: Tensor | None,
    plus: Tensor | None,
    first: int,
    gain: float,
) -> None:
    """The same in plain torch, on any device."""
    length = isqrt(products.shape[0])
    side = length - 2
    batch, channels, height, width = y.shape
    down, across = tiling(height, width, side)
    a = matrices(side)[0].to(products)
    made = torch.einsum("ik,kltc,jl->tcij", a, products.unflatten(0, (length, length)), a)
    whole = y.new_zeros(batch * down * across, channels, side, side)
    new = torch.zeros(len(whole), 1, 1, 1, dtype=torch.bool, device=y.device)
    whole[first : first + len(made)], new[first : first + len(made)] = made, True

    def image(of_tiles: Tensor) -> Tensor:
        grid = of_tiles.expand(-1, -1, side, side).unflatten(0, (batch, down, across))
        joined = grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, down * side, across * side)
        return joined[..., :height, :width]

    total = image(whole)
    if bias is not None:
        total = total + bias[:, None, None]
    if plus is not None:
        total = total + plus
    y.copy_(torch.where(image(new), gain * total, y))


winograd_input_ = register(
    "winograd_input_(Tensor(a!) tiles, Tensor x, int first) -> ()", input_reference, cpu_only=True
)
winograd_output_ = register(
    "winograd_output_(Tensor(a!) y, Tensor products, Tensor? bias, Tensor? plus, int first, "
    "float gain) -> ()",
    output_reference,
    cpu_only=True,
)
