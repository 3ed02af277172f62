"""What all readers of foreign files say, and what they refuse before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def require_file(path: str | os.PathLike[str]) -> None:
    """FileNotFoundError unless ``path`` is a file."""
    if not os.path.isfile(path):
        problem = "is not a file" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(f"checkpoint {os.fspath(path)!r} {problem}")


def unreadable(path: str | os.PathLike[str], problem: str) -> ValueError:
    """The error that every reader raises: it names the file and the problem."""
    return ValueError(f"cannot load {os.fspath(path)!r}: {problem}")


def require_held(
    blocks: int, elements: int, largest: Mapping[str, int], held: Sequence[int], in_all: int
) -> None:
    """Refuse a configuration that asks for far more than a file holds: a few bytes of JSON can ask
    for terabytes.

    Args:
        blocks: the configuration's least number of tensors.
        elements: its least number of elements in all.
        largest: elements that some tensor of it has, by what asks for them.
        held: elements of every tensor in the file.
        in_all: elements in the file.

    Raises:
        ValueError: it asks for more; the message says of what.
    """
    if blocks > len(held):
        raise ValueError(f"{blocks} blocks, but the file holds {len(held)} tensors")
    most = max(held, default=0)
    for what, size in largest.items():
        if size > most:
            raise ValueError(
                f"{what}: a tensor of {size} elements, but the file's largest tensor has {most}"
            )
    if elements > in_all:
        raise ValueError(f"{elements} weights or more, but the file holds {in_all} numbers")
