"""Discrete ladders of noise levels: NCSN's σ_i and DDPM's β_i. Float64; imports no torch."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from sbm_fast.process import SDE, count, finite, namespace, positive_table

if TYPE_CHECKING:
    from sbm_fast.process import Array

_SHOWN = 16
_SNAP = 1e-11


class Ladder(SDE):
    """N discrete levels; t is the index of a level, 0 … N−1, and the noise grows with it.

    m, σ and nsr are exact at integers. Between them ln nsr is linear in t, so that a network
    trained on a ladder can be matched at any noise level inside it.

    Attributes:
        levels: N.
    """

    def __init__(self, mean_scale: Array, std: Array, nsr: Array) -> None:
        self._tables = {"m": mean_scale, "σ": std, "nsr": nsr}
        self._log_nsr = np.log(nsr)
        self._index = np.arange(len(nsr), dtype=np.float64)
        self._on_device: dict[Any, Any] = {}

    @property
    def levels(self) -> int:
        """The number of levels N."""
        return len(self._index)

    @property
    def t_min(self) -> float:
        """0, the level with the least noise."""
        return 0.0

    @property
    def t_max(self) -> float:
        """N − 1, the level with the most noise."""
        return float(self.levels - 1)

    @abstractmethod
    def _scale_at(self, nsr: Array) -> Array:
        """m of a level between two others."""

    def _lookup(self, table: str, t: Array) -> Array:
        nearest = np.clip(np.rint(t), 0, self.levels - 1)
        nsr = np.exp(np.interp(t, self._index, self._log_nsr))
        m = self._scale_at(nsr)
        between = {"m": m, "σ": m * nsr, "nsr": nsr}[table]
        return np.where(nearest == t, self._tables[table][nearest.astype(np.int64)], between)

    def _mean_scale(self, t: Array) -> Array:
        return self._lookup("m", t)

    def _std(self, t: Array) -> Array:
        return self._lookup("σ", t)

    def _nsr(self, t: Array) -> Array:
        return self._lookup("nsr", t)

    def _time_at_nsr(self, r: Array) -> Array:
        xp = namespace(r)
        t = self._between(xp.log(r))
        # ln may round differently in the table and here: a level's own nsr gives its index.
        nearest = xp.round(t)
        return xp.where(xp.abs(t - nearest) < _SNAP, nearest, t)

    def _between(self, log_nsr: Any) -> Any:
        """The index, linear in ln nsr between two levels."""
        xp = namespace(log_nsr)
        if xp is np:
            return np.asarray(np.interp(log_nsr, self._log_nsr, self._index))
        if self.levels == 1:
            return xp.zeros_like(log_nsr)
        table = self._on_device.get(log_nsr.device)
        if table is None:
            table = xp.as_tensor(self._log_nsr, device=log_nsr.device)
            self._on_device[log_nsr.device] = table
        below = (xp.searchsorted(table, log_nsr, right=True) - 1).clip(0, self.levels - 2)
        share = (log_nsr - table[below]) / (table[below + 1] - table[below])
        return below + share.clip(0.0, 1.0)

    def level(self, r: Any) -> tuple[Any, Any]:
        """(t, m) where σ/m is r, see `SDE.level`."""
        return self._time_at_nsr(r), self._scale_at(r)

    def _drift_coef(self, t: Array) -> Array:
        raise self._no_coefficient("drift_coef")

    def _diffusion(self, t: Array) -> Array:
        raise self._no_coefficient("diffusion")

    def _no_coefficient(self, name: str) -> TypeError:
        return TypeError(
            f"{name}: {type(self).__name__} is a discrete ladder of {self.levels} levels and has "
            "neither drift nor diffusion; use a method for ladders (reverse_diffusion, ancestral, "
            "ddim, ald) or a continuous SDE"
        )

    @abstractmethod
    def _parameter(self) -> tuple[str, Array]:
        """Name and value of the constructor's argument."""

    def __repr__(self) -> str:
        """The constructor's call; a long table is shown by its ends."""
        name, table = self._parameter()
        shown = [repr(float(v)) for v in table]
        if len(shown) > _SHOWN:
            shown = [*shown[:2], f"… {len(shown)} levels …", *shown[-2:]]
        return f"{type(self).__name__}({name}=[{', '.join(shown)}])"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ladder) or type(other) is not type(self):
            return NotImplemented
        return np.array_equal(self._parameter()[1], other._parameter()[1])

    def __hash__(self) -> int:
        return hash((type(self), self._parameter()[1].tobytes()))


