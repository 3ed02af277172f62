"""What README and docs state comes from the records, and README's example runs."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _checkout_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_tables_are_the_records() -> None:
    from benchmarks.readme import sections, with_section

    for path, parts in sections().items():
        text = path.read_text(encoding="utf-8")
        for name, section in parts.items():
            same = with_section(text, name, section) == text
            assert same, f"{path.name}, {name}: run benchmarks.readme"
    with pytest.raises(ValueError, match="no section between <!-- other: begin -->"):
        with_section(README, "other", "")


def test_first_example_runs_as_it_stands() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    scope: dict[str, object] = {}
    exec(code, scope)
    x = scope["x"]
    assert isinstance(x, torch.Tensor)
    assert abs(float(x.mean()) - 1.0) < 0.03
    assert abs(float(x.std()) - 0.5) < 0.02
