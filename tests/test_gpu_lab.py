"""The laboratory's loop on phases made for it, its checks on wrong results, and a whole dry run."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest's importlib mode leaves the checkout off the path; behind an installed package it goes.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_lab
from benchmarks.baselines import FixedNoise, Tuned
from benchmarks.gpu import checks, conformance, files, group_norm, readme, table
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.context import Context, Entries
from benchmarks.gpu.phases import MOST, TITLES, Phase, all_phases
from benchmarks.gpu.runner import SKIPPED, Runner
from benchmarks.gpu.subjects import Op
from benchmarks.gpu.timing import Timed, interleave
from benchmarks.gpu.worker import work
from benchmarks.workloads import SCORE_SDE, Goal
from sbm_fast.ops._library import WITHOUT_TWIN

ROOT = Path(__file__).resolve().parents[1]
DRY = Context(torch.device("cpu"), dry_run=True)
FULL = Context(torch.device("cpu"), dry_run=False)
"""As on a GPU, but for the clock."""
HEADER = {"dry_run": True, "command": "c", "date": "d", "python": "p", "commit": "c"}


def phase(name: str, code: str, most: float = 20.0, least: float = 0.0) -> Phase:
    code = f"import json, os, signal, sys, time; part = sys.argv[1]; {code}"
    return Phase(name, f"phase {name}", (sys.executable, "-c", code, "{part}"), most, least)


def write(value: object) -> str:
    return f"open(part, 'w').write(json.dumps({value!r}))"


GOOD = phase("good", write({"entries": {"e": {"facts": {}}}}))


def run(folder: Path, *phases: Phase, seconds: float = 60.0) -> dict[str, Any]:
    record = Runner(folder, seconds, grace=0.3).run(phases, HEADER)
    kept = json.loads((folder / "lab.json").read_text(encoding="utf-8"))
    assert kept["phases"] == record["phases"]
    return record


def test_phase_that_hangs_is_killed_with_its_children_and_loses_only_itself(tmp_path: Path) -> None:
    """It ignores being asked; its child would sleep on."""
    child = tmp_path / "child"
    hang = phase(
        "hang",
        f"{write({'entries': {'first': {}}})}; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "import subprocess; p = subprocess.Popen(['sleep', '60']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)",
        most=1.5,
    )
    begin = time.monotonic()
    record = run(tmp_path, hang, GOOD)
    assert time.monotonic() - begin < 15
    assert record["phases"]["hang"]["status"].startswith("killed")
    assert record["phases"]["hang"]["entries"] == {"first": {}}
    assert record["phases"]["good"]["status"] == "done"
    assert record["finished"]
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


@pytest.mark.parametrize(
    ("code", "status"),
    [("os.abort()", "crashed: SIGABRT"), ("sys.exit(3)", "failed: exit code 3")],
)
def test_phase_that_crashes_keeps_what_it_wrote(tmp_path: Path, code: str, status: str) -> None:
    record = run(tmp_path, phase("bad", f"{write({'half': 1})}; {code}"), GOOD)
    assert record["phases"]["bad"]["status"] == status
    assert record["phases"]["bad"]["half"] == 1
    assert record["phases"]["good"]["status"] == "done"


def test_command_that_does_not_exist_is_a_failed_phase(tmp_path: Path) -> None:
    record = run(tmp_path, Phase("none", "t", ("/no/such/program", "{part}"), 5, 0), GOOD)
    assert record["phases"]["none"]["status"].startswith("failed: ")
    assert record["phases"]["good"]["status"] == "done"


def test_phase_that_leaves_half_a_file(tmp_path: Path) -> None:
    record = run(tmp_path, phase("bad", "open(part, 'w').write('{\"entries\"')"), GOOD)
    assert record["phases"]["bad"]["status"] == "done, but its part cannot be read"
    assert record["phases"]["good"]["status"] == "done"


def test_deadline_skips_later_phases_and_cuts_the_running_one(tmp_path: Path) -> None:
    long = phase("long", "time.sleep(60)", most=50)
    late = phase("late", "pass", most=50, least=10)
    begin = time.monotonic()
    record = run(tmp_path, GOOD, long, late, seconds=2.0)
    assert time.monotonic() - begin < 10
    statuses = {name: entry["status"] for name, entry in record["phases"].items()}
    assert statuses["good"] == "done"
    assert statuses["long"].startswith("killed")
    assert statuses["late"] == SKIPPED == "skipped: time"


def test_last_phase_has_what_the_others_left(tmp_path: Path) -> None:
    """torch.compile and its tuning take longer than any share that leaves room for the rest."""
    long = phase("long", f"time.sleep(1.5); {write({'half': 1})}", most=0.5)
    record = run(tmp_path, GOOD, long)
    assert record["phases"]["long"]["status"] == "done"
    assert run(tmp_path, long, GOOD)["phases"]["long"]["status"].startswith("killed")


def test_record_grows_during_a_phase_and_is_whole_at_any_time(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if (tmp_path / "lab.json").exists():
                seen.append(json.loads((tmp_path / "lab.json").read_text(encoding="utf-8")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    big = {"entries": {str(n): {"facts": "x" * 100} for n in range(500)}}
    try:
        run(tmp_path, phase("slow", f"{write(big)}; time.sleep(1)"), GOOD)
    finally:
        over.set()
        watcher.join()
    during = [r["phases"]["slow"] for r in seen if "slow" in r["phases"]]
    assert any(p["status"] == "running" and len(p.get("entries", {})) == 500 for p in during)
    assert [path.name for path in tmp_path.iterdir()] != []
    assert not list(tmp_path.glob(".lab.json*"))


def test_interrupted_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"v": float("nan")})
    assert json.loads(path.read_text()) == {"v": None}

    def refuse(*names: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"v": 2})
    assert json.loads(path.read_text()) == {"v": None}


def test_laboratory_that_is_ended_leaves_its_part(tmp_path: Path) -> None:
    phases = (GOOD, phase("hang", f"{write({'half': 1})}; time.sleep(60)"))
    code = f"""
