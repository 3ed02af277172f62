"""What the README states comes from the record, and its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_speed_table_is_the_record() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.markdown"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    ).stdout.strip()
    assert made and made in README


def test_first_example_runs_as_it_stands() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    scope: dict[str, object] = {}
    exec(code, scope)
    x = scope["x"]
    assert isinstance(x, torch.Tensor)
    assert abs(float(x.mean()) - 1.0) < 0.03
    assert abs(float(x.std()) - 0.5) < 0.02
