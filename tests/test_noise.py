"""The noise contract: words, keys, the law of uniforms and normals, invariances, errors."""

import json
from pathlib import Path

import noise_cases as cases
import numpy as np
import pytest
import torch
from op_backends import BACKENDS, call, each, is_slow, over
from torch import Tensor

from sbm_fast import _load, noise
from sbm_fast.ops import _philox

GOLDEN = Path(__file__).parent / "golden" / "noise.json"
needs_compiled = pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
SIZES = [1, 2, 3, 4, 5, 63, 64, 65, 100, 511, 512, 513, 1023, 1024, 1025, 4099]
SIZES_AND_BATCHES = [(numel, batch) for numel in SIZES for batch in (1, 2, 7)]
FEW_SIZES = [(1, 2), (3, 1), (5, 7), (65, 1), (129, 2), (513, 1), (1025, 2), (4099, 1)]


def fill(kind: str, backend: str, out: Tensor, keys: Tensor, draw: int, stream: int) -> Tensor:
    call(backend, f"{kind}_", out, keys, draw, stream)
    return out


def words(backend: str, keys: Tensor, numel: int, draw: int = 0, stream: int = 1) -> Tensor:
    out = torch.zeros(len(keys), numel, dtype=torch.int32)
    return fill("words", backend, out, keys, draw, stream)


def eager_philox(counter: cases.Words, key: tuple[int, int]) -> list[int]:
    c = tuple(torch.tensor([w]) for w in counter)
    k = tuple(torch.tensor([w]) for w in key)
    return [int(w) for w in _philox.philox(c, k)]


def test_known_answers_of_the_independent_philox() -> None:
    assert cases.known_answer_error(cases.philox) == ""


def test_known_answers_eager() -> None:
    assert cases.known_answer_error(eager_philox) == ""


@needs_compiled
def test_known_answers_host() -> None:
    assert cases.known_answer_error(_load.host.philox) == ""


@each
def test_known_answers_through_the_op(backend: str) -> None:
    zero = words(backend, torch.zeros(1, dtype=torch.int64), 4, draw=0, stream=0)
    assert [w & cases.M32 for w in zero[0].tolist()] == list(cases.KNOWN_ANSWERS[0][2])


@each
@pytest.mark.parametrize(
    ("key", "draw", "stream"),
    [(0, 0, 0), (2**64 - 1, cases.M32, cases.M32), (0x299F31D0A4093822, 0x13198A2E, 0x03707344)],
)
def test_words_are_philox_of_element_draw_and_stream(
    backend: str, key: int, draw: int, stream: int
) -> None:
    got = words(backend, torch.tensor([cases.signed(key)]), 37, draw, stream)
    assert [w & cases.M32 for w in got[0].tolist()] == cases.sample_words(key, 37, draw, stream)


@over("numel,batch", SIZES_AND_BATCHES, FEW_SIZES)
def test_words_at_every_size(backend: str, numel: int, batch: int) -> None:
    keys = noise.keys(11, batch)
    whole = words("eager", keys, 4100, draw=3)
    assert torch.equal(words(backend, keys, numel, draw=3), whole[:, :numel])


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 123456789])
@pytest.mark.parametrize("first", [0, 5, 2**32 - 2, 2**40])
def test_keys_follow_the_contract(seed: int, first: int) -> None:
    expected = [cases.signed(cases.sample_key(seed % 2**64, first + b)) for b in range(4)]
    assert noise.keys(seed, 4, first).tolist() == expected
    for backend in BACKENDS:
        out = torch.empty(4, dtype=torch.int64)
        call(backend, "keys_", out, cases.signed(seed % 2**64), first)
        assert out.tolist() == expected, backend


def test_negative_and_wrapped_seeds_are_the_same_bits() -> None:
    assert torch.equal(noise.keys(-1, 3), noise.keys(2**64 - 1, 3))


@needs_compiled
def test_host_key_is_the_contract() -> None:
    for seed, b in [(0, 0), (2**64 - 1, 2**40), (7, 2**32 + 1)]:
        assert _load.host.sample_key(seed, b) == cases.sample_key(seed, b)


@pytest.mark.parametrize("j", [2**32, 2**32 + 5, 2**34 + 1, 2**40])
def test_element_index_beyond_2_34(j: int) -> None:
    """Elements 4j … 4j+3; nothing is allocated, the word functions are asked directly."""
    key = 0x0123456789ABCDEF
    counter = (j & cases.M32, j >> 32, 9, 1)
    halves = (key & cases.M32, key >> 32)
    expected = list(cases.philox(counter, halves))
    assert [int(w) for w in _philox.split(torch.tensor([j]))] == list(counter[:2])
    assert eager_philox(counter, halves) == expected
    if _load.COMPILED:
        assert _load.host.philox(counter, halves) == expected


@needs_compiled
def test_uniforms_follow_the_formula_at_the_ends() -> None:
    ends = [0, 1, 2, 127, 128, 129, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 1]
    got = [_load.host.uniform(w) for w in ends]
    assert got == cases.uniform(np.array(ends, dtype=np.uint32)).tolist()
    assert got[0] == 2.0**-33 and got[-1] == 1.0
    eager = _philox.to_uniform(torch.tensor(ends))
    assert eager.double().tolist() == got


