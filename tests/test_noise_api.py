"""`sbm_fast.noise`: shapes, memory formats, dtypes, batches and errors."""

from collections.abc import Callable
from typing import Any

import noise_cases as cases
import numpy as np
import pytest
import torch
from torch import Tensor

from sbm_fast import _load, noise

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)),
    "eager",
]
KINDS: list[Callable[..., Tensor]] = [noise.normal, noise.uniform, noise.rademacher]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (3, 5, 7), (2, 3, 5, 4), (2, 2, 3, 2, 3)])
def test_shapes_hold_the_same_noise(
    make: Callable[..., Tensor], shape: tuple[int, ...], backend: str
) -> None:
    flat = make(1, (shape[0], 4096), draw=3, backend=backend)
    numel = int(torch.tensor(shape[1:]).prod()) if len(shape) > 1 else 1
    got = make(1, shape, draw=3, backend=backend)
    assert got.shape == shape
    assert torch.equal(got.reshape(shape[0], -1), flat[:, :numel])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0), (3, 0, 5)])
def test_empty(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    assert make(1, shape, backend=backend).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_memory_formats_and_dtypes(
    make: Callable[..., Tensor], dtype: torch.dtype, backend: str
) -> None:
    """The element index is that of the logical order; values are float32, then converted."""
    shape = (4, 3, 17, 19)
    plain = make(2, shape, draw=5, backend=backend)
    outs = {
        "contiguous": torch.full(shape, float("nan"), dtype=dtype),
        "channels_last": torch.full(shape, float("nan"), dtype=dtype).to(
            memory_format=torch.channels_last
        ),
        "permuted": torch.full((19, 4, 17, 3), float("nan"), dtype=dtype).permute(1, 3, 2, 0),
        "strided": torch.full((4, 3, 17, 38), float("nan"), dtype=dtype)[..., ::2],
        "reversed batch stride": torch.full((8, 3, 17, 19), float("nan"), dtype=dtype)[1::2],
    }
    for name, out in outs.items():
        assert make(2, shape, draw=5, backend=backend, out=out) is out
        assert torch.equal(out, plain.to(dtype)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outside_the_output_is_written(backend: str) -> None:
    for numel in (1, 3, 5, 63, 65, 1023, 1025):
        store = torch.full((6, numel + 32), float("nan"))
        noise.normal(0, (4, numel), backend=backend, out=store[1:5, 16 : 16 + numel])
        inside = torch.zeros(store.shape, dtype=torch.bool)
        inside[1:5, 16 : 16 + numel] = True
        assert torch.equal(torch.isnan(store), ~inside), numel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [1, 3, 64, 513, 2051])
def test_batch_composition_does_not_matter(backend: str, numel: int) -> None:
    whole = noise.normal(7, (9, numel), backend=backend)
    parts = [
        noise.normal(7, (n, numel), first_sample=first, backend=backend)
        for first, n in ((0, 1), (1, 5), (6, 3))
    ]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    keys = noise.keys(7, 9)[order]
    assert torch.equal(noise.normal(None, (9, numel), keys=keys, backend=backend), whole[order])


def test_keys_may_be_a_strided_view() -> None:
    keys = noise.keys(7, 8)
    got = noise.normal(None, (4, 5), keys=keys[::2])
    assert torch.equal(got, noise.normal(None, (4, 5), keys=keys[::2].clone()))


@pytest.mark.parametrize("make", KINDS)
def test_threads_do_not_matter(make: Callable[..., Tensor]) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([make(0, s) for s in ((64, 3, 32, 32), (5000, 7), (2, 200001))])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1])
def test_every_64_bit_seed_is_one(seed: int) -> None:
    key = cases.sample_key(seed % 2**64, 0)
    given = torch.tensor([cases.signed(key)])
    assert torch.equal(noise.normal(seed, (1, 9)), noise.normal(None, (1, 9), keys=given))


def test_draw_and_stream_reach_32_bits() -> None:
    top = noise.normal(0, (1, 8), draw=2**32 - 1, stream=2**32 - 1)
    assert not torch.equal(top, noise.normal(0, (1, 8), draw=2**31 - 1, stream=2**32 - 1))
    assert torch.equal(
        noise.uniform(0, (1, 8), draw=2**32 - 1, stream=2**31),
        noise.uniform(0, (1, 8), draw=2**32 - 1, stream=2**31, backend="eager"),
    )


def test_defaults_name_their_streams() -> None:
    assert torch.equal(noise.normal(0, (2, 3)), noise.normal(0, (2, 3), stream=noise.TRAJECTORY))
    probe = noise.rademacher(0, (2, 99))
    assert torch.equal(probe, noise.rademacher(0, (2, 99), stream=noise.PROBE))
    streams = (noise.PRIOR, noise.TRAJECTORY, noise.PROBE, noise.DEQUANTISATION, noise.TRAINING)
    assert (*streams, noise.TRAINING_TIME) == (0, 1, 2, 3, 4, 5)


