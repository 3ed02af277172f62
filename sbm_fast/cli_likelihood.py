"""The command sbm-fast likelihood: bits per dimension of data, with their errors."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from torch import Tensor

from sbm_fast.cli_options import COUNT, checked_out, named_errors, parse_options, parse_sde
from sbm_fast.dequantisation import check_range
from sbm_fast.ladder import DDPMSchedule
from sbm_fast.runge_kutta import FIXED
from sbm_fast.sde import VPSDE
from sbm_fast.solver import STEPS
from sbm_fast.variational import ddpm_chain, variational_bound

DIGITS_LEVELS, IMAGE_LEVELS = 17, 256
CHAIN_LEVELS = 1000

SETS = {
    "model": "WEIGHTS",
    "sde": "--sde",
    "schedule": "--sde",
    "x": "--data",
    "data_range": "--range",
    "levels": "--levels",
    "probes": "--probes",
    "exact": "--exact",
    "draws": "--draws",
    "solver": "--solver",
    "steps": "--steps",
    "rtol": "--tolerance",
    "atol": "--tolerance",
    "t_min": "--t-min",
    "seed": "--seed",
    "first_sample": "--first",
    "batch_size": "--batch",
    "backend": "--backend",
    "progress": "",
}
"""Arguments of the library's calls that the command gives, and how to set them there."""

ODE_ONLY = ("probes", "exact", "solver", "tolerance", "t_min", "backend")
"""Parameters of the command that mean nothing for DDPM's bound."""


@dataclass(frozen=True)
class Evaluation:
    """What the table and the file say: per-sample columns [N], and facts of the whole."""

    columns: dict[str, np.ndarray]
    facts: dict[str, Any]


@click.command()
@click.argument("weights", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--data", "source", default="digits", show_default=True, metavar="SOURCE",
              help="digits (held out), a folder of PNG or JPEG, or an .npz file.")  # fmt: skip
@click.option("--array", help="Name of the array in the .npz file; default: the only one.")
@click.option("--size", type=COUNT, help="Scale images to SIZE x SIZE; default: as they are.")
@click.option("--num", default=16, show_default=True, type=COUNT, help="How many samples at most.")
@click.option("--first", default=0, show_default=True, type=click.IntRange(min=0),
              help="Number of the first sample; its noise is that of this number.")  # fmt: skip
@click.option("--levels", type=click.IntRange(min=2),
              help="Levels of the data; default: 17 for the digits, else 256.")  # fmt: skip
@click.option("--range", "data_range", nargs=2, type=float, default=(-1.0, 1.0), show_default=True,
              metavar="LOW HIGH", help="Lowest and highest level of the data.")  # fmt: skip
@click.option("--probes", default=1, show_default=True, type=COUNT, help="Hutchinson probes.")
@click.option("--exact/--no-exact", default=None,
              help="The exact trace; default: up to 64 dimensions.")  # fmt: skip
@click.option("--draws", default=1, show_default=True, type=COUNT,
              help="Dequantisations (with --bound: draws of the whole sum).")  # fmt: skip
@click.option("--solver", default="dopri5", show_default=True,
              help="dopri5, euler, heun, rk4 or torchdiffeq:<method>.")  # fmt: skip
@click.option(
    "--steps", type=COUNT, help="Steps of a fixed grid; with --bound: levels of the chain."
)
@click.option("--tolerance", default=1e-5, show_default=True, type=float,
              help="rtol and atol of an adaptive solver.")  # fmt: skip
@click.option("--t-min", type=float, help="Where the density is taken; default: the library's.")
@click.option("--sde", "sde_text", help="Such as 'VESDE(0.01, 50)'; default: the network's own.")
@click.option("--seed", type=int, help="Default: a fresh one, which is printed.")
@click.option("--batch", type=COUNT, help="Samples at a time; default: all.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--bound", is_flag=True,
              help="DDPM's variational bound, over the VP SDE's own levels.")  # fmt: skip
@click.option("--option", "-o", "texts", multiple=True, metavar="NAME=VALUE",
              help="Another argument of the call, such as -o estimator=xtrace.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False),
              help="Results of every sample (.npz, .json, .csv).")  # fmt: skip
