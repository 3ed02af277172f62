"""The noise ops of every backend on what they are given: layouts, dtypes, neighbours in memory.

The words, the law and its bounds are in tests/test_noise.py.
"""

import pytest
import torch
from op_backends import call, each, is_slow, over
from torch import Tensor

from sbm_fast import noise

KINDS = ("normal", "uniform", "rademacher")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN = float("nan")


def fill(backend: str, kind: str, out: Tensor, seed: int = 2) -> Tensor:
    call(backend, f"{kind}_", out, noise.keys(seed, len(out)), 5, 1)
    return out


@over("kind,dtype", [(k, d) for k in KINDS for d in DTYPES], [("normal", d) for d in DTYPES])
def test_memory_formats_and_dtypes(backend: str, kind: str, dtype: torch.dtype) -> None:
    """The element index is that of the logical order; values are float32, then converted."""
    shape = (4, 3, 17, 9)
    plain = fill(backend, kind, torch.full(shape, NAN))
    empty = torch.full(shape, NAN, dtype=dtype)
    outs = {
        "contiguous": empty.clone(),
        "channels_last": empty.contiguous(memory_format=torch.channels_last),
        "permuted": torch.full((9, 4, 17, 3), NAN, dtype=dtype).permute(1, 3, 2, 0),
        "strided": torch.full((4, 3, 17, 18), NAN, dtype=dtype)[..., ::2],
        "every second sample": torch.full((8, 3, 17, 9), NAN, dtype=dtype)[1::2],
    }
    for name, out in outs.items():
        assert torch.equal(fill(backend, kind, out), plain.to(dtype)), name


@each
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (3, 0, 5)])
def test_empty(shape: tuple[int, ...], kind: str, backend: str) -> None:
    assert fill(backend, kind, torch.empty(shape)).shape == shape


@each
def test_nothing_outside_the_output_is_written(backend: str) -> None:
    for numel in (3, 129) if is_slow(backend) else (1, 3, 5, 63, 65, 129, 1023, 1025):
        store = torch.full((6, numel + 32), NAN)
        fill(backend, "normal", store[1:5, 16 : 16 + numel])
        inside = torch.zeros(store.shape, dtype=torch.bool)
        inside[1:5, 16 : 16 + numel] = True
        assert torch.equal(torch.isnan(store), ~inside), numel


@each
@pytest.mark.parametrize("numel", [3, 513])
def test_batch_composition_does_not_matter(numel: int, backend: str) -> None:
    keys = noise.keys(7, 4)
    whole = torch.empty(4, numel)
    call(backend, "normal_", whole, keys, 0, 1)
    for part in ([2], [3, 1, 0]):
        out = torch.empty(len(part), numel)
        call(backend, "normal_", out, keys[part], 0, 1)
        assert torch.equal(out, whole[part])


@each
def test_draw_and_stream_reach_32_bits(backend: str) -> None:
    keys = noise.keys(0, 1)
    for draw, stream in ((2**32 - 1, 2**31), (2**31, 2**32 - 1)):
        out, expected = torch.empty(1, 8), torch.empty(1, 8)
        call(backend, "uniform_", out, keys, draw, stream)
        call("eager", "uniform_", expected, keys, draw, stream)
        assert torch.equal(out, expected)
