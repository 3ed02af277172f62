"""The plan: a sampler as a table with one row per network evaluation.

A row maps the state x, the network's output F at that state, fresh noise z and K registers H_k to

    x'   = a x + b F + c D + d z + Σ_k h_k H_k          (output 0, the new state)
    H_s  = a x + b F + c D + d z + Σ_k h_k H_k          (output 1, written to register s = ``slot``)
    D    = clamp(p x + q F, ±L)

A row reads everything before it writes. The first one or two rows are start rows: they evaluate no
network (prior noise or a given start; and noise that a method adds before its first evaluation).
Everything is float64 on the host; :meth:`Plan.pack` gives the table that the kernels read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch import device as torch_device
    from torch import dtype as torch_dtype

    Array = NDArray[np.float64]
    IntArray = NDArray[np.int64]

X, F, D, Z, H0 = range(5)
"""Columns of ``Plan.coef``: state, network output, denoised estimate, noise, first register."""

SOURCES = ("x", "F", "D", "z")
NORMS = ("none", "batch_mean", "per_sample", "sqrt_d")
"""Values of ``Plan.norm``: how a Langevin row finds its step size (0: an ordinary row)."""

TAIL_LANES = ("p", "q", "L", "c_in_next", "label_next", "guidance", "eps_scale", "p_s", "q_s")
"""Lanes of :meth:`Plan.pack` behind the 2·(4 + K) coefficients."""

FIELD_LANES = ("slot", "stream", "draw", "norm")
"""Lanes of the integer table of :meth:`Plan.pack`."""


def _unset() -> Array:
    return np.empty(0)


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler written out: R rows, K registers. Immutable; checked when it is made.

    Attributes:
        method: name of the method that wrote the table.
        description: what it was made for (SDE, prediction, options), for printing and saving.
        coef: [R, 2, 4 + K] outputs {x', register write} × sources {x, F, D, z, H_0 … H_{K-1}}.
            A coefficient 0 means that the source is not read (0·NaN never happens).
        slot: [R] register that the row writes, −1 none.
        denoiser: [R, 3] p, q, L of D = clamp(p x + q F, ±L); L = inf does not clamp.
        time: [R] time of the evaluation under the run's SDE, NaN for start rows.
        label: [R] what the network gets as its time input, 0 for start rows.
        c_in: [R] the network's input is c_in · x, 0 for start rows.
        evaluates: [R] whether the row evaluates the network at its x (before the update).
        stream, draw: [R] which noise z is (see ``sbm_fast.noise``).
        guidance: [R] factor on (w − 1) where classifier-free guidance is used.
        norm: [R] index into :data:`NORMS`. A row ≠ 0 is x' = x + ε s + √(2ε) z with a step size ε
            that depends on the data; its coef is 1 on x and 0 elsewhere.
        langevin: [R, 3] (2 α r², p_s, q_s): ε = langevin[0]·(‖z‖ / ‖s‖)², s = p_s x + q_s F.
        marginal: [R, 2] (m, σ) of the evaluated state in the state's coordinate,
            x = m x_0 + σ ε; (1, 0) for start rows. Used for moments, previews and κ.
        start_scale: the state is start_scale · x_init (1, or 1/m when the state is x/m).
        log_std: [R, 2] (l_0, l_1) of a learned variance: the row's z is multiplied by
            exp((1 − v) l_0 + v l_1) with v from the network, per element; (0, 0) leaves z alone.
        threshold: [R, 3] (quantile, minimum, maximum) of a dynamic threshold on D, see
            ``methods.DynamicThreshold``; (0, 0, 0) for none.

    The last two are not the step's: ``sbm_fast.row_inputs`` makes them of the network's output
    before the row reads it.

    Raises:
        ValueError: naming the field that does not hold together (:meth:`check`).
        TypeError: naming the field that holds another kind of value.
    """

    method: str
    description: dict[str, str | float | int]
    coef: Array
    slot: IntArray
    denoiser: Array
    time: Array
    label: Array
    c_in: Array
    evaluates: NDArray[np.bool_]
    stream: IntArray
    draw: IntArray
    guidance: Array
    norm: IntArray
    langevin: Array
    marginal: Array
    start_scale: float = 1.0
    log_std: Array = field(default_factory=_unset)
    threshold: Array = field(default_factory=_unset)

    TRAILING: ClassVar[dict[str, tuple[int, ...]]] = {
        "slot": (),
        "denoiser": (3,),
        "time": (),
        "label": (),
        "c_in": (),
        "evaluates": (),
        "stream": (),
        "draw": (),
        "guidance": (),
        "norm": (),
        "langevin": (3,),
        "marginal": (2,),
        "log_std": (2,),
        "threshold": (3,),
    }
    _INTEGER: ClassVar[tuple[str, ...]] = ("slot", "stream", "draw", "norm")

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[type | tuple[type, ...], str]] = {
            "method": (str, "a str"),
            "description": (Mapping, "a dict"),
            "start_scale": ((int, float, np.integer, np.floating), "a positive number"),
        }
        for name, (kind, expected) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
        for name in self.arrays():
            array = self._converted(name, getattr(self, name))
            if name in ("log_std", "threshold") and array.size == 0:
                array = np.zeros((len(self.coef), *self.TRAILING[name]))
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "description", dict(self.description))
        object.__setattr__(self, "start_scale", float(self.start_scale))
        self.check()

    def _converted(self, name: str, value: Any) -> NDArray[Any]:
        """A copy of the values as the field holds them; an error rather than a silent rounding."""
        kind: Any = np.float64
        expected, kinds = "real numbers", "iuf"
        if name in self._INTEGER:
            kind, expected = np.int64, "integers"
        elif name == "evaluates":
            kind, expected, kinds = np.bool_, "booleans", "b"
        try:
            given = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: expected an array of {expected} ({error})") from error
        if given.dtype.kind not in kinds:
            raise TypeError(f"{name}: expected {expected}, got an array of {given.dtype}")
        with np.errstate(invalid="ignore", over="ignore"):
            array = np.array(given, dtype=kind, order="C")
        if name in self._INTEGER and not np.array_equal(array, given):
            wrong = given[array != given].flat[0]
            raise ValueError(f"{name}: expected integers, got {wrong}")
        return array

    @classmethod
    def arrays(cls) -> tuple[str, ...]:
        """Names of the fields that hold one entry a row."""
        return ("coef", *cls.TRAILING)

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return int(self.coef.shape[0])

    @property
    def registers(self) -> int:
        """Number of registers K."""
        return int(self.coef.shape[2]) - 4

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return int(self.evaluates.sum())

    def check(self) -> None:
        """Raise ValueError, naming the field, unless the table holds together.

        Shapes and finiteness; one or two start rows, at the start only, that read neither network
        nor registers; every register written before it is read; Langevin rows in their own form.
        """
        from sbm_fast import plan_check

        plan_check.check(self)

    def gaussian(
        self, data_mean: float, data_std: float, *, start: tuple[float, float] | None = None
    ) -> tuple[Array, Array]:
        """Mean and standard deviation [R] of x after each row, exactly, for Gaussian data.

        The data are N(data_mean, data_std²) per coordinate and the network is perfect. ``start`` is
        the (mean, std) of the given start for plans that begin from one.

        Raises:
            ValueError: for plans with data-dependent Langevin norms, clamped or thresholded rows or
                a learned variance (not affine), with noise that is used twice, or with a given
                start of unknown law.
        """
        from sbm_fast import plan_moments  # it imports the columns from here

        return plan_moments.gaussian(self, data_mean, data_std, start)

    @cached_property
    def kappa(self) -> Array:
        """[R] cancellation κ = Σ_j |c_j| rms(v_j) / rms(x') of each row.

        Taken from Gaussian data with mean 0 and std ½. The relative error of the network's
        dtype, times κ, is what arrives in x'.
        """
        from sbm_fast import plan_moments

        return plan_moments.kappa(self)

    def pack(self, dtype: torch_dtype, device: torch_device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The table as the kernels read it.

        Returns:
            coef: [R, 2, 2(4 + K) + 9] in ``dtype``: [:, 0] the rounded value, [:, 1] what rounding
                lost (0 where the value is not finite). Lanes: sources of x', sources of the
                register write, then :data:`TAIL_LANES`. ``c_in_next`` and ``label_next`` belong to
                the next row's evaluation, 0 where there is none.
            field: int32 [R, 4], lanes :data:`FIELD_LANES`.

        Raises:
            ValueError: when dtype is neither torch.float32 nor torch.float64.
        """
        import torch

        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        after = np.zeros((self.rows, 2))
        after[:-1, 0] = self.c_in[1:]
        after[:-1, 1] = self.label[1:]
        tail = (self.denoiser, after, self.guidance[:, None], self.langevin)
        value = np.concatenate([self.coef[:, 0], self.coef[:, 1], *tail], axis=1)
        kind = np.float32 if dtype == torch.float32 else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            high = value.astype(kind)
            low = np.where(np.isfinite(high), value - high, 0.0).astype(kind)
        field = np.stack([getattr(self, name) for name in FIELD_LANES], axis=1).astype(np.int32)
        coef = torch.from_numpy(np.stack([high, low], axis=1))
        return coef.to(device), torch.from_numpy(field).to(device)

    def difference(self, other: Plan) -> str:
        """The first difference from another plan in words, "" when the tables are equal.

        Compares what runs (all arrays and start_scale), not method name and description.
        """
        from sbm_fast import plan_text

        return plan_text.difference(self, other)

    def __str__(self) -> str:
        from sbm_fast import plan_text

        return plan_text.text(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to an .npz file (no pickles) at exactly ``path``."""
        from sbm_fast import plan_file

        plan_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by :meth:`save`; the table is checked again.

        Raises:
            ValueError: naming ``path`` when the file is no plan, of another format, or holds a
                table that fails the check.
        """
        from sbm_fast import plan_file

        return plan_file.load(path)