import sys
from benchmarks import gpu_lab
from benchmarks.gpu.phases import Phase
gpu_lab.all_phases = lambda dry: {phases!r}
sys.argv = ["gpu_lab", "--out", {str(tmp_path)!r}, "--dry-run"]
gpu_lab.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = {}
    for _ in range(300):
        record = files.read_json(tmp_path / "lab.json")
        if record.get("phases", {}).get("hang", {}).get("half"):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    record = files.read_json(tmp_path / "lab.json")
    assert record["phases"]["good"]["status"] == "done"
    assert record["phases"]["hang"]["status"] == "killed: with the laboratory"
    assert record["phases"]["hang"]["half"] == 1
    assert not record["finished"]
    assert "CUT SHORT" in (tmp_path / "table.txt").read_text(encoding="utf-8")


def test_case_that_fails_loses_only_itself(tmp_path: Path) -> None:
    def early(context: Context) -> Entries:
        yield {"n": 1}
        raise RuntimeError("too slow\nby far")

    def fine(context: Context) -> Entries:
        yield {"n": 2}

    assert not work({"early": early, "fine": fine}, DRY, tmp_path / "part.json")
    part = files.read_json(tmp_path / "part.json")
    assert {name: entry["n"] for name, entry in part["entries"].items()} == {"early": 1, "fine": 2}
    assert part["failures"] == {"early": "RuntimeError: too slow by far"}
    assert part["planned"] == ["early", "fine"] and part["left_out"] == []


def test_interleaved_rounds_go_in_turn() -> None:
    calls: list[str] = []
    cases = {name: Timed(lambda name=name: calls.append(name)) for name in "ab"}  # type: ignore[misc]
    summaries = interleave(cases, FULL, rounds=7)
    assert "".join(calls) == "aabb" + "ab" * 7
    assert [len(s.values) for s in summaries.values()] == [7, 7]


def compared(context: Context) -> dict[str, Any]:
    comparison = Comparison(context, "method", name="Step", shape=(2, 3))

    def wrong() -> tuple[Timed, dict[str, float]]:
        raise AssertionError("is off")

    comparison.add("ours", lambda: (Timed(lambda: time.sleep(0.001)), {"off": 1e-7}))
    comparison.add(SCORE_SDE, lambda: (Timed(lambda: time.sleep(0.004)), {}))
    comparison.add("wrong", wrong)
    comparison.measure(5)
    comparison.ratios(["ours"], [Goal(SCORE_SDE, 2, 1000)])
    comparison.fraction("ours", 0.5, Goal("copy", 0.85, 0.93))
    return comparison.entry()


def test_comparison_is_judged_but_for_a_dry_run() -> None:
    entry = compared(FULL)
    ours = entry["results"]["ours"]
    assert ours["ratios"][SCORE_SDE]["verdict"] == "goal"
    assert ours["fraction"]["verdict"] == "missed"
    assert entry["failed"] == {"wrong": "AssertionError: is off"}
    assert set(entry["results"]) == {"ours", SCORE_SDE}
    assert entry["not_measured"] == {}
    assert "verdict" not in json.dumps(compared(DRY)) and "goal" not in json.dumps(compared(DRY))


