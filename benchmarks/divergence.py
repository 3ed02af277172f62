"""Measures how far the estimators of the divergence are off on the digits network's own Jacobians.

    python -m benchmarks.divergence          all of it, ten minutes on two cores; keeps the record
    python -m benchmarks.divergence --quick  few images and probes; prints, records nothing

Held-out digits are carried along the probability flow from σ/m = 0.003 to 30, and the Jacobian J of
the network by its input is taken whole at every point. Each estimator then sees these matrices with
the probes of many keys, constant along a trajectory. Nothing here depends on the machine's speed.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks.checkout import ROOT
from benchmarks.machine import facts, require_compiled
from sbm_fast import noise
from sbm_fast.backend import choose_backend
from sbm_fast.data import digits
from sbm_fast.divergence import Divergence
from sbm_fast.jacobian import VectorJacobian
from sbm_fast.nn import shipped

RECORD = ROOT / "benchmarks" / "results" / "divergence.json"
COMMAND = "python -m benchmarks.divergence"
PRODUCTS = (8, 16, 32)
PER_DECADE, DECADES, LOWEST = 8, 4, 0.003
SHOWN = 4
"""Every so many points a level stands in the tables."""

RADEMACHER, GAUSSIAN, KEPT = "Rademacher", "Gaussian", "Gaussian, identity left in"
XTRACE = {"denoiser": "XTrace of J_D", "network": "XTrace of J", "noise": "XTrace of J_ε"}
ESTIMATORS = (RADEMACHER, GAUSSIAN, KEPT, *XTRACE.values())


@dataclass(frozen=True)
class Level:
    """J [N, d, d] of N samples at noise-to-signal ratio r.

    du/dλ has the Jacobian −s c J (prediction "edm", λ = ln r, u = x/h; s and c are r and σ_d over
    √(σ_d² + r²)), and the denoiser J_D = c² + s c J in units of u.
    """

    r: float
    sigma_data: float
    jacobian: Tensor

    @property
    def s(self) -> float:
        return self.r / math.hypot(self.r, self.sigma_data)

    @property
    def c(self) -> float:
        return self.sigma_data / math.hypot(self.r, self.sigma_data)

    @property
    def trace(self) -> Tensor:
        """tr of du/dλ's Jacobian, [N]: nats per unit of λ."""
        return -self.s * self.c * self.jacobian.diagonal(dim1=1, dim2=2).sum(1)

    def estimates(self, name: str, products: int, keys: Tensor) -> Tensor:
        """Columns [Q, N, K] of that trace for the probes of keys [N K]."""
        samples, _, d = self.jacobian.shape
        copies = len(keys) // samples
        a, scale, extra, shift = self.jacobian, -self.s * self.c, 0.0, None
        if name == KEPT:  # of dx/dλ in the VP process: h' u + h u' with h = m √(σ_d² + r²)
            extra = self.s**2 - self.r**2 / (1 + self.r**2)
            a, scale = scale * a + extra * torch.eye(d, dtype=a.dtype), 1.0
        if name in (XTRACE["denoiser"], XTRACE["noise"]):
            of = self.c / self.s if name == XTRACE["denoiser"] else -self.s / self.c
            shift = torch.full((samples * copies,), of, dtype=torch.float64)
        matrices = a.repeat_interleave(copies, 0)
        divergence = Divergence(
            "xtrace" if name in XTRACE.values() else "hutchinson",
            products,
            gaussian=name in (GAUSSIAN, KEPT),
            kernels=choose_backend("auto", torch.device("cpu")),
        )
        x = torch.zeros(samples * copies, d, dtype=torch.float64)
        columns = divergence.slope(
            lambda x: torch.einsum("bij,bj->bi", matrices, x),
            x,
            x,
            keys,
            torch.tensor([0.0, scale, scale], dtype=torch.float64).repeat(len(x), 1),
            torch.empty_like(x),
            shift=shift,
        )
        return columns.reshape(-1, samples, copies) - extra * d


def trajectory(images: int) -> list[Level]:
    """Every so many held-out digits, dequantised, carried from data to noise by Heun's method."""
    net, held_out = shipped.digits().eval(), digits().held_out
    x = held_out[torch.linspace(0, len(held_out) - 1, images).long()]
    x = x + (noise.uniform(0, x.shape, stream=noise.DEQUANTISATION) - 0.5) / 8
    sigma_data = float(net.sigma_data)
    step = math.log(10) / PER_DECADE

    def at(r: float, u: Tensor) -> tuple[Tensor, VectorJacobian]:
        label = torch.full((len(u),), math.log(r) / 4)
        jacobian = VectorJacobian(lambda v: net(v, label), u)
        return -r * sigma_data / (r**2 + sigma_data**2) * jacobian.output, jacobian

    u, levels = x / math.hypot(LOWEST, sigma_data), []
    for i in range(PER_DECADE * DECADES + 1):
        r = LOWEST * 10 ** (i / PER_DECADE)
        slope, jacobian = at(r, u)
        levels.append(Level(r, sigma_data, _matrix(jacobian, len(u))))
        following, _ = at(r * math.exp(step), u + step * slope)
        u = u + step / 2 * (slope + following)
    return levels


