"""What `sbm_fast.optimize` changed in a network, what it left and why, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from sbm_fast.optimization.cast import Kept
from sbm_fast.optimization.exchange import give_back, refuse_foreign


@dataclass(frozen=True)
class Replaced:
    """A norm that the fused op computes now."""

    path: str
    pattern: str
    """What one call does: "vector + GroupNorm + FiLM + SiLU", or as much of it as was found. The
    vector and FiLM depend on what forward is given."""
    where: str = ""
    """The call in the source that has the neighbours; empty for a norm alone, which has none next
    to it, or none that can be seen."""


@dataclass(frozen=True)
class Left:
    """A module that was left as it is, wholly or in part."""

    path: str
    reason: str


@dataclass
class Report:
    """What `optimize` did; `print(report)` shows it as a table."""

    net: nn.Module
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    """What was done to the weights' layout and dtype, and to convolutions."""
    difference: float | None = None
    """max |after − before| / max |before| of the outputs on the example; None without one."""
    kept: list[Kept] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        joined = sum(bool(r.where) for r in self.replaced)
        lines = [
            f"{type(self.net).__name__}: {len(self.replaced)} norms replaced, "
            f"{joined} of them with neighbours; {len(self.left)} left or partly left"
        ]
        lines += _table(
            "replaced", [(_name(r.path), r.pattern, r.where or "alone") for r in self.replaced]
        )
        reasons: dict[str, list[str]] = {}
        for entry in self.left:
            reasons.setdefault(entry.reason, []).append(_name(entry.path))
        for reason, paths in reasons.items():
            lines += _table("left", [(path, "" if i else reason) for i, path in enumerate(paths)])
        lines += _table("weights", [(line,) for line in self.weights])
        if self.difference is not None:
            line = f"outputs differ by {self.difference:.1e}, relative to the largest"
            lines += _table("example", [(line,)])
        return "\n".join(lines)

    def restore(self) -> None:
        """The network computes as it did before: classes, layouts and dtypes are the old ones.

        Weights that were cast get their old values back bit for bit; those that have changed
        since (training) keep their new values, in the old dtype. Classes of an earlier `optimize`
        of the same network go back too; its cast and layout are that report's.

        Raises:
            TypeError: a module was given yet another class since; nothing is changed then.
        """
        modules = list(self.net.modules())
        for module in modules:
            refuse_foreign(module)
        for module in modules:
            give_back(module)
        self.put_back()

    def put_back(self) -> None:
        """The weights have their old layout and dtype; the second part of `restore`."""
        for weight in reversed(self.kept):
            weight.put_back()
        self.kept.clear()


def _name(path: str) -> str:
    return path or "(the network)"


def _table(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {'' if i else title:<10}"
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for i, row in enumerate(rows)
    ]
