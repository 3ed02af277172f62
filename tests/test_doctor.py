"""doctor() reports the installation as it is."""

import os
import subprocess
import sys

import pytest
import torch

import sbm_fast
from sbm_fast import _load
from sbm_fast.doctor import Report, backends, doctor


def test_names_versions_and_machine() -> None:
    report = doctor()
    assert isinstance(report, Report)
    assert report.versions["sbm_fast"] == sbm_fast.__version__
    assert report.versions["torch"] == torch.__version__
    assert report.threads == torch.get_num_threads()
    text = str(report)
    for part in (sbm_fast.__version__, torch.__version__, str(report.package), report.gpu):
        assert part in text


def test_compiled_part_is_described() -> None:
    if not _load.load():
        pytest.skip(f"needs the compiled part: {_load.REASON}")
    report = doctor()
    assert report.compiled and report.reason == ""
    assert report.backends["cpu"] == ""
    assert report.cpu_level in ("portable", "avx2", "avx512")
    assert report.cpu_level in report.build["simd"]
    assert f"compiled  yes: {report.library}" in str(report)


def test_every_backend_is_on_or_has_a_reason() -> None:
    assert list(backends()) == ["cpu", "eager", "cuda", "triton"]
    assert backends()["eager"] == ""
    text = str(doctor())
    for name, reason in backends().items():
        assert f"backend   {name:<7} {'off: ' + reason if reason else 'available'}" in text


def test_says_why_the_compiled_part_is_off() -> None:
    script = "from sbm_fast.doctor import doctor; print(doctor())"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, _load.DISABLE: "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    why = "SBM_FAST_DISABLE_COMPILED is set in the environment"
    assert f"compiled  no: {why}" in run.stdout
    assert f"backend   cpu     off: {why}" in run.stdout
    assert "CPU       unknown" in run.stdout


def test_says_where_plain_torch_stands_in_for_a_cuda_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four ops have no CUDA kernel: on GPUs they are Triton's."""
    module = sys.modules["sbm_fast.doctor"]
    missing = "triton is not installed; to install it: pip install triton"
    for compiled, reason in ((True, missing), (True, ""), (False, missing)):
        monkeypatch.setattr(module, "cuda_compiled", lambda: compiled)  # noqa: B023
        monkeypatch.setattr(module, "triton_missing", lambda: reason)  # noqa: B023
        ops = "error_norm_, group_norm_silu_, group_norm_silu_product_, hutchinson_"
        line = f"cuda runs {ops} on plain torch: {missing}"
        assert (line in str(doctor())) == (compiled and reason == missing)
