"""Bits per dimension of the held-out digits under the shipped network, with error bars."""

import math
from typing import Any

import torch
from torch import Tensor

import sbm_fast
from benchmarks.likelihood_models import LEVELS, shipped_digits
from sbm_fast.data import digits

PROBES = 8
DRAWS = 4
SEED = 0


def record(samples: int | None = None) -> dict[str, Any]:
    """Estimated and exact traces on the same dequantised digits; all of them for None.

    The dequantisation is the same for equal seeds, so that the difference of the two is the
    probes' alone, and its spread over the digits says whether the standard errors are right.
    """
    x = digits().held_out[:samples]
    network = shipped_digits().network

    def bits(**options: Any) -> sbm_fast.BitsResult:
        return sbm_fast.bits_per_dim(
            network, sbm_fast.VPSDE(), x, levels=LEVELS, seed=SEED, batch_size=64, **options
        )

    estimated, exact = bits(probes=PROBES, exact=False), bits(exact=True)
    averaged = bits(draws=DRAWS, probes=1, exact=False)
    return {
        "samples": len(x),
        "levels": LEVELS,
        "rows": [
            _row(f"Hutchinson, {PROBES} probes", estimated),
            _row("exact trace", exact),
            _row(f"Hutchinson, 1 probe, {DRAWS} dequantisations", averaged),
        ],
        "difference": difference(estimated, exact),
    }


def difference(estimated: sbm_fast.BitsResult, exact: sbm_fast.BitsResult) -> dict[str, float]:
    """Estimated minus exact bits per dimension, sample by sample.

    Returns: its mean; the standard error of that from the standard errors of the samples; and the
    root mean square of difference/(standard error), for which Student's t with K − 1 degrees of
    freedom has √((K−1)/(K−3)).
    """
    off = estimated.bits_per_dim - exact.bits_per_dim
    error = _mean_error(estimated.stderr)
    return {
        "mean": float(off.mean()),
        "stderr": error,
        "rms_in_stderrs": float((off / estimated.stderr).square().mean().sqrt()),
        "expected_rms": math.sqrt((PROBES - 1) / (PROBES - 3)),
    }


def _mean_error(stderr: Tensor) -> float:
    """Standard error of the mean of independent values with these standard errors."""
    return float(torch.linalg.vector_norm(stderr)) / len(stderr)


def _row(name: str, found: sbm_fast.BitsResult) -> dict[str, Any]:
    return {
        "name": name,
        "mean": found.mean,
        "mean_stderr": found.mean_stderr,
        "median_stderr": float(found.stderr.median()),
        "nfe_mean": float(found.nfe.double().mean()),
        "nfe_max": int(found.nfe.max()),
        "seconds": found.seconds,
    }