@needs_compiled
def test_normals_stay_within_the_bound_of_the_float64_formula_at_hard_words() -> None:
    """Both ends of u, the tails, u → 1 where ln u vanishes, and angles about every quadrant."""
    rng = np.random.default_rng(0)
    end = 2**32 - 1
    radius = [*range(64), *(2**k for k in range(32)), *(end - 2**k for k in range(32))]
    radius += [end, *(end - k for k in range(64)), *rng.integers(0, 2**32, 300).tolist()]
    angle = [(q * 2**29 + d) % 2**32 for q in range(8) for d in (-513, -128, -1, 0, 1, 128, 513)]
    angle += rng.integers(0, 2**32, 60).tolist()
    pairs = np.array([(r, a) for r in radius for a in angle], dtype=np.uint32)
    exact = cases.normal(np.concatenate([pairs, pairs], axis=1))[:, :2]
    got = np.array([_load.host.box_muller(r, a) for r, a in pairs.tolist()])
    worst = np.abs(got - exact).max(axis=1)
    at = int(worst.argmax())
    assert worst[at] <= cases.LAW_BOUND, f"words {pairs[at]}: {got[at]} against {exact[at]}"
    assert np.abs(exact).max() > 6.7  # the tail was there


@needs_compiled
def test_normals_near_u_equal_to_one() -> None:
    """Every float32 u in the last 2¹⁴ steps before 1: the radius itself is tiny there."""
    w = (2**32 - 256 * np.arange(1, 2**14, dtype=np.int64)).astype(np.uint32)
    quads = np.stack([w, np.zeros_like(w), w, np.zeros_like(w)], axis=1)
    exact = cases.normal(quads)[:, 0]
    got = np.array([_load.host.box_muller(x, 0)[0] for x in w.tolist()])
    assert np.abs(got - exact).max() <= cases.LAW_BOUND


@each
def test_normals_of_the_op_stay_within_the_bound(backend: str) -> None:
    batch, numel = (4, 4 * 1024) if is_slow(backend) else (64, 4 * 8192)
    keys = noise.keys(3, batch)
    w = words(backend, keys, numel).numpy().view(np.uint32)
    z = fill("normal", backend, torch.full((batch, numel), float("nan")), keys, 0, 1)
    assert np.abs(z.numpy() - cases.normal(w)).max() <= cases.LAW_BOUND


@needs_compiled
def test_the_op_and_the_host_give_the_same_bits() -> None:
    """So what is shown for the scalar formula at hard words holds for vector code too."""
    keys = noise.keys(5, 3)
    w = words("cpu", keys, 1028).numpy().view(np.uint32).reshape(-1, 2)
    z = fill("normal", "cpu", torch.empty(3, 1028), keys, 0, 1).numpy().reshape(-1, 2)
    host = np.array([_load.host.box_muller(a, b) for a, b in w.tolist()], dtype=np.float32)
    np.testing.assert_array_equal(z.view(np.uint32), host.view(np.uint32))
    u = fill("uniform", "cpu", torch.empty(3, 1028), keys, 0, 1).numpy().reshape(-1)
    np.testing.assert_array_equal(u, cases.uniform(w.reshape(-1)))


@each
def test_uniforms_and_signs_follow_the_words(backend: str) -> None:
    keys = noise.keys(9, 4)
    w = words(backend, keys, 1003, draw=2, stream=6).numpy().view(np.uint32)
    u = fill("uniform", backend, torch.empty(4, 1003), keys, 2, 6)
    signs = fill("rademacher", backend, torch.empty(4, 1003), keys, 2, 6)
    np.testing.assert_array_equal(u.double().numpy(), cases.uniform(w))
    np.testing.assert_array_equal(signs.numpy(), np.where(w >> 31, -1.0, 1.0))


@each
def test_golden_file(backend: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == 1 and "major version" in golden["note"]
    for case in golden["cases"]:
        keys = noise.keys(case["seed"], len(case["keys"]), case["first_sample"])
        assert keys.tolist() == case["keys"]
        numel = len(case["words"][0])
        got = words(backend, keys, numel, case["draw"], case["stream"])
        assert got.numpy().view(np.uint32).tolist() == case["words"]
        z = fill("normal", backend, torch.empty(got.shape), keys, case["draw"], case["stream"])
        expected = np.array(case["normal_bits"], dtype=np.uint32).view(np.float32)
        if backend != "eager":
            np.testing.assert_array_equal(z.numpy(), expected)
        else:
            np.testing.assert_allclose(z.numpy(), expected, rtol=0, atol=cases.LAW_BOUND)


LEVEL_CODE = """
import hashlib, torch
from sbm_fast import _load, noise
from sbm_fast.ops.noise import OPS
assert _load.load(), _load.REASON
print(_load.host.cpu_level())
for kind, op in sorted(OPS.items()):
    digest = hashlib.sha256()
    for numel in (1, 2, 3, 5, 63, 64, 65, 192, 1023, 1025, 4099):
        out = torch.empty(33, numel, dtype=torch.int32 if kind == "words" else torch.float32)
        op(out, noise.keys(1, 33), 7, 1)
        digest.update(out.numpy().tobytes())
    print(kind, digest.hexdigest())
"""


@needs_compiled
def test_instruction_sets_give_the_same_bits() -> None:
    outputs = cases.by_instruction_set(LEVEL_CODE)
    assert "portable" in outputs
    assert len(set(outputs.values())) == 1, outputs
