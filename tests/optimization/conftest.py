"""Makes this folder's blocks importable, and records what is joined."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sbm_fast.optimization import joined

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each call of the op had: "add film silu", …"""
    made: list[str] = []
    op = joined.group_norm_silu

    def recorded(*args: Any, **kwargs: Any) -> Any:
        film = kwargs["scale"] is not None
        parts = {"add": kwargs["add"] is not None, "film": film, "silu": bool(kwargs["activation"])}
        made.append(" ".join(part for part, there in parts.items() if there))
        return op(*args, **kwargs)

    monkeypatch.setattr(joined, "group_norm_silu", recorded)
    return made
