"""The noise words as samplers use them, raw on stdout, for dieharder and other batteries.

    python tests/statistics/dieharder_stream.py --order mixed | dieharder -a -g 200

A block is 64 consecutive global samples of one seed × 64 consecutive draws × 192 elements (a
3×8×8 image: the counter starts again at 0 for every sample and draw, as it does in a sampler).
Blocks go on along the draws to 1024 (the rows of a trajectory), then to the next 64 samples.

Orders (which neighbours are adjacent in the stream):
    elements  element, then sample, then draw: the order in which a batch is filled
    samples   sample, then element, then draw: adjacent words differ in the key
    draws     draw, then sample, then element: adjacent words differ in the third counter word
    mixed     every word moves on in sample, draw and element at once (a diagonal through the block)
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.ops.noise import OPS

SAMPLES, DRAWS, ELEMENTS, TRAJECTORY = 64, 64, 192, 1024
ORDERS = ("elements", "samples", "draws", "mixed")


def block(seed: int, first_sample: int, first_draw: int, stream: int = noise.TRAJECTORY) -> Tensor:
    """Words, int32 [DRAWS, SAMPLES, ELEMENTS]."""
    keys = noise.keys(seed, SAMPLES, first_sample)
    words = torch.empty(DRAWS, SAMPLES, ELEMENTS, dtype=torch.int32)
    for i in range(DRAWS):
        OPS["words"](words[i], keys, first_draw + i, stream)
    return words


def diagonal() -> Tensor:
    """Index [DRAWS·SAMPLES·ELEMENTS] that visits every word of a block once, diagonally.

    Word t of diagonal (i, j) is at element t, draw (t + i) mod DRAWS, sample (t + j) mod SAMPLES.
    """
    t = torch.arange(ELEMENTS)
    i = torch.arange(DRAWS)[:, None, None]
    j = torch.arange(SAMPLES)[None, :, None]
    draw, sample = (t + i) % DRAWS, (t + j) % SAMPLES
    return ((draw * SAMPLES + sample) * ELEMENTS + t).flatten()


def ordered(words: Tensor, order: str, index: Tensor | None = None) -> Tensor:
    """A block's words as a flat contiguous tensor in one of ORDERS."""
    if order == "mixed":
        return words.flatten().take(diagonal() if index is None else index)
    axes = {"elements": (0, 1, 2), "samples": (0, 2, 1), "draws": (2, 1, 0)}
    return words.permute(axes[order]).reshape(-1)


def blocks(seed: int, order: str) -> Iterator[Tensor]:
    """Ordered blocks without end."""
    index = diagonal()
    first_sample = 0
    while True:
        for first_draw in range(0, TRAJECTORY, DRAWS):
            yield ordered(block(seed, first_sample, first_draw), order, index)
        first_sample += SAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=ORDERS, default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for words in blocks(arguments.seed, arguments.order):
            sys.stdout.buffer.write(words.numpy().tobytes())
    except BrokenPipeError:
        sys.stderr.close()  # the reader has had enough


if __name__ == "__main__":
    main()
