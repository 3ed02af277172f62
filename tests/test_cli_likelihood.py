"""The command `likelihood`, called in this process."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from sbm_fast import VPSDE, bits, cli, data
from sbm_fast.cli_likelihood import ODE_ONLY, SETS
from sbm_fast.nn import UNet, shipped
from sbm_fast.variational import ddpm_chain, variational_bound

RNG = np.random.default_rng(0)
QUICK = ("--tolerance", "1e-2", "--seed", "3")
BOUND = ("--bound", "--steps", "4", "--seed", "3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["likelihood", *arguments])


def table(*arguments: str) -> dict[str, str]:
    """The lines of the printed table by their names."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line[10:].strip()]
    return {line[:10].strip(): line[10:] for line in lines}


def refused(*arguments: str) -> str:
    """The message of a call that fails as one line, not as a traceback."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    return result.output.strip().splitlines()[-1]


def tiny(channels: int, size: int) -> Path:
    """A file with a small network of random weights."""
    torch.manual_seed(0)
    net = UNet(
        in_channels=channels, channels=8, channel_mult=(1,), blocks_per_level=1, middle_blocks=1,
        predicts="eps", time="999t", sde=VPSDE(), sample_shape=(channels, size, size),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    net.save("net.safetensors")
    return Path("net.safetensors")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(bits, "bits_per_dim", fail)
    monkeypatch.setattr("sbm_fast.cli_likelihood.variational_bound", fail)
    monkeypatch.setattr("sbm_fast.nn.shipped.digits", fail)


def test_digits_along_the_ode() -> None:
    lines = table("--num", "3", "--first", "5", *QUICK, "--out", "x.npz")
    net, x = shipped.digits(), data.digits().held_out[5:8]
    expected = bits.bits_per_dim(
        net, net.sde, x, levels=17, seed=3, first_sample=5, rtol=1e-2, atol=1e-2
    )
    assert lines["data"] == "3 samples out of 299 of digits, the first is number 5"
    assert lines["dimension"] == "64"
    assert lines["bits/dim"].startswith(f"{expected.mean:.4f} ± {expected.mean_stderr:.4f} (spread")
    assert lines["error"].startswith("none of the trace, which is exact")
    assert lines["log p"].startswith(f"{float(expected.log_prob.mean()):.4f} nats")
    assert f"at most {int(expected.nfe.max())}" in lines["NFE"]
    assert float(lines["seconds"]) > 0
    assert (lines["seed"], lines["trace"]) == ("3", "exact")
    assert lines["solver"] == "dopri5, tolerance 0.01"
    assert lines["backend"] == expected.result.backend
    assert lines["results"] == "x.npz"
    with np.load("x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["bits_per_dim"], expected.bits_per_dim.numpy())
        np.testing.assert_array_equal(file["sample"], [5, 6, 7])
        np.testing.assert_array_equal(file["nfe"], expected.nfe.numpy())
        np.testing.assert_array_equal(file["log_prob"], expected.log_prob[0].numpy())
        assert json.loads(str(file["summary"]))["seed"] == 3


def test_probes_draws_and_fixed_grids() -> None:
    given = ("--num", "2", "--no-exact", "--probes", "2", "--solver", "heun", "--steps", "3")
    lines = table(*given, "--seed", "1", "--out", "x.json")
    assert lines["trace"] == "hutchinson, 2 probes"
    assert lines["solver"] == "heun, 3 steps"
    assert lines["error"].endswith("by its probes")
    result = json.loads(Path("x.json").read_text(encoding="utf-8"))
    assert [sample["sample"] for sample in result["samples"]] == [0, 1]
    assert all(sample["stderr"] > 0 for sample in result["samples"])
    assert table(*given, "--draws", "2")["error"].endswith("by its draws")
    alone = table(
        "--num", "2", "--no-exact", "--solver", "euler", "--steps", "2", "--out", "y.json"
    )
    assert alone["error"] == "of a sample unknown: it takes two probes or more"
    result = json.loads(Path("y.json").read_text(encoding="utf-8"))
    assert [sample["stderr"] for sample in result["samples"]] == [None, None]


def test_ddpms_bound() -> None:
    lines = table(*BOUND, "--num", "4", "--draws", "2", "-o", "variance=beta_tilde",
                  "-o", "clip_denoised=1.0", "--out", "x.csv")  # fmt: skip
    net = shipped.digits()
    expected = variational_bound(
        net, ddpm_chain(net.sde, 4), data.digits().held_out[:4], levels=17, seed=3, draws=2,
        variance="beta_tilde", clip_denoised=1.0,
    )  # fmt: skip
    assert lines["bits/dim"].startswith(f"{expected.mean:.4f} ± {expected.mean_stderr:.4f} (spread")
    assert lines["solver"] == "DDPM's bound over 4 levels"
    assert lines["NFE"].startswith("8.0 network evaluations")
    assert lines["of these"].endswith(f"{float(expected.decoder.mean()):.4f} the decoder's")
    assert "trace" not in lines and "log p" not in lines
    with open("x.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample"] for row in rows] == ["0", "1", "2", "3"]
    for name in ("bits_per_dim", "stderr", "prior", "decoder"):
        got = np.array([float(row[name]) for row in rows])
        np.testing.assert_array_equal(got, getattr(expected, name).numpy())


def test_the_bound_of_another_chain() -> None:
    lines = table("--bound", "--num", "2", "--sde", "DDPMSchedule.linear(5, 0.01, 0.5)")
    assert lines["solver"] == "DDPM's bound over 5 levels"
    last = refused("--bound", "--sde", "DDPMSchedule.linear(5)", "--steps", "5", "--num", "2")
    assert last.startswith("Error: --steps: the schedule has its 5 levels")
    last = refused("--bound", "--sde", "VESDE(0.01, 50)", "--num", "2")
    assert last.startswith("Error: --bound: DDPM's bound is that of a variance-preserving chain")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images(channels: int) -> None:
    net = tiny(channels, 4)
    Path("pictures").mkdir()
    shape = (6, 4, 4) if channels == 1 else (6, 4, 4, 3)
    for i, array in enumerate(RNG.integers(0, 256, shape, dtype=np.uint8)):
        Image.fromarray(array).save(f"pictures/{i}.png")
    whole = table(str(net), "--data", "pictures", "--out", "whole.npz", *BOUND)
    assert whole["data"] == "6 samples out of 6 of pictures, the first is number 0"
    assert whole["dimension"] == str(16 * channels)
    # the same samples in two parts
    for first in (0, 4):
        part = ("--first", str(first), "--num", "4", "--out", f"{first}.npz")
        table(str(net), "--data", "pictures", *part, *BOUND, "--batch", "3")
    read = {name: np.load(f"{name}.npz")["bits_per_dim"] for name in ("whole", "0", "4")}
    parts = np.concatenate([read["0"], read["4"]])
    np.testing.assert_allclose(parts, read["whole"], rtol=1e-5)
    assert table(str(net), "--data", "pictures", "--size", "4", "--num", "2", *BOUND)
    assert "x: expected shape" in refused(
        str(net), "--data", "pictures", "--size", "8", "--num", "2", *BOUND
    )


def test_arrays_of_a_file() -> None:
    net = tiny(1, 4)
    byte = RNG.integers(0, 17, (3, 1, 4, 4), dtype=np.uint8)
    scaled = byte / np.float32(8) - 1
    np.savez("x.NPZ", a=byte, b=scaled, c=byte / np.float32(16))
    Path("x.NPZ.npz").rename("x.NPZ")
    given = (str(net), "--data", "x.NPZ", "--levels", "17", *BOUND)
    a, b = (table(*given, "--array", name)["bits/dim"] for name in "ab")
    assert a == b
    table(*given, "--array", "c", "--range", "0", "1")
    assert refused(*given, "--array", "c").startswith("Error: x: expected one of the levels=17")
    assert refused(*given).startswith("Error: name: expected one of ['a', 'b', 'c']")
    last = refused(str(net), "--data", "x.NPZ", "--array", "b", *BOUND)
    assert last.startswith("Error: x: expected one of the levels=256 values from -1 to 1")


def test_the_range_moves_images_and_digits() -> None:
    whole = table("--num", "2", "--range", "-1", "1", *BOUND)
    other = table("--num", "2", "--range", "-2", "2", *BOUND)  # the network knows other data
    assert whole["bits/dim"] != other["bits/dim"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ODE_ONLY)
def test_what_the_bound_has_no_use_for(name: str) -> None:
    option = "--" + name.replace("_", "-")
    given = {"exact": [option], "t_min": [option, "0.1"], "backend": [option, "cpu"]}
    value = given.get(name, [option, "1"])
    assert refused("--bound", *value).startswith(f"Error: {option}: DDPM's bound")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "x.png"), "--out: expected a file ending in .npz or .json or .csv"),
        (("--out", "absent/x.npz"), "--out: expected a file in a folder that exists"),
        (("--data", "absent"), "--data: expected digits, a folder of images or an .npz file"),
        (("--data", "absent.npz"), "path: there is no file absent.npz"),
        (("--array", "x"), "--array: only an .npz file has arrays, --data is digits"),
        (("--size", "8"), "--size: only images of a folder are scaled, --data is digits"),
        (("--data", "."), "folder: expected images"),
        (("--first", "299"), "--first: expected less than the 299 samples, got 299"),
        (("--range", "1", "-1"), "data_range: expected lowest < highest"),
        (("--sde", "HisSDE()"), "--sde: expected one of"),
        (("-o", "seed"), "--option: expected NAME=VALUE"),
    ],
)
def test_bad_arguments_are_one_line_before_work(arguments: tuple[str, ...], message: str) -> None:
    assert refused(*arguments).startswith(f"Error: {message}")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", SETS)
def test_options_that_the_command_sets(name: str) -> None:
    assert f"got {name}" in refused("-o", f"{name}=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solver", "dopri9"), "solver: expected one of"),
        (("--tolerance", "0"), "rtol: expected"),
        (("--steps", "5"), "steps: "),
        (("--backend", "gpu"), "backend: expected one of"),
        (("-o", "estimater=xtrace"), ""),
        (("--levels", "16"), "x: expected one of the levels=16 values"),
    ],
)
def test_the_librarys_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert refused("--num", "1", *arguments).startswith(f"Error: {message}")


@pytest.mark.parametrize("option", ["--num", "--probes", "--draws", "--batch", "--steps", "--size"])
def test_counts_begin_at_one(option: str) -> None:
    assert f"Invalid value for '{option}'" in refused(option, "0")


def test_samples_that_did_not_finish_are_counted() -> None:
    with pytest.warns(UserWarning, match="max_nfe"):
        lines = table("--num", "2", "-o", "max_nfe=8", "--seed", "0", "--out", "x.json")
    assert lines["stopped"] == "2 of 2 samples reached max_nfe"
    samples: list[dict[str, Any]] = json.loads(Path("x.json").read_text("utf-8"))["samples"]
    assert [sample["bits_per_dim"] for sample in samples] == [None, None]
