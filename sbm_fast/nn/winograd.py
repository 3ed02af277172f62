"""3×3 convolutions by Winograd's minimal filtering: when it pays, and the loop over tiles.

The formulas are in `sbm_fast/ops/winograd.py`.
"""

from __future__ import annotations

import threading
from math import isqrt

import torch
from torch import Tensor

from sbm_fast.ops._library import has_kernels
from sbm_fast.ops.winograd import tiling, winograd_input_, winograd_output_

CHANNELS = 64
"""With fewer, in or out, the transforms cost more than the products save."""
FEWEST = {4: 64, 2: 32}
"""The fewest tiles of a call, by their side: transformed weights are 4 and 16/9 times as large, and
are read from memory at every call. The first side with enough tiles is taken."""
CHUNK = 5 << 18
"""Numbers of the tiles and products that are in work at a time, 5 MiB: with the weights of 256
channels they stay in the last-level cache. Every thread that calls keeps the memory."""
_kept = threading.local()


def side(x: Tensor, outputs: int) -> int:
    """Of the tiles by which a convolution of x [B, Cin, H, W] to `outputs` channels is fastest;
    0: none, the direct sum is."""
    batch, inputs, height, width = x.shape
    if min(inputs, outputs) < CHANNELS or x.stride(1) != 1 or not has_kernels(x):
        return 0
    for length, fewest in FEWEST.items():
        down, across = tiling(height, width, length)
        if batch * down * across >= fewest:
            return length
    return 0


def convolved(
    x: Tensor, weights: Tensor, bias: Tensor | None, plus: Tensor | None = None, gain: float = 1.0
) -> Tensor:
    """gain·(conv(x) + bias + plus) [B, Cout, H, W], channels last in memory as in x.

    weights [(M + 2)², Cin, Cout] are those of `ops.winograd.weights`. x in channels_last.
    """
    products, inputs, outputs = weights.shape
    batch, _, height, width = x.shape
    down, across = tiling(height, width, isqrt(products) - 2)
    tiles = batch * down * across
    chunks = -(-tiles * products * (inputs + outputs) // CHUNK)
    most = -(-tiles // max(chunks, 1))
    room = _room(products * most * (inputs + outputs))
    y = x.new_empty((batch, height, width, outputs)).permute(0, 3, 1, 2)
    if plus is not None:
        plus = plus.contiguous(memory_format=torch.channels_last)
    for first in range(0, tiles, most):
        count = min(most, tiles - first)
        cut = products * count * inputs
        before = room[:cut].view(products, count, inputs)
        behind = room[cut : cut + products * count * outputs].view(products, count, outputs)
        winograd_input_(before, x, first)
        torch.bmm(before, weights, out=behind)
        winograd_output_(y, behind, bias, plus, first, gain)
    return y


def _room(size: int) -> Tensor:
    """Float32 memory of this thread: new memory would cost more than the transforms."""
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < size:
        with torch.inference_mode(False):
            room = _kept.room = torch.empty(size)
    return room
