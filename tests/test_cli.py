"""The command line, called in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

import sbm_fast
from sbm_fast import cli
from sbm_fast.cli_options import parse_sde
from sbm_fast.nn import UNet


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def refused(*arguments: str) -> str:
    """The message of a call that fails as one line, not as a traceback."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    return result.output.strip().splitlines()[-1]


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(sbm_fast, "sample", fail)
    monkeypatch.setattr("sbm_fast.nn.shipped.digits", fail)
    monkeypatch.setattr("sbm_fast.training.digits.train_digits", fail)


def test_demo() -> None:
    result = run("demo", "--num", "4", "--steps", "3", "--seed", "5", "--out", "grid.png")
    assert result.exit_code == 0, result.output
    with Image.open("grid.png") as picture:
        assert picture.format == "PNG"
    for text in ("(NFE)", "seconds ", "backend ", "seed      5", "picture   grid.png"):
        assert text in result.output


@pytest.mark.parametrize("name", ["x.npz", "x.NPZ", "x.safetensors", "x.png"])
def test_sample(name: str) -> None:
    arguments = ["--num", "2", "--steps", "3", "--seed", "1", "--method", "ddim"]
    result = run("sample", *arguments, "--out", name, "-o", "clip_denoised=1.0")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path().iterdir()] == [name]
    net = sbm_fast.nn.shipped.digits()
    expected = sbm_fast.sample(
        net, net.sde, num_samples=2, steps=3, seed=1, method="ddim", clip_denoised=1.0
    )
    if name == "x.safetensors":
        assert torch.equal(load_file(name)["samples"], expected)
    elif name != "x.png":
        with np.load(name) as file:
            assert np.array_equal(file["samples"], expected.numpy())


def test_sde_is_parsed() -> None:
    assert repr(parse_sde("VESDE(0.02, sigma_max=5)")) == repr(sbm_fast.VESDE(0.02, 5))
    assert repr(parse_sde(" VPSDE ")) == repr(sbm_fast.VPSDE())
    assert parse_sde("DDPMSchedule.linear(20)") == sbm_fast.DDPMSchedule.linear(20)
    assert parse_sde("DDPMSchedule.cosine(levels=20)") == sbm_fast.DDPMSchedule.cosine(20)


@pytest.mark.parametrize(
    "text",
    [
        'VESDE(__import__("os"))',
        '__import__("os").abort()',
        "VESDE(*[1, 2])",
        "VESDE(**{})",
        "VESDE(0.01, 50).sigma_max",
        "VESDE(0.01, 50).sigma_max()",
        "DDPMSchedule.__class__()",
        "DDPMSchedule(1)",
        "HisSDE()",
        "VESDE(",
        "",
    ],
)
def test_sde_executes_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--sde: expected one of"):
        parse_sde(text)


def test_a_bad_sde_is_one_line() -> None:
    assert refused("sample", "--sde", 'VESDE(__import__("os"))').startswith("Error: --sde: ")


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("command", [("demo",), ("sample",), ("train", "digits")])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.txt", "ending in"),
        ("x", "ending in"),
        ("absent/x", "in a folder that exists"),
    ],
)
def test_bad_output_fails_before_work(command: tuple[str, ...], out: str, message: str) -> None:
    if out == "absent/x":
        out += ".safetensors" if command[0] == "train" else ".png"
    last = refused(*command, "--out", out)
    assert last.startswith("Error: --out: expected a file ")
    assert message in last
    assert out in last


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--num", "0"),
        ("demo", "--steps", "0"),
        ("sample", "--num", "-1"),
        ("sample", "--steps", "0"),
        ("train", "digits", "--steps", "0"),
    ],
)
def test_counts_begin_at_one(arguments: tuple[str, ...]) -> None:
    assert f"Invalid value for '{arguments[-2]}'" in refused(*arguments)


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("name", cli.SAMPLE_SETS)
def test_options_that_the_command_sets(name: str) -> None:
    last = refused("sample", "-o", f"{name}=3")
    assert last.startswith("Error: --option: expected an option")
    assert f"got {name}" in last


@pytest.mark.parametrize("text", ["seed", "=3", "a b=3"])
def test_options_have_a_name_and_a_value(text: str) -> None:
    assert refused("sample", "-o", text).startswith("Error: --option: expected NAME=VALUE")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("out of room\nat C++ line 7"), "Error: RuntimeError: out of room"),
        (MemoryError(), "Error: MemoryError"),
        (OverflowError("too large"), "Error: OverflowError: too large"),
        (ValueError("snr: too large"), "Error: snr: too large"),
    ],
)
def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(sbm_fast, "sample", fail)
    result = run("sample")
    assert result.output.strip() == line
    assert result.exit_code == 1


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "torch" in result.output


def test_train_digits() -> None:
    pytest.importorskip("sklearn")
    result = run("train", "digits", "--steps", "2", "--out", "w.safetensors")
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.output
    assert UNet.load("w.safetensors").sample_shape == (1, 8, 8)
