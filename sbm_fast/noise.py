"""Counter-based noise: a function of (key of the sample, element, draw, stream), not a state.

The words of elements 4j … 4j+3 of a sample are Philox4x32-10(counter=(j_lo, j_hi, draw, stream),
key=key[sample]), so a sample's noise does not depend on the batch it stands in, on the memory
format, on threads, or on what was drawn before it. Normals are Box–Muller on uniforms
u(w) = fma(float32(w), 2⁻³², 2⁻³³); every backend stays within 2e-6 of that formula's float64 value.

Streams in use (6 and up are free for users):

======================  ======  ==========================================
name                    stream  draw
======================  ======  ==========================================
``PRIOR``               0       0
``TRAJECTORY``          1       index of the row in the plan
``PROBE``               2       Hutchinson probe, constant over a solve
``DEQUANTISATION``      3       repetition
``TRAINING``            4       global training step (perturbation);
                                repetition · T + level in DDPM's bound
``TRAINING_TIME``       5       global training step (times)
======================  ======  ==========================================
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sbm_fast.backend import choose_backend
from sbm_fast.ops import noise as ops
from sbm_fast.ops._library import has_kernels

__all__ = ["DEQUANTISATION", "PRIOR", "PROBE", "TRAINING", "TRAINING_TIME", "TRAJECTORY"]
__all__ += ["fresh_seed", "keys", "normal", "rademacher", "uniform"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPE_NAMES = ", ".join(str(dtype) for dtype in DTYPES)

PRIOR, TRAJECTORY, PROBE, DEQUANTISATION, TRAINING, TRAINING_TIME = range(6)


def fresh_seed() -> int:
    """A seed drawn from torch's default generator, so that `torch.manual_seed` governs it."""
    # On the CPU whatever the default device is: a seed on "meta" has no value.
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def keys(
    seed: int, n: int, first_sample: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The 64-bit keys of global samples first_sample … first_sample + n − 1, int64 [n].

    key[b] = first two words of Philox(counter=(b_lo, b_hi, 0x53424D, 0), key=(seed_lo, seed_hi)).

    Raises: TypeError for a seed that is no int; ValueError for a seed outside [−2⁶³, 2⁶⁴), a
    negative n or first_sample.
    """
    seed = _checked_int("seed", seed, -(2**63), 2**64)
    n = _checked_int("n", n, 0, 2**63)
    first_sample = _checked_int("first_sample", first_sample, 0, 2**63)
    out = torch.empty(n, dtype=torch.int64, device=device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    if has_kernels(out):
        ops.keys_(out, signed, first_sample)
    else:
        ops.keys_reference(out, signed, first_sample)
    return out


def normal(
    seed: int | None,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = TRAJECTORY,
    keys: Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals of `shape`, shape[0] being samples.

    Args:
        seed: the samples' keys are keys(seed, shape[0], first_sample); None draws a fresh seed.
        shape: (samples, …).
        draw, stream: which noise of these samples, each in [0, 2³²).
        keys: int64 [samples], instead of seed and first_sample.
        dtype: torch.float32, or torch.float64, bfloat16 or float16 the values are converted to.
        backend: "auto", "cuda", "triton", "cpu" or "eager" (plain torch, any device).
        out: a tensor of `shape` and one of these dtypes to fill, in any memory format in which no
            two elements share memory. It settles dtype and device.

    Raises: ValueError or TypeError naming the argument.
    """
    return _fill(
        "normal", seed, shape, draw, stream, keys, first_sample, dtype, device, backend, out
    )


def uniform(
    seed: int | None,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = TRAJECTORY,
    keys: Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Uniforms u(w) in (0, 1], element 4j+k from word k. Arguments as in `normal`."""
    return _fill(
        "uniform", seed, shape, draw, stream, keys, first_sample, dtype, device, backend, out
    )


def rademacher(
    seed: int | None,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = PROBE,
    keys: Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Signs ±1, element 4j+k from the top bit of word k. Arguments as in `normal`."""
    return _fill(
        "rademacher", seed, shape, draw, stream, keys, first_sample, dtype, device, backend, out
    )


def _fill(
    kind: str,
    seed: int | None,
    shape: Sequence[int],
    draw: int,
    stream: int,
    sample_keys: Tensor | None,
    first_sample: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    backend: str,
    out: Tensor | None,
) -> Tensor:
    shape = _checked_shape(shape)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {_DTYPE_NAMES}, got {dtype!r}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        _check_out(out, shape, dtype, device)
    if sample_keys is None:
        chosen = fresh_seed() if seed is None else seed
        sample_keys = keys(chosen, shape[0], first_sample, out.device)
    else:
        check_keys(sample_keys, shape[0], seed, first_sample)
        sample_keys = sample_keys.to(out.device).contiguous()
    draw = _checked_int("draw", draw, 0, 2**32)
    stream = _checked_int("stream", stream, 0, 2**32)
    fill = _implementation(kind, out, backend)
    if out.device.type == "meta":
        raise ValueError("device: nothing can be drawn on meta")
    fill(out, sample_keys, draw, stream)
    return out


def _check_out(
    out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None
) -> None:
    """ValueError or TypeError unless `out=` can be filled and agrees with the other arguments."""
    if not isinstance(out, Tensor) or out.dtype not in DTYPES:
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"out: expected a tensor of one of {_DTYPE_NAMES}, got {got}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
    if any(size > 1 and stride == 0 for size, stride in zip(shape, out.stride(), strict=True)):
        raise ValueError(
            f"out: expected elements that don't share memory, got strides {tuple(out.stride())} "
            f"for shape {shape}"
        )
    # float32 is the default and cannot be told from a dtype that was asked for.
    if dtype not in (torch.float32, out.dtype):
        raise ValueError(f"dtype: expected that of out, {out.dtype}, got {dtype}")
    if device is not None:
        asked = torch.device(device)
        if asked.type != out.device.type or asked.index not in (None, out.device.index):
            raise ValueError(f"device: expected that of out, {out.device}, got {asked}")


def check_keys(sample_keys: Tensor, samples: int, seed: int | None, first_sample: int) -> None:
    """ValueError or TypeError unless `keys=` is int64 [samples] and stands alone."""
    if seed is not None or first_sample != 0:
        raise ValueError("keys: excludes seed and first_sample; pass either keys or those")
    if not isinstance(sample_keys, Tensor) or sample_keys.dtype != torch.int64:
        got = sample_keys.dtype if isinstance(sample_keys, Tensor) else type(sample_keys).__name__
        raise TypeError(f"keys: expected an int64 tensor, got {got}")
    if tuple(sample_keys.shape) != (samples,):
        raise ValueError(f"keys: expected shape ({samples},), got {tuple(sample_keys.shape)}")


def _implementation(kind: str, out: Tensor, backend: str) -> Callable[..., None]:
    if isinstance(backend, str) and backend == "auto":
        return ops.OPS[kind] if has_kernels(out) else ops.REFERENCES[kind]
    name = choose_backend(backend, out.device).name
    if name == "triton":
        from sbm_fast import kernels

        op: Callable[..., None] = getattr(kernels, f"{kind}_")
        return op
    return ops.REFERENCES[kind] if name == "eager" else ops.OPS[kind]


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape: expected integers (samples, …), got {shape!r}") from None
    if not sizes or min(sizes) < 0:
        raise ValueError(f"shape: expected (samples, …) with sizes ≥ 0, got {shape!r}")
    return sizes


def _checked_int(name: str, value: Any, low: int, high: int) -> int:
    kind = type(value).__name__
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {kind}")
    # An int that torch.compile traces is a symbol: it passes isinstance but not operator.index.
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected an int, got {kind}") from None
    if not low <= value < high:
        raise ValueError(f"{name}: expected a value in [{low}, {high}), got {value}")
    return int(value)