class NCSNLadder(Ladder):
    """Noise levels σ_0 < … < σ_{N−1} with m = 1 (Song & Ermon 2019, 2020: NCSN, NCSNv2).

    The papers number the levels from the largest down; here index 0 is the smallest, so that noise
    grows with t as in every other SDE.

    Args:
        sigmas: the levels in any order, in units of the data.

    Attributes:
        sigmas: float64 [N], ascending.

    Raises: TypeError, ValueError unless the levels are finite, positive and all different.
    """

    def __init__(self, sigmas: Any) -> None:
        ordered = np.sort(positive_table("sigmas", sigmas))
        if not (np.diff(ordered) > 0).all():
            raise ValueError("sigmas: expected levels that are all different")
        ordered.setflags(write=False)
        self.sigmas: Array = ordered
        super().__init__(np.ones_like(ordered), ordered, ordered)

    @classmethod
    def geometric(cls, sigma_max: float, sigma_min: float, levels: int) -> NCSNLadder:
        """N levels with a constant ratio σ_{i+1}/σ_i (Song & Ermon 2019, sec. 4.1).

        NCSNv2 (technique 1) takes for sigma_max the largest distance between two samples of the
        data, see `largest_pairwise_distance`.

        Raises: TypeError, ValueError unless 0 < sigma_min < sigma_max and levels ≥ 2.
        """
        high = finite("sigma_max", sigma_max, above=0)
        low = finite("sigma_min", sigma_min, above=0)
        if high <= low:
            raise ValueError(f"sigma_max: expected more than sigma_min = {low:g}, got {high:g}")
        return cls(np.geomspace(low, high, count("levels", levels, least=2)))

    @property
    def prior_std(self) -> float:
        """The largest σ."""
        return float(self.sigmas[-1])

    def _scale_at(self, nsr: Array) -> Array:
        return namespace(nsr).ones_like(nsr)

    def _parameter(self) -> tuple[str, Array]:
        return "sigmas", self.sigmas


