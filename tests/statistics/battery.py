"""Tests of a stream of 32-bit words, each a p-value; small relatives of dieharder's.

Every test returns the probability of a statistic at least as extreme under independent uniform
words, so that `worst(words)` is compared with one stated level.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Words = NDArray[np.uint32]


def _two_sided(z: float) -> float:
    return float(math.erfc(abs(z) / math.sqrt(2.0)))


def bit_frequencies(words: Words) -> float:
    """χ² of the number of ones in each of the 32 bit positions."""
    n = len(words)
    ones = np.array([np.count_nonzero(words >> np.uint32(k) & np.uint32(1)) for k in range(32)])
    return float(stats.chi2.sf(((ones - n / 2) ** 2 / (n / 4)).sum(), 32))


def byte_pairs(words: Words, shift: int) -> float:
    """χ² of 2-grams: one byte of a word and the same byte of the next, 65,536 cells."""
    byte = (words >> np.uint32(shift) & np.uint32(255)).astype(np.int64)
    pairs = byte[: len(byte) // 2 * 2].reshape(-1, 2)
    counts = np.bincount(pairs[:, 0] * 256 + pairs[:, 1], minlength=65536)
    expected = len(pairs) / 65536
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), 65535))


def runs(words: Words, bit: int) -> float:
    """Number of runs of equal bits at one position along the stream (Wald and Wolfowitz)."""
    bits = words >> np.uint32(bit) & np.uint32(1)
    changes = np.count_nonzero(bits[1:] != bits[:-1])
    n = len(bits) - 1
    return _two_sided((changes - n / 2) / math.sqrt(n / 4))


def birthday_spacings(words: Words, birthdays: int = 4096) -> float:
    """Equal spacings among sorted birthdays in 2³² days (Marsaglia): Poisson, mean m³/(4·2³²)."""
    groups = words[: len(words) // birthdays * birthdays].reshape(-1, birthdays)
    spacings = np.sort(np.diff(np.sort(groups.astype(np.int64), axis=1), axis=1), axis=1)
    repeats = np.count_nonzero(np.diff(spacings, axis=1) == 0)
    mean = len(groups) * birthdays**3 / 2**34
    tail = min(stats.poisson.cdf(repeats, mean), stats.poisson.sf(repeats - 1, mean))
    return float(min(1.0, 2.0 * tail))


def shared_bits(words: Words, lag: int) -> float:
    """Number of equal bits of words `lag` apart."""
    differing = (
        np.bitwise_count(words[lag:] ^ words[:-lag])
        if hasattr(np, "bitwise_count")
        else (np.unpackbits((words[lag:] ^ words[:-lag]).view(np.uint8)))
    )
    n = 32 * (len(words) - lag)
    return _two_sided((float(differing.sum(dtype=np.int64)) - n / 2) / math.sqrt(n / 4))


def battery(words: Words) -> dict[str, float]:
    """All tests by name."""
    found = {"bit frequencies": bit_frequencies(words), "birthdays": birthday_spacings(words)}
    found |= {f"byte pairs, bit {s}": byte_pairs(words, s) for s in (0, 8, 16, 24)}
    found |= {f"runs of bit {b}": runs(words, b) for b in (0, 15, 31)}
    found |= {f"shared bits, lag {k}": shared_bits(words, k) for k in (1, 2, 4, 64, 192)}
    return found


def failures(words: Words, level: float) -> dict[str, float]:
    """The tests whose p-value lies below `level`."""
    return {name: p for name, p in battery(words).items() if p < level}