@click.pass_context
@named_errors
def likelihood(
    context: click.Context,
    weights: str | None,
    source: str,
    array: str | None,
    size: int | None,
    num: int,
    first: int,
    levels: int | None,
    data_range: tuple[float, float],
    sde_text: str | None,
    bound: bool,
    texts: tuple[str, ...],
    out: str | None,
    **settings: Any,
) -> None:
    """Bits per dimension of data under a network (WEIGHTS: .safetensors; default: the digits).

    Exact log-likelihood along the probability-flow ODE with uniform dequantisation, or, with
    --bound, DDPM's variational bound.
    """
    from sbm_fast.nn import UNet, shipped

    path = None if out is None else checked_out(out, ".npz", ".json", ".csv")
    extra = parse_options(texts, SETS)
    if bound:
        _refuse_ode_options(context)
    check_range(data_range)
    sde = parse_sde(sde_text) if sde_text else None
    if levels is None:
        levels = DIGITS_LEVELS if source == "digits" else IMAGE_LEVELS
    x = _load(source, array, size, levels, data_range)
    if first >= len(x):
        raise ValueError(f"--first: expected less than the {len(x)} samples, got {first}")
    total, x = len(x), x[first : first + num]
    net = UNet.load(weights) if weights else shipped.digits()
    common = dict(
        data_range=data_range,
        levels=levels,
        draws=settings["draws"],
        seed=settings["seed"],
        first_sample=first,
        batch_size=settings["batch"],
        progress=True,
        **extra,
    )
    run = _bound if bound else _flow
    evaluation = run(net, net.sde if sde is None else sde, x, common, settings)
    whence = f"{total} of {source}, the first is number {first}"
    _report(evaluation, whence, math.prod(x.shape[1:]))
    if path is not None:
        _write(path, evaluation, first)
        click.echo(f"results   {path}")


def _refuse_ode_options(context: click.Context) -> None:
    for name in ODE_ONLY:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: DDPM's bound (--bound) solves no ODE and takes none")


def _load(
    source: str, array: str | None, size: int | None, levels: int, data_range: tuple[float, float]
) -> Tensor:
    """Data [N, …] on levels of the range."""
    from sbm_fast import data

    if array is not None and not source.lower().endswith(".npz"):
        raise ValueError(f"--array: only an .npz file has arrays, --data is {source}")
    if size is not None and (source == "digits" or Path(source).is_file()):
        raise ValueError(f"--size: only images of a folder are scaled, --data is {source}")
    if source.lower().endswith(".npz"):
        return data.arrays(source, array, data_range=data_range, levels=levels)
    if source != "digits" and not Path(source).is_dir():
        raise ValueError(
            f"--data: expected digits, a folder of images or an .npz file, got {source}"
        )
    x = data.digits().held_out if source == "digits" else data.images(source, size)
    low, high = data_range
    return x if (low, high) == (-1.0, 1.0) else low + (x + 1) * (0.5 * (high - low))


def _flow(
    net: Any, sde: object, x: Tensor, common: dict[str, Any], settings: Mapping[str, Any]
) -> Evaluation:
    """Log-likelihood along the ODE."""
    from sbm_fast.bits import bits_per_dim

    solver = settings["solver"]
    result = bits_per_dim(
        net,
        sde,
        x,
        probes=settings["probes"],
        exact=settings["exact"],
        solver=solver,
        steps=settings["steps"],
        rtol=settings["tolerance"],
        atol=settings["tolerance"],
        t_min=settings["t_min"],
        backend=settings["backend"],
        **common,
    )
    log_prob = result.log_prob.mean(0)
    trace = result.result.trace
    columns = {
        "bits_per_dim": result.bits_per_dim,
        "stderr": result.stderr,
        "log_prob": log_prob,
        "nfe": result.nfe,
    }
    facts = {
        "bits_per_dim": result.mean,
        "stderr_of_mean": result.mean_stderr,
        "log_prob": float(log_prob.mean()),
        "error_by": "draws" if settings["draws"] > 1 else "probes",
        "seconds": result.seconds,
        "seed": result.seed,
        "solver": solver + _grid(solver, settings),
        "trace": trace if trace == "exact" else f"{trace}, {settings['probes']} probes",
        "backend": result.result.backend,
    }
    return Evaluation(_arrays(columns), facts)


def _grid(solver: str, settings: Mapping[str, Any]) -> str:
    if solver in FIXED:
        return f", {settings['steps'] or STEPS} steps"
    return f", tolerance {settings['tolerance']:g}"


