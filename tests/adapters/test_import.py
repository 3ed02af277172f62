"""`sbm_fast.adapters` is there, and costs nothing until it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sbm_fast


def test_adapters_are_imported_when_asked_for() -> None:
    program = """
import sys, sbm_fast
assert not any(name.startswith("sbm_fast.adapters") for name in sys.modules)
sbm_fast.adapters.diffusers, sbm_fast.adapters.edm, sbm_fast.adapters.score_sde
assert "diffusers" not in sys.modules and "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert "adapters" in sbm_fast.__all__


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="'sbm_fast' has no attribute 'adaptors'"):
        sbm_fast.adaptors  # type: ignore[attr-defined]  # noqa: B018
