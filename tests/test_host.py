"""The shared formulas of csrc/, through the host module: known answers and float64 values."""

import os
import subprocess
import sys
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest

from sbm_fast import _load


@pytest.fixture
def host() -> ModuleType:
    if not _load.load() or _load.host is None:
        pytest.skip(f"needs the compiled part: {_load.REASON}")
    return _load.host


# Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox(host: ModuleType, counter: list[int], key: list[int], words: str) -> None:
    assert " ".join(f"{w:08x}" for w in host.philox(counter, key)) == words


def test_sample_key_is_two_words_of_philox(host: ModuleType) -> None:
    seed, sample = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    low, high, *_ = host.philox([0x76543210, 0xFEDCBA98, 0x53424D, 0], [0x89ABCDEF, 0x01234567])
    assert host.sample_key(seed, sample) == low | high << 32


@pytest.mark.parametrize("word", [0, 1, 255, 2**24 + 1, 2**31, 2**32 - 1])
def test_uniform_is_the_rounded_formula(host: ModuleType, word: int) -> None:
    rounded = Fraction(float(np.float32(word)))
    exact = rounded * Fraction(1, 2**32) + Fraction(1, 2**33)
    # Exact in float64: 24 bits and one more below them, at most 33 bits apart.
    assert host.uniform(word) == np.float32(float(exact))
    assert 0.0 < host.uniform(word) <= 1.0


def test_box_muller_against_float64(host: ModuleType) -> None:
    rng = np.random.default_rng(0)
    edges = np.array([0, 1, 2**31, 2**32 - 2**9, 2**32 - 1])
    words = np.concatenate([edges, rng.integers(2**32, size=4000), 2**32 - 1 - 2 ** np.arange(31)])
    pairs = list(zip(words.tolist(), rng.permutation(words).tolist(), strict=True))
    z = np.array([host.box_muller(a, b) for a, b in pairs])
    u = np.array([[host.uniform(a), host.uniform(b)] for a, b in pairs])
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    assert np.abs(z - exact).max() <= 2e-6


def test_rows_add_products_of_full_precision(host: ModuleType) -> None:
    rng = np.random.default_rng(0)
    coefficients = rng.standard_normal(500)
    values = rng.standard_normal(500).astype(np.float32).astype(np.float64)
    one = [host.row_f32([c], [v]) for c, v in zip(coefficients, values, strict=True)]
    assert np.array_equal(one, (coefficients * values).astype(np.float32))
    # The low parts matter: with coefficients rounded to float32 many products differ.
    rounded = coefficients.astype(np.float32) * values.astype(np.float32)
    assert np.count_nonzero(one != rounded) > 50

    c, v = coefficients[:4], values[:4]
    exact = sum(Fraction(a) * Fraction(b) for a, b in zip(c, v, strict=True))
    largest = np.abs(c * v).sum()
    for row, epsilon in ((host.row_f32, 2.0**-24), (host.row_f64, 2.0**-53)):
        assert abs(row(c, v) - float(exact)) <= 4 * epsilon * largest


def test_rows_check_their_arguments(host: ModuleType) -> None:
    with pytest.raises(ValueError, match="as many values as coefficients, at most 12, got 1 and 2"):
        host.row_f32([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 13 and 13"):
        host.row_f64([1.0] * 13, [1.0] * 13)


def test_build_info_says_what_was_compiled(host: ModuleType) -> None:
    info = host.build_info()
    assert info["torch_target"] == "2.10"
    assert "-ffp-contract=off" in info["flags"].split()
    assert "fast-math" not in info["flags"]
    assert info["simd"][0] == "portable"
    assert len(info["source_hash"]) == 64


@pytest.mark.parametrize(("asked", "allowed"), [("portable", 1), ("avx2", 2), ("", 3)])
def test_the_environment_lowers_the_cpu_level(host: ModuleType, asked: str, allowed: int) -> None:
    levels = ["portable", "avx2", "avx512"]
    script = "from sbm_fast import _load; _load.load(); print(_load.host.cpu_level())"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SBM_FAST_CPU": asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() in levels[:allowed]
