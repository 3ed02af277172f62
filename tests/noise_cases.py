"""The noise contract written a second time, with Python's integers and numpy's float64."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
M32 = 0xFFFFFFFF
LAW_BOUND = 2e-6  # absolute, against the float64 evaluation on the same float32 u

# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M32, M32, M32, M32), (M32, M32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

Words = tuple[int, int, int, int]
Philox = Callable[[Words, tuple[int, int]], Sequence[int]]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 (Salmon et al., SC 2011, Section 3.3)."""
    l0, r0, l1, r1 = counter[2], counter[3], counter[0], counter[1]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * l1, 0xCD9E8D57 * l0
        l1, r1 = (p1 >> 32) ^ r1 ^ k0, p1 & M32
        l0, r0 = (p0 >> 32) ^ r0 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return l1, r1, l0, r0


def sample_key(seed: int, sample: int) -> int:
    """Key of a global sample, unsigned."""
    w = philox((sample & M32, sample >> 32, 0x53424D, 0), (seed & M32, seed >> 32 & M32))
    return w[0] | w[1] << 32


def signed(word: int, bits: int = 64) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def sample_words(key: int, numel: int, draw: int, stream: int) -> list[int]:
    """The words of elements 0 … numel − 1."""
    out: list[int] = []
    for j in range((numel + 3) // 4):
        out += philox((j & M32, j >> 32, draw, stream), (key & M32, key >> 32 & M32))
    return out[:numel]


def uniform(words: NDArray[np.uint32]) -> Array:
    """u(w), a float32 value held in float64."""
    wide = words.astype(np.float32).astype(np.float64)
    return (wide * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)


def normal(words: NDArray[np.uint32]) -> Array:
    """Box–Muller of words whose last dimension is a multiple of 4, in float64."""
    pairs = uniform(words).reshape(*words.shape[:-1], -1, 2)
    r = np.sqrt(-2.0 * np.log(pairs[..., 0]))
    angle = 2.0 * np.pi * pairs[..., 1]
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1).reshape(words.shape)


def known_answer_error(candidate: Philox) -> str:
    """ "" or the first published answer that `candidate` misses."""
    for counter, key, answer in KNOWN_ANSWERS:
        got = tuple(int(w) for w in candidate(counter, key))
        if got != answer:
            return f"{counter}, {key}: {[hex(w) for w in got]} is not {[hex(w) for w in answer]}"
    return ""


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter that sees these helpers."""
    here = Path(__file__).parent
    paths = [str(here), str(here / "ops"), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=env,
        cwd=here,  # which `-c` puts before the paths
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_instruction_set(code: str) -> dict[str, tuple[str, ...]]:
    """What `code` prints behind the level that it reached, for every level of this processor."""
    outputs = {}
    for level in ("portable", "avx2", "avx512"):
        reached, *lines = run_python(code, SBM_FAST_CPU=level).split("\n")
        if reached == level:  # else this processor lacks it
            outputs[level] = tuple(lines)
    return outputs