def test_goal_of_a_failed_case_is_not_silent(tmp_path: Path) -> None:
    def wrong() -> tuple[Timed, dict[str, float]]:
        raise AssertionError("is off")

    def case(context: Context) -> Entries:
        comparison = Comparison(context, "method", unavailable={"triton": "none"})
        comparison.add("ours", wrong)
        comparison.add(SCORE_SDE, lambda: (Timed(lambda: None), {}))
        comparison.measure(5)
        comparison.ratios(["ours"], [Goal(SCORE_SDE, 2, 3)])
        assert math.isnan(comparison.rate("ours", 1.0, "B/s"))
        yield comparison.entry()

    assert not work({"case": case}, FULL, tmp_path / "part.json")
    entry = files.read_json(tmp_path / "part.json")["entries"]["case"]
    assert entry["unavailable"] == {"triton": "none"} and list(entry["failed"]) == ["ours"]
    lines = list(table.judgements({"phases": {"em": {"entries": {"case": entry}}}}))
    assert len(lines) == 1 and lines[0].startswith("NOT MEASURED") and "is off" in lines[0]


def test_conformance_begins_with_what_matters() -> None:
    order = [
        "tests/test_capture_gpu.py::test_a",
        "tests/cuda/test_gpu.py::test_b",
        "tests/ops/test_noise.py::test_b[cuda-3]",
        "tests/test_noise.py::test_c",
        "tests/ops/test_noise.py::test_b[triton-3]",
        "tests/test_capture_gpu.py::test_a[triton-3]",
        "tests/kernels/test_launch.py::test_d[cuda]",
        "tests/ops/test_hutchinson.py::test_d[cuda]",
    ]
    assert [conformance.place(name) for name in order] == [0, 1, 1, 2, 3, 3, 3, 3]
    ops = {f"test_{name.removesuffix('_')}" for name in WITHOUT_TWIN if "product" not in name}
    assert set(conformance.TRITON_ALONE) == ops


def test_conformance_collects_what_can_be_marked_and_no_more(tmp_path: Path) -> None:
    """A test module whose import fails on the lent machine would count as an error there."""
    sources = {
        "ops/op_helper.py": "marks = [pytest.mark.gpu]",
        "ops/test_by_helper.py": "from op_helper import each",
        "test_marked.py": "@pytest.mark.gpu\ndef test_a(): ...",
        "test_other.py": "import diffusers\nimport op_helpers_of_another_kind",
        "helper.py": "import op_helper",
    }
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    names = [path.name for path in conformance.files(tmp_path)]
    assert names == ["test_by_helper.py", "test_marked.py"]
    chosen = {str(path.relative_to(ROOT)) for path in conformance.files(ROOT / "tests")}
    assert {"tests/test_capture_gpu.py", "tests/test_noise.py", "tests/cuda/test_gpu.py"} <= chosen
    assert "tests/adapters/test_diffusers.py" not in chosen


def test_law_finds_wrong_factors() -> None:
    """The bound of 8 standard errors at this size lies far below these deviations."""
    x, out = DRY.random((64, 3, 32, 32), 1), DRY.random((64, 3, 32, 32), 2)
    stepper = Tuned(FixedNoise(out), corrector=False)
    stepper.reset(x)
    stepper.advance(20)
    a, b, variance = checks.em_law(20)
    checks.hold_to_law((a, b, variance), x, stepper.x, out)
    for law in ((a * 1.02, b, variance), (a, b * 1.1, variance), (a, b, variance * 1.05)):
        with pytest.raises(AssertionError, match="standard errors"):
            checks.hold_to_law(law, x, stepper.x, out)
    partly = stepper.x.clone()
    partly[-4:] = x[-4:]  # samples that were never written
    with pytest.raises(AssertionError, match="standard errors"):
        checks.hold_to_law((a, b, variance), x, partly, out)


def test_op_that_misses_a_sample_is_found() -> None:
    x, out = DRY.random((40, 3, 8, 8), 1), DRY.random((40, 3, 8, 8), 2)
    op = Op("eager", x, out)
    checks.hold_op_to_reference(op, "eager")
    right = op.step

    def wrong(x: torch.Tensor, *arguments: Any) -> None:
        last = x[-1].clone()
        right(x, *arguments)
        x[-1] = torch.where(torch.arange(8) == 7, last, x[-1])

    op.step = wrong
    with pytest.raises(AssertionError, match="off from eager"):
        checks.hold_op_to_reference(op, "eager")