def _bound(
    net: Any, sde: object, x: Tensor, common: dict[str, Any], settings: Mapping[str, Any]
) -> Evaluation:
    """DDPM's variational bound."""
    steps = settings["steps"]
    if isinstance(sde, DDPMSchedule):
        if steps is not None:
            raise ValueError(f"--steps: the schedule has its {sde.levels} levels, got {steps}")
        chain = sde
    elif isinstance(sde, VPSDE):
        chain = ddpm_chain(sde, CHAIN_LEVELS if steps is None else steps)
    else:
        raise ValueError(
            "--bound: DDPM's bound is that of a variance-preserving chain; expected an --sde such "
            f"as 'VPSDE()' or 'DDPMSchedule.linear(1000)', got {sde!r}"
        )
    result = variational_bound(net, chain, x, **common)
    columns = {
        "bits_per_dim": result.bits_per_dim,
        "stderr": result.stderr,
        "prior": result.prior,
        "decoder": result.decoder,
    }
    facts = {
        "bits_per_dim": result.mean,
        "stderr_of_mean": result.mean_stderr,
        "error_by": "draws",
        "nfe": result.nfe,
        "seconds": result.seconds,
        "seed": result.seed,
        "solver": f"DDPM's bound over {chain.levels} levels",
    }
    return Evaluation(_arrays(columns), facts)


def _arrays(columns: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.cpu().numpy() for name, values in columns.items()}


def _report(evaluation: Evaluation, whence: str, dimension: int) -> None:
    columns, facts = evaluation.columns, evaluation.facts
    bits = columns["bits_per_dim"]
    n = len(bits)
    spread = float(bits.std(ddof=1)) if n > 1 else math.nan
    lines = {
        "data": f"{n} samples out of {whence}",
        "dimension": f"{dimension}",
        "bits/dim": f"{facts['bits_per_dim']:.4f} ± {facts['stderr_of_mean']:.4f} "
        f"(spread between samples {spread:.4f})",
        "error": _error_of_a_sample(columns["stderr"], facts),
    }
    if "log_prob" in facts:
        lines["log p"] = f"{facts['log_prob']:.4f} nats on average, of dequantised data"
    else:
        parts = (float(columns[name].mean()) for name in ("prior", "decoder"))
        lines["of these"] = "{:.4f} the prior's, {:.4f} the decoder's".format(*parts)
    nfe = columns.get("nfe", np.array([facts.get("nfe", 0)]))
    lines["NFE"] = f"{nfe.mean():.1f} network evaluations a sample on average, at most {nfe.max()}"
    if unfinished := int(np.isnan(bits).sum()):
        lines["stopped"] = f"{unfinished} of {n} samples reached max_nfe"
    lines["seconds"] = f"{facts['seconds']:.2f}"
    lines |= {
        name: str(facts[name]) for name in ("seed", "solver", "trace", "backend") if name in facts
    }
    for name, text in lines.items():
        click.echo(f"{name:<10}{text}")


def _error_of_a_sample(stderr: np.ndarray, facts: Mapping[str, Any]) -> str:
    by = facts["error_by"]
    if facts.get("trace") == "exact" and by == "probes":
        return "none of the trace, which is exact; that of dequantisation takes two draws"
    if np.isnan(stderr).all():
        return f"of a sample unknown: it takes two {by} or more"
    return f"of a sample {np.nanmean(stderr):.4f} on average, by its {by}"


def _write(path: Path, evaluation: Evaluation, first: int) -> None:
    n = len(evaluation.columns["bits_per_dim"])
    columns = {"sample": np.arange(first, first + n), **evaluation.columns}
    facts = {name: _plain(value) for name, value in evaluation.facts.items()}
    ending = path.suffix.lower()
    if ending == ".npz":
        # Given a name, savez adds an ending to one that is not exactly .npz (.NPZ).
        with open(path, "wb") as file:
            np.savez(file, **columns, summary=np.array(json.dumps(facts)))  # type: ignore[arg-type]
        return
    rows = list(zip(*(values.tolist() for values in columns.values()), strict=True))
    with open(path, "w", encoding="utf-8", newline="") as text:
        if ending == ".csv":
            csv.writer(text).writerows([tuple(columns), *rows])
            return
        samples = [{k: _plain(v) for k, v in zip(columns, row, strict=True)} for row in rows]
        json.dump({"summary": facts, "samples": samples}, text, indent=1)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