def test_no_seed_follows_torch_manual_seed() -> None:
    torch.manual_seed(4)
    a, b = noise.normal(None, (2, 3)), noise.normal(None, (2, 3))
    torch.manual_seed(4)
    assert torch.equal(noise.normal(None, (2, 3)), a)
    assert not torch.equal(a, b)
    torch.manual_seed(4)
    assert torch.equal(noise.normal(noise.fresh_seed(), (2, 3)), a)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_fresh_seed_has_a_value_on_every_default_device(device: str) -> None:
    with torch.device(device):
        assert 0 <= noise.fresh_seed() < 2**63


def test_integers_of_other_kinds() -> None:
    plain = noise.normal(3, (2, 3), draw=4)
    for kind in (torch.tensor, np.int64, np.uint8):
        assert torch.equal(noise.normal(kind(3), (2, 3), draw=kind(4)), plain)


def test_out_settles_dtype_and_device() -> None:
    out = torch.empty(2, 3, dtype=torch.float64)
    plain = noise.normal(0, (2, 3)).double()
    assert torch.equal(noise.normal(0, (2, 3), out=out), plain)
    assert torch.equal(noise.normal(0, (2, 3), out=out, dtype=torch.float64, device="cpu"), plain)
    # One row: its stride does not matter.
    row = torch.empty(3).expand(1, 3)
    assert torch.equal(noise.normal(0, (1, 3), out=row), noise.normal(0, (1, 3)))


def test_compiled_calls_follow_draw_and_seed() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(seed: int, draw: int) -> Tensor:
        return noise.normal(seed, (2, 5), draw=draw)

    for seed in (5, 6):
        for draw in range(3):
            assert torch.equal(compiled(seed, draw), noise.normal(seed, (2, 5), draw=draw))


KEYS = torch.zeros(2, dtype=torch.int64)
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("seed", TypeError, {"seed": 1.5}),
    ("seed", TypeError, {"seed": True}),
    ("seed", TypeError, {"seed": "0"}),
    ("seed", ValueError, {"seed": 2**64}),
    ("seed", ValueError, {"seed": -(2**63) - 1}),
    ("shape", ValueError, {"shape": ()}),
    ("shape", ValueError, {"shape": (2, -1)}),
    ("shape", TypeError, {"shape": 3}),
    ("shape", TypeError, {"shape": (2, 1.5)}),
    ("draw", ValueError, {"draw": -1}),
    ("draw", ValueError, {"draw": 2**32}),
    ("draw", TypeError, {"draw": 0.0}),
    ("stream", ValueError, {"stream": -1}),
    ("stream", ValueError, {"stream": 2**32}),
    ("stream", TypeError, {"stream": None}),
    ("first_sample", ValueError, {"first_sample": -1}),
    ("first_sample", TypeError, {"first_sample": 0.5}),
    ("dtype", TypeError, {"dtype": torch.int32}),
    ("backend", ValueError, {"backend": "gpu"}),
    ("backend", ValueError, {"backend": "cpu", "device": "meta"}),
    ("backend", ValueError, {"backend": np.array([1, 2])}),
    ("dtype", TypeError, {"dtype": np.array([1, 2])}),
    ("device", ValueError, {"device": "meta"}),
    ("out", ValueError, {"out": torch.empty(2, 4)}),
    ("draw", ValueError, {"draw": torch.tensor(-1)}),
    ("seed", TypeError, {"seed": torch.tensor(1.5)}),
    ("seed", TypeError, {"seed": torch.tensor([1, 2])}),
    ("dtype", TypeError, {"dtype": "float32"}),
    ("dtype", TypeError, {"dtype": None}),
    ("dtype", TypeError, {"dtype": torch.float8_e4m3fn}),
    ("dtype", TypeError, {"dtype": torch.complex64}),
    ("out", TypeError, {"out": torch.empty(2, 3, dtype=torch.int32)}),
    ("out", TypeError, {"out": torch.empty(2, 3, dtype=torch.float8_e4m3fn)}),
    ("out", TypeError, {"out": [0.0]}),
    ("out", ValueError, {"out": torch.empty(1, 3).expand(2, 3)}),
    ("dtype", ValueError, {"out": torch.empty(2, 3), "dtype": torch.float64}),
    ("device", ValueError, {"out": torch.empty(2, 3), "device": "meta"}),
    ("keys", ValueError, {"keys": KEYS}),
    ("keys", ValueError, {"seed": None, "keys": KEYS, "first_sample": 1}),
    ("keys", ValueError, {"seed": None, "keys": KEYS[:1]}),
    ("keys", ValueError, {"seed": None, "keys": KEYS[None]}),
    ("keys", TypeError, {"seed": None, "keys": KEYS.int()}),
    ("keys", TypeError, {"seed": None, "keys": [1, 2]}),
]


@pytest.mark.parametrize(("name", "error", "arguments"), BAD)
def test_bad_input_is_named(name: str, error: type[Exception], arguments: dict[str, Any]) -> None:
    arguments = {"seed": 0, "shape": (2, 3), **arguments}
    with pytest.raises(error, match=rf"^{name}: "):
        noise.normal(arguments.pop("seed"), arguments.pop("shape"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((1.5, 3), TypeError, "seed"),
        ((0, -1), ValueError, "n"),
        ((0, 2.5), TypeError, "n"),
        ((0, 3, -1), ValueError, "first_sample"),
    ],
)
def test_bad_input_of_keys_is_named(
    arguments: tuple[Any, ...], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=rf"^{name}: "):
        noise.keys(*arguments)