def _matrix(jacobian: VectorJacobian, batch: int) -> Tensor:
    """J [B, d, d], row i being Jᵀe_i."""
    d = jacobian.shape[1:].numel()

    def unit(v: Tensor, i: int) -> None:
        v.zero_().view(batch, d)[:, i] = 1.0

    rows = [chunk.reshape(-1, batch, d) for _, chunk in jacobian.products(unit, d)]
    return torch.cat(rows).transpose(0, 1).double()


def measure(images: int, keys: int, products: Sequence[int] = PRODUCTS) -> dict[str, Any]:
    """Root mean square errors over images and keys, at the levels and integrated over λ."""
    levels, own_keys = trajectory(images), noise.keys(0, images * keys)
    weights = torch.full((len(levels),), math.log(10) / PER_DECADE, dtype=torch.float64)
    weights[[0, -1]] /= 2
    shown = levels[::SHOWN]
    record: dict[str, Any] = {
        "images": images,
        "keys": keys,
        "products": list(products),
        "levels": [{"r": v.r, "trace": float(v.trace.mean()), "rms": {}} for v in shown],
        "log_p": {"rms": {}},
        "told": {name: [] for name in XTRACE.values()},
        "covered": {name: [] for name in XTRACE.values()},
    }
    for name in ESTIMATORS:
        for m in products:
            columns = [v.estimates(name, m, own_keys) - v.trace[:, None] for v in levels]
            whole = sum(w * e for w, e in zip(weights, columns, strict=True))
            assert isinstance(whole, Tensor)
            entries = [*record["levels"], record["log_p"]]
            for entry, errors in zip(entries, [*columns[::SHOWN], whole], strict=True):
                entry["rms"].setdefault(name, []).append(_rms(errors.mean(0)))
            if name in record["told"]:
                error, low = whole.mean(0), whole.std(0) / math.sqrt(len(whole))
                covered = error.abs() < float(stats.t.ppf(0.975, len(whole) - 1)) * low
                record["told"][name].append(_rms(low) / _rms(error))
                record["covered"][name].append(float(covered.double().mean()))
    return record


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def sections(record: dict[str, Any] | None = None) -> dict[str, str]:
    """The tables of docs/likelihood.md by name; None: from the record."""
    if record is None:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    return {"trace estimators": _table(record, ESTIMATORS[:3]), "xtrace": _xtrace_table(record)}


def _row(name: str, trace: str, rms: dict[str, list[float]], names: Sequence[str]) -> str:
    cells = [" / ".join(f"{v:.2g}" for v in rms[estimator]) for estimator in names]
    return f"| {name} | {trace} | {' | '.join(cells)} |"


def _table(record: dict[str, Any], names: Sequence[str]) -> str:
    shown = (*names, XTRACE["denoiser"])
    counts = " / ".join(map(str, record["products"]))
    lines = [
        f"| σ/m | divergence | {' | '.join(shown)} |",
        f"|---|---|{'---|' * len(shown)}",
        *(_row(f"{v['r']:.2g}", f"{v['trace']:.3g}", v["rms"], shown) for v in record["levels"]),
        _row("log p", "", record["log_p"]["rms"], shown),
    ]
    note = (
        f"Root mean square errors with {counts} products an evaluation, in nats per unit of "
        f"ln(σ/m), and of log p over the whole solve in nats: {record['images']} held-out digits × "
        f"{record['keys']} sets of probes each, `{COMMAND}`."
    )
    return "\n".join([*lines, "", note])


def _xtrace_table(record: dict[str, Any]) -> str:
    shown = tuple(XTRACE.values())
    lines = [
        f"| σ/m | divergence | {' | '.join(shown)} |",
        f"|---|---|{'---|' * len(shown)}",
        *(_row(f"{v['r']:.2g}", f"{v['trace']:.3g}", v["rms"], shown) for v in record["levels"]),
        _row("log p", "", record["log_p"]["rms"], shown),
        _row("standard error it gives for log p ÷ error", "", record["told"], shown),
        _row("its 95 % intervals for log p hold", "", record["covered"], shown),
    ]
    return "\n".join([*lines, "", "As above."])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images and keys; no record")
    quick: bool = parser.parse_args().quick
    require_compiled()
    begin = datetime.now(timezone.utc)
    measured = measure(8, 8) if quick else measure(32, 32)
    print("\n\n".join(sections(measured).values()))
    if quick:
        return
    record = {
        "command": COMMAND,
        "date": begin.isoformat(timespec="seconds"),
        "machine": facts(),
        **measured,
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {RECORD}")


if __name__ == "__main__":
    main()
