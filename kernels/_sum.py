"""The fixed tree of every reduction, for one value an element or several side by side.

Blocks of 1024 values in logical order, padded with zeros, are halved until one is left: w[i] +=
w[i + 512], 256, … 1, an order that one `tl.sum` over the block would not have. Sums of blocks are
added neighbour by neighbour.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(256)  # values that a tree over memory takes at a time


@triton.jit
def halve(values, BLOCK: tl.constexpr):
    """Sums of values [BLOCK, C] over blocks of 1024 (or of a smaller BLOCK), as [blocks, C]."""
    C: tl.constexpr = values.shape[1]
    WIDTH: tl.constexpr = min(BLOCK, 1024)
    COUNT: tl.constexpr = BLOCK // WIDTH
    w = values
    for i in tl.static_range(1, 11):
        if WIDTH >> i >= 1:
            w = tl.sum(tl.reshape(w, (COUNT, 2, WIDTH >> i, C)), axis=1)
    return tl.reshape(w, (COUNT, C))


@triton.jit
def neighbours(values, COUNT: tl.constexpr):
    """The sum [C] of values [COUNT, C] by the tree of neighbours, which begins with 0+1, 2+3, ….

    Zeros behind the values are an odd tail that is passed on.
    """
    C: tl.constexpr = values.shape[1]
    w = values
    for i in tl.static_range(1, 11):
        if COUNT >> i >= 1:
            w = tl.sum(tl.reshape(w, (COUNT >> i, 2, C)), axis=1)
    return tl.reshape(w, (C,))


@triton.jit
def tree_in_place(values, count, C: tl.constexpr):
    """The sum [C] of values [count, C] in memory by the tree of neighbours; uses their memory."""
    side = tl.arange(0, C)
    left = count
    while left > 1:
        chunks = (left + CHUNK - 1) // CHUNK
        for c in range(chunks):
            i = c * CHUNK + tl.arange(0, CHUNK)[:, None]
            v = tl.load(values + C * i.to(tl.int64) + side[None, :], mask=i < left, other=0.0)
            total = neighbours(v, CHUNK)
            tl.debug_barrier()
            tl.store(values + C * c + side, total)
        tl.debug_barrier()
        left = chunks
    return tl.load(values + side)


@triton.jit
def sample_sum(v, BLOCK: tl.constexpr):
    """The sum of a block's values [BLOCK], zeros behind the sample's end."""
    blocks = halve(tl.expand_dims(v, 1), BLOCK)
    return tl.sum(neighbours(blocks, BLOCK // min(BLOCK, 1024)), axis=0)


@triton.jit
def sum_in_place(values, count):
    """The sum of `count` values in memory by the tree of neighbours; uses their memory."""
    return tl.sum(tree_in_place(values, count, 1), axis=0)
