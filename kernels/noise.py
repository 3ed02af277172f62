"""Ops that fill a tensor with counter-based noise: see `sbm_fast.ops.noise`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._philox import KEY_DOMAIN, in_order, normals, philox, rademacher, sample_words, split, uniform
from ._row import pointers, tile_of

KEYS_BLOCK = 256


@triton.jit(do_not_specialize=_launch.UNSPECIALISED)
def fill(
    out, keys, draw, stream, numel, sizes, tiles,
    KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one sample."""
    at = tile_of(tl.program_id(0), numel, sizes, tiles, WIDE, BLOCK)
    key = tl.load(keys + at[0])
    if KIND == "normal":
        v = normals(key, at[1], draw, stream, BLOCK)
    else:
        w0, w1, w2, w3 = sample_words(key, at[1], draw, stream, BLOCK)
        w = in_order(w0, w1, w2, w3)
        if KIND == "uniform":
            v = uniform(w)
        elif KIND == "rademacher":
            v = rademacher(w)
        else:
            v = w.to(tl.int32, bitcast=True)
    tl.store(pointers(out, at), v.to(out[0].dtype.element_ty), mask=at[3])


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_low", "first_high", "count"])
def sample_keys(out, seed_low, seed_high, first_low, first_high, count, BLOCK: tl.constexpr):
    """key[b] of samples first + 0 … count − 1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = first_low.to(tl.uint32).to(tl.uint64) | (first_high.to(tl.uint32).to(tl.uint64) << 32)
    b_low, b_high = split(first + i.to(tl.uint64))
    domain = b_low * 0 + KEY_DOMAIN
    w0, w1, _, _ = philox(
        b_low, b_high, domain, b_low * 0, seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    )
    key = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    tl.store(out + i, key.to(tl.int64, bitcast=True), mask=i < count)


def normal_(out: Tensor, keys: Tensor, draw: int, stream: int) -> None:
    _fill("normal", out, keys, draw, stream)


def uniform_(out: Tensor, keys: Tensor, draw: int, stream: int) -> None:
    _fill("uniform", out, keys, draw, stream)


def rademacher_(out: Tensor, keys: Tensor, draw: int, stream: int) -> None:
    _fill("rademacher", out, keys, draw, stream)


def words_(out: Tensor, keys: Tensor, draw: int, stream: int) -> None:
    ok = out.dtype == torch.int32 and out.is_contiguous()
    _launch.require(ok, "out: expected a contiguous int32 tensor")
    _fill("words", out, keys, draw, stream)


def keys_(out: Tensor, seed: int, first_sample: int) -> None:
    _launch.samples(out, "out")
    _launch.vector(out, out, torch.int64, "out")
    if out.numel() == 0:
        return
    _launch.launch(
        sample_keys, triton.cdiv(len(out), KEYS_BLOCK), out,
        out, *_launch.halves(seed), *_launch.halves(first_sample), len(out),
        BLOCK=KEYS_BLOCK, num_warps=4,
    )  # fmt: skip


def _fill(kind: str, out: Tensor, keys: Tensor, draw: int, stream: int) -> None:
    batch = _launch.samples(out, "out")
    if kind != "words":
        ok = out.dtype in _launch.FLOATS
        _launch.require(ok, "out: expected float32, float64, bfloat16 or float16")
    _launch.vector(keys, out, torch.int64, "keys")
    if out.numel() == 0:
        return
    numel = out.numel() // batch
    sizes, found = _launch.views(out.shape, out=out)
    options = _launch.configuration(numel)
    tiles = triton.cdiv(numel, options["BLOCK"])
    _launch.launch(
        fill, batch * tiles, out,
        found["out"], keys, _launch.halves(draw)[0], _launch.halves(stream)[0], numel, sizes, tiles,
        KIND=kind, WIDE=_launch.is_wide(numel), **options,
    )  # fmt: skip