def test_norm_that_is_wrong_is_found() -> None:
    inputs = group_norm.Inputs(DRY, (8, 32, 4, 4), 1, film=True)
    inputs.case(inputs.op())

    def half_written(x: torch.Tensor) -> torch.Tensor:
        out = inputs.ours(x).clone()
        out[-1, -1] = 0.0
        return out

    def without_film(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, *inputs.fixed()))

    for wrong in (half_written, without_film):
        with pytest.raises(AssertionError, match="relative"):
            inputs.case(wrong)


def test_phases_fit_the_issue() -> None:
    """Build first, the tests before the figures, and the network's last; both kinds of run."""
    assert list(MOST) == [p.name for p in all_phases(dry_run=False)]
    assert [p.name for p in all_phases(True)] == [p.name for p in all_phases(False)]
    assert list(MOST)[:3] == ["build", "machine", "conformance"]
    assert list(TITLES) == list(MOST)
    # Seconds of its own, and a third of README's table: not behind what takes a minute each.
    assert list(MOST)[3:6] == ["em", "pc", "noise"] and MOST["noise"] <= 30
    assert all("--dry-run" not in p.command for p in all_phases(False))
    assert all("--dry-run" in p.command for p in all_phases(True))
    assert gpu_lab.SECONDS <= 480 - 10


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("lab")
    command = [sys.executable, "benchmarks/gpu_lab.py", "--dry-run", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "table.txt").read_text(encoding="utf-8").strip() in done.stdout
    yield folder


def walk(value: Any, visit: Callable[[str, Any], None]) -> None:
    for key, item in value.items() if isinstance(value, dict) else ():
        visit(key, item)
        walk(item, visit)


def test_dry_run_goes_through_everything(dry: Path) -> None:
    record = files.read_json(dry / "lab.json")
    assert record["finished"] and list(record["phases"]) == list(MOST)
    for name, entry in record["phases"].items():
        assert entry["status"] == "done", (name, entry)
        assert not entry.get("left_out") and not entry.get("failures"), (name, entry)
        assert list(entry.get("entries", {})) == entry.get("planned", []), name
        for case in entry.get("entries", {}).values():
            assert not case.get("failed"), (name, case)
    assert record["phases"]["machine"]["entries"]["build"]["facts"]["doctor"]
    assert record["phases"]["conformance"]["tests"]["errors"] == 0
    assert {path.name for path in dry.iterdir()} == {
        "lab.json", "table.txt", "build.log", "tests.log", "lab.log",
    }  # fmt: skip
    assert "usage: setup.py" in (dry / "build.log").read_text()


def test_dry_run_cannot_be_taken_for_a_gpus(dry: Path) -> None:
    record = files.read_json(dry / "lab.json")
    assert record["dry_run"] is True
    found: list[str] = []
    walk(record, lambda key, item: found.append(key))
    assert not {"goal", "moonshot", "verdict"} & set(found)
    assert table.DRY in (dry / "table.txt").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="dry run"):
        readme.markdown(dry / "lab.json")


def test_readme_table_comes_from_the_record(dry: Path, tmp_path: Path) -> None:
    assert readme.markdown(tmp_path / "none.json") == table.NOT_RUN
    record = files.read_json(dry / "lab.json") | {"dry_run": False}
    judged = {"goal": 6.0, "moonshot": 9.0, "verdict": "goal"}
    large = record["phases"]["em"]["entries"]["64 M, float32 network"]["results"]
    ours = next(result for result in large.values() if "fraction" in result)
    ours["ratios"][SCORE_SDE] = {"ratio": 7.04, "quartiles": [7.0, 7.1], **judged}
    ours["fraction"] = {"ratio": 0.874, "goal": 0.85, "moonshot": 0.93, "verdict": "goal"}
    files.write_json(tmp_path / "gpu.json", record)
    text = readme.markdown(tmp_path / "gpu.json")
    assert "7.0× (6 / 9)" in text and "87% (85% / 93%)" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1
    shown = table.table(record)
    assert re.search(r"goal +7\.04 +\(goal 6, moonshot 9\) +em 64 M, float32", shown)


def test_missing_packages_are_named_before_anything_is_begun(tmp_path: Path) -> None:
    assert gpu_lab.lacking() == []
    assert gpu_lab.lacking(("numpy", "no_such_package")) == ["no_such_package"]
    code = "import sys; sys.modules['tqdm'] = None; from benchmarks import gpu_lab; "
    code += f"sys.argv = ['gpu_lab', '--out', {str(tmp_path / 'new')!r}]; gpu_lab.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "lacks tqdm; nothing was begun" in done.stderr
    assert not (tmp_path / "new").exists()


def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu_lab", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "--dry-run" in done.stderr
    assert not (tmp_path / "new").exists()
    assert dataclasses.is_dataclass(Context)