class DDPMSchedule(Ladder):
    """DDPM's chain x_i = √(1−β_i) x_{i−1} + √β_i ε (Ho et al. 2020, eq. 2 and 4).

        ᾱ_i = Π_{j≤i} (1 − β_j),   m = √ᾱ,   σ = √(1 − ᾱ),   between levels m = 1/√(1 + nsr²)

    Index i is the paper's t − 1. ᾱ is summed as logarithms, so 1 − ᾱ keeps its digits where β is
    small.

    Args:
        betas: β_0 … β_{N−1}, each in (0, 1).

    Attributes:
        betas, alphas_cumprod: float64 [N].

    Raises: TypeError, ValueError for β outside (0, 1). β = 1 would make the last signal zero
        (ᾱ = 0, "zero terminal SNR"), where neither score nor ε determine x_0.
    """

    def __init__(self, betas: Any) -> None:
        if np.any(np.asarray(betas) == 1):
            raise ValueError("betas: β = 1 gives a level without signal (ᾱ = 0), nsr is infinite")
        self.betas: Array = positive_table("betas", betas, below=1)
        log_alpha = np.cumsum(np.log1p(-self.betas), dtype=np.longdouble).astype(np.float64)
        self.alphas_cumprod: Array = np.exp(log_alpha)
        if log_alpha[-1] < -700:
            raise ValueError(f"betas: ᾱ falls to {self.alphas_cumprod[-1]:g}, nsr is infinite")
        self.alphas_cumprod.setflags(write=False)
        super().__init__(
            np.exp(0.5 * log_alpha),
            np.sqrt(-np.expm1(log_alpha)),
            np.sqrt(np.expm1(-log_alpha)),
        )
        if not (np.diff(self._log_nsr) > 0).all():
            raise ValueError("betas: too small, two levels have the same ᾱ in float64")

    @classmethod
    def linear(
        cls, levels: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> DDPMSchedule:
        """β_i linear from beta_min to beta_max (Ho et al. 2020, sec. 4)."""
        low, high = finite("beta_min", beta_min, above=0), finite("beta_max", beta_max, above=0)
        return cls(np.linspace(low, high, count("levels", levels)))

    @classmethod
    def cosine(
        cls, levels: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> DDPMSchedule:
        """Cosine schedule (Nichol & Dhariwal 2021, eq. 17).

            β_i = min(1 − f(i+1)/f(i), max_beta),   f(i) = cos²((i/N + s)/(1 + s) · π/2)

        with s = ``offset``, written as sin(b−a) sin(b+a) / cos²a for the angles a of i, b of i+1.
        """
        n, s = count("levels", levels), finite("offset", offset)
        if s < 0:
            raise ValueError(f"offset: expected a number ≥ 0, got {offset!r}")
        if not 0 < finite("max_beta", max_beta) < 1:
            raise ValueError(f"max_beta: expected a number in (0, 1), got {max_beta!r}")
        angle = (np.arange(n + 1) / n + s) / (1 + s) * (math.pi / 2)
        a, b = angle[:-1], angle[1:]
        step = math.pi / 2 / (n * (1 + s))
        return cls(np.minimum(math.sin(step) * np.sin(a + b) / np.cos(a) ** 2, max_beta))

    @property
    def prior_std(self) -> float:
        """1."""
        return 1.0

    def _scale_at(self, nsr: Array) -> Array:
        return 1 / namespace(nsr).sqrt(1 + nsr**2)

    def _parameter(self) -> tuple[str, Array]:
        return "betas", self.betas


def largest_pairwise_distance(data: Any, *, chunk: int = 1024) -> float:
    """max_ij ‖x_i − x_j‖₂: NCSNv2's choice of σ_max (Song & Ermon 2020, technique 1).

    Distances come block by block from inner products, in float64 and about the data's mean; the
    farthest pair of each block is then measured directly. Work n²·d/2, memory chunk² + 2·chunk·d.

    Args:
        data: [n, ...], numpy or torch on any device, n ≥ 2.
        chunk: samples in a block.

    Raises: TypeError, ValueError for fewer than two samples, for values that are not real or not
        finite, and for chunk < 1.
    """
    chunk = count("chunk", chunk)
    shape = np.shape(data)
    if len(shape) < 1 or shape[0] < 2:
        raise ValueError(f"data: expected at least two samples [n, ...], got {tuple(shape)}")
    starts = range(0, shape[0], chunk)
    mean = sum(_block(data, i, chunk).sum(axis=0) for i in starts) / shape[0]
    largest = 0.0
    for i in starts:
        a = _block(data, i, chunk) - mean
        for j in range(i, shape[0], chunk):
            b = a if i == j else _block(data, j, chunk) - mean
            squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * (a @ b.T)
            row, column = np.unravel_index(np.argmax(squares), squares.shape)
            largest = max(largest, float(np.linalg.norm(a[row] - b[column])))
    return largest


def _block(data: Any, start: int, size: int) -> Array:
    rows = data[start : start + size]
    if hasattr(rows, "detach"):
        rows = rows.detach().cpu().double().numpy()
    block = np.asarray(rows)
    if block.dtype.kind not in "iufb":
        raise TypeError(f"data: expected real numbers, got {block.dtype}")
    block = block.reshape(len(block), -1).astype(np.float64)
    if not np.isfinite(block).all():
        raise ValueError("data: expected finite numbers")
    return block
