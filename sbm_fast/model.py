"""`ScoreModel`: a network, what it predicts, how it takes time, and its training SDE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbm_fast import parameterization
from sbm_fast.ladder import Ladder
from sbm_fast.parameterization import Affine
from sbm_fast.process import SDE, TOLERANCE, count, finite, namespace
from sbm_fast.sde import as_sde

if TYPE_CHECKING:
    from torch import Tensor

    from sbm_fast.process import Array

    TimeLabel = str | Callable[[Array], Any]

VARIANCES = (None, "learned_range")
"""What a network says about the variance of a step."""

TIMES = ("t", "999t", "index", "sigma", "log_sigma", "edm")


@dataclass(frozen=True)
class Match:
    """One evaluation of a network at time t of a run: what it is fed and what its output means.

    Attributes:
        time: the time of the network's own SDE with the same σ/m.
        label: the time input that the network gets.
        c_in: it is fed c_in · (state of the run).
        denoiser, score, noise: D, ∇ log p and ε as forms p·x + q·F of the run's state x and the
            output F. The score is that of the run's state.
        m, sigma: the run's state is m x_0 + σ ε.
    """

    time: float
    label: float
    c_in: float
    denoiser: Affine
    score: Affine
    noise: Affine
    m: float
    sigma: float


class ScoreModel:
    """A network with everything that a sampler has to know about it.

    Args:
        net: callable (x [B, ...], label [B], **cond) -> tensor like x.
        predicts: "score", "eps", "x0", "v" or "edm", see `sbm_fast.parameterization`.
        time: the label that the network takes, at time t of its own SDE: "t", "999t" (999·t, as
            score_sde's VP networks), "index" (t of a ladder), "sigma" (nsr = σ/m), "log_sigma"
            (ln nsr), "edm" (¼ ln nsr, Karras et al. 2022, Table 1), or a function of
            t (float64 [n]) that gives the labels.
        sde: the SDE it was trained under; None: the one that it is run under.
        sample_shape: shape of a sample without the batch.
        sigma_data: standard deviation of the data, for "edm".
        null_cond: the conditioning that stands for "none" in guidance.
        variance: "learned_range" for a network whose output has twice the channels (dimension 1),
            first what it predicts, then v ∈ [−1, 1] that interpolates the logarithms of the
            smallest and largest variance of a step (Nichol & Dhariwal 2021, eq. 15). Method "ddpm"
            reads v, all others the first half only. None: the output is shaped like x.

    Raises:
        TypeError: net is not callable (or a class), sde is no SDE, sample_shape or null_cond is of
            another type.
        ValueError: predicts, time or variance is unknown, "index" without a ladder or "999t" on
            one, sigma_data ≤ 0, a dimension < 1.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        predicts: str = "score",
        time: TimeLabel = "t",
        sde: object = None,
        sample_shape: Sequence[int] | None = None,
        sigma_data: float = 0.5,
        null_cond: Mapping[str, Any] | None = None,
        variance: str | None = None,
    ) -> None:
        if not callable(net) or isinstance(net, type):
            raise TypeError(f"net: expected a callable (x, label) -> tensor, got {net!r}")
        if null_cond is not None and not isinstance(null_cond, Mapping):
            raise TypeError(f"null_cond: expected a dict of keyword arguments, got {null_cond!r}")
        self.net = net
        self.predicts = parameterization.check_prediction(predicts)
        self.time = _checked_time(time)
        self.sde = None if sde is None else as_sde(sde)
        self.sample_shape = None if sample_shape is None else _checked_shape(sample_shape)
        self.sigma_data = finite("sigma_data", sigma_data, above=0)
        self.null_cond = null_cond
        if variance is not None and (not isinstance(variance, str) or variance not in VARIANCES):
            raise ValueError(f"variance: expected one of {VARIANCES}, got {variance!r}")
        self.variance = variance
        if self.sde is not None:
            _check_time_and_sde(self.time, self.sde)

    def __call__(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        """The network's raw output net(x, label, **cond); x is already scaled by c_in."""
        return self.net(x, label, **cond)

    def __repr__(self) -> str:
        return (
            f"ScoreModel({type(self.net).__name__}, predicts={self.predicts!r}, "
            f"time={self.time!r}, sde={self.sde!r}, sample_shape={self.sample_shape!r}, "
            f"sigma_data={self.sigma_data!r}"
            + (f", variance={self.variance!r})" if self.variance else ")")
        )

    def match(self, sde: SDE, t: float, coordinate: str = "x") -> Match:
        """How to evaluate the network at time t of ``sde``.

        Two states with the same σ/m hold the same information: the run's x = m x_0 + σ ε and the
        network's x_net = m_net x_0 + σ_net ε differ by the factor k = m_net/m only. So D and ε take
        (p, q) of the network's forms to (p k, q), the score ∇ log p to (k p k, k q), and c_in
        becomes c_in k. Under the network's own SDE k is exactly 1 and the time is t.

        Args:
            sde: the SDE of the run.
            t: its time.
            coordinate: "x", or "x/m" for a run whose state is x/m (then m = 1, σ = nsr).

        Raises:
            TypeError: sde is no SDE, t is not a number.
            ValueError: coordinate is unknown; t lies outside (0, sde.t_max] or its σ/m outside the
                range that the network was trained in; σ(t) = 0; "index" without a ladder or "999t"
                on one.
        """
        if coordinate not in ("x", "x/m"):
            raise ValueError(f"coordinate: expected 'x' or 'x/m', got {coordinate!r}")
        run, own = as_sde(sde), self.sde
        t = _checked_t(run, t)
        nsr, m = float(run.nsr(t)), float(run.mean_scale(t))
        if nsr == 0:
            raise ValueError(f"t: there is no noise at t = {t:g} of {type(run).__name__} (σ/m = 0)")
        if own is None or own == run:
            own, t_net, m_net, sigma_net = run, t, m, float(run.std(t))
        else:
            t_net = _time_in(own, t, nsr)
            m_net = float(own.mean_scale(t_net))
            sigma_net = m_net * nsr
        m_state, sigma = (m, float(run.std(t))) if coordinate == "x" else (1.0, nsr)
        return self._match(own, t_net, nsr, (m_net, sigma_net), (m_state, sigma))

    def _match(
        self,
        own: SDE,
        t_net: float,
        nsr: float,
        net: tuple[float, float],
        state: tuple[float, float],
    ) -> Match:
        args = (self.predicts, *net, self.sigma_data)
        k = net[0] / state[0]
        d, s, e = (
            form(*args)
            for form in (
                parameterization.denoiser,
                parameterization.score,
                parameterization.noise,
            )
        )
        return Match(
            time=t_net,
            label=self._label(own, t_net, nsr),
            c_in=parameterization.input_scale(*args) * k,
            denoiser=Affine(d.x * k, d.F),
            score=Affine(k * s.x * k, k * s.F),
            noise=Affine(e.x * k, e.F),
            m=state[0],
            sigma=state[1],
        )

    def _label(self, own: SDE, t: float, nsr: float) -> float:
        if self.sde is None:
            _check_time_and_sde(self.time, own)
        if callable(self.time):
            return float(self.labels(np.array([t]), np.array([nsr]))[0])
        return float(self.labels(np.float64(t), np.float64(nsr)))

    def labels(self, t: Any, nsr: Any) -> Any:
        """What the network gets as its time at times t of its own SDE, where σ/m is nsr.

        Args:
            t, nsr: float64 of one shape, arrays or tensors; tensors stay on their device, but for a
                `time` that is a function: the host calls it, with all of them in one dimension.

        Raises: ValueError naming ``time`` when a function gives anything but n finite numbers.
        """
        if callable(self.time):
            return self._own_labels(t)
        if self.time in ("t", "index"):
            return t
        if self.time == "999t":
            return 999 * t
        if self.time == "sigma":
            return nsr
        log_nsr = namespace(nsr).log(nsr)
        return log_nsr if self.time == "log_sigma" else 0.25 * log_nsr

    def _own_labels(self, t: Any) -> Any:
        xp = namespace(t)
        times = (t if xp is np else t.cpu().numpy()).reshape(-1)
        labels = np.asarray(self.time(times), dtype=np.float64)  # type: ignore[operator]
        if labels.size != times.size or not np.isfinite(labels).all():
            at = ", ".join(f"{t:g}" for t in times[:3]) + (", …" if times.size > 3 else "")
            raise ValueError(f"time: expected one finite label each at t = {at}, got {labels!r}")
        labels = labels.reshape(t.shape)
        return labels if xp is np else xp.as_tensor(labels, device=t.device)


def as_score_model(model: object, sde: object) -> ScoreModel:
    """A `ScoreModel` from what a user has.

    - a `ScoreModel` passes;
    - an object with an attribute ``predicts`` (this package's networks and adapters) is wrapped
      with that and with those of ``time``, ``sde``, ``sample_shape``, ``sigma_data``,
      ``null_cond`` and ``variance`` that it has;
    - any other callable is taken as the score (x, t) -> ∇ log p_t(x) under ``sde``.

    Raises: TypeError naming ``model`` for anything else; the errors of `ScoreModel`.
    """
    if isinstance(model, ScoreModel):
        return model
    if not callable(model) or isinstance(model, type):
        raise TypeError(
            "model: expected a ScoreModel, a network that knows what it predicts, or a callable "
            f"(x, t) -> score, got {repr(model)[:80]}"
        )
    if not hasattr(model, "predicts"):
        return ScoreModel(model, predicts="score", time="t", sde=as_sde(sde))
    names = ("predicts", "time", "sde", "sample_shape", "sigma_data", "null_cond", "variance")
    return ScoreModel(
        model, **{name: getattr(model, name) for name in names if hasattr(model, name)}
    )


def _checked_t(run: SDE, t: object) -> float:
    time = finite("t", t)
    if not 0 <= time <= run.t_max * (1 + TOLERANCE):
        raise ValueError(
            f"t: {type(run).__name__} runs over [0, {run.t_max:g}] "
            f"(σ/m in [{run.nsr_range[0]:.6g}, {run.nsr_range[1]:.6g}]), got t = {time:g}"
        )
    return time


def _time_in(own: SDE, t: float, nsr: float) -> float:
    low, high = own.nsr_range
    if not low * (1 - TOLERANCE) <= nsr <= high * (1 + TOLERANCE):
        raise ValueError(
            f"t: t = {t:g} has σ/m = {nsr:.6g}, outside the range [{low:.6g}, {high:.6g}] that the "
            f"network was trained in ({type(own).__name__}); choose t_min and t_max inside it"
        )
    return float(own.time_at_nsr(nsr))


def _checked_time(time: TimeLabel) -> TimeLabel:
    if not callable(time) and not (isinstance(time, str) and time in TIMES):
        known = ", ".join(map(repr, TIMES))
        raise ValueError(f"time: expected one of {known} or a function of t, got {time!r}")
    return time


def _check_time_and_sde(time: TimeLabel, sde: SDE) -> None:
    ladder = isinstance(sde, Ladder)
    if time == "index" and not ladder:
        raise ValueError(f"time: 'index' needs a ladder, the network's SDE is {sde!r}")
    if time == "999t" and ladder:
        raise ValueError(f"time: '999t' needs a continuous SDE (a ladder has 'index'), got {sde!r}")


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, (str, int)) or not hasattr(shape, "__iter__"):
        raise TypeError(f"sample_shape: expected a tuple of sizes, got {shape!r}")
    return tuple(count("sample_shape", size) for size in shape)
