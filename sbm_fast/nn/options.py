"""Checks of the networks' constructor arguments; each error names the argument."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Check = Callable[[str, Any], Any]
"""(name of the argument, value) -> the value as it is kept; TypeError or ValueError."""


class _Short(reprlib.Repr):
    """Of bounded length and time: a file of few bytes can nest a tuple so that its repr takes
    forever."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxlong = 100

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if isinstance(x, (bool, float, type(None))) else f"<{type(x).__name__}>"


shown = _Short().repr
"""What an error says of a value that may be anything."""


def positive(name: str, value: Any) -> int:
    """``value`` if it is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


def count(name: str, value: Any) -> int:
    """``value`` if it is an int >= 0."""
    return 0 if value == 0 and not isinstance(value, (bool, float)) else positive(name, value)


def positives(name: str, values: Any) -> tuple[int, ...]:
    """``values`` as a tuple, if it is a non-empty list or tuple of ints >= 1."""
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(f"{name} must be a non-empty list or tuple of ints, got {shown(values)}")
    return tuple(positive(name, value) for value in values)


def resolutions(name: str, values: Any) -> tuple[int, ...]:
    """Image sizes whose level has attention; they need not be sizes of a level."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of ints, got {shown(values)}")
    return tuple(positive(name, value) for value in values)


def levels(values: Any, number: int) -> tuple[int, ...]:
    """``values`` sorted, if it is a list or tuple of levels below ``number``."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"attention_levels must be a list or tuple of ints, got {shown(values)}")
    for level in values:
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < number:
            raise ValueError(f"attention_levels must lie in 0..{number - 1}, got {shown(level)}")
    return tuple(sorted(set(values)))


def flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {shown(value)}")
    return value


def choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """``value`` if it is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}"
        )
    return value


def one_of(*choices: Any) -> Check:
    """`choice` of these."""
    return partial(choice, choices=choices)


def real(name: str, value: Any) -> float:
    """``value`` as a float, if it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {shown(value)}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """``value`` as a float, if it lies in [0, 1)."""
    if value == 0:
        return 0.0
    if real(name, value) >= 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return float(value)


def fir(name: str, values: Any) -> tuple[float, ...]:
    """The taps of a resampling filter: 2 to 64 numbers whose sum is not 0."""
    if not isinstance(values, (list, tuple)) or not 2 <= len(values) <= 64:
        raise TypeError(f"{name} must be a list or tuple of 2 to 64 numbers, got {shown(values)}")
    for tap in values:
        if isinstance(tap, bool) or not isinstance(tap, (int, float)):
            raise TypeError(f"{name} must hold numbers, got {shown(tap)}")
    if not 0 < abs(sum(values)) < float("inf"):
        raise ValueError(f"{name} must have a sum other than 0, got {shown(values)}")
    return tuple(values)


def checked(rules: Mapping[str, Check], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ``rules`` name, each as its check gives it back."""
    return {name: check(name, given[name]) for name, check in rules.items()}
