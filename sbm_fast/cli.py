"""The command line: sbm-fast demo | train digits | sample | likelihood | doctor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from torch import Tensor

import sbm_fast
from sbm_fast.cli_likelihood import likelihood
from sbm_fast.cli_options import COUNT, checked_out, named_errors, parse_options, parse_sde
from sbm_fast.pictures import save_grid
from sbm_fast.sampler import SampleInfo

DEMO_PICTURE = "sbm_fast_digits.png"
DEMO_STEPS = 200
DEMO_OPTIONS: dict[str, Any] = {"snr": 0.16}

SAMPLE_SETS = {
    "model": "WEIGHTS",
    "sde": "--sde",
    "num_samples": "--num",
    "method": "--method",
    "steps": "--steps",
    "seed": "--seed",
    "first_sample": "--first-sample",
    "backend": "--backend",
    "progress": "",
    "return_info": "",
}
"""Arguments of `sbm_fast.sample` that the command `sample` gives, and how to set them there."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sbm_fast.__version__, prog_name="sbm-fast")
def main() -> None:
    """Fast sampling of score-based (diffusion) models."""


@main.command()
@click.option("--num", default=64, show_default=True, type=COUNT, help="How many digits.")
@click.option("--steps", default=DEMO_STEPS, show_default=True, type=COUNT,
              help="Predictor steps.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=DEMO_PICTURE, show_default=True, type=click.Path(dir_okay=False))
@named_errors
def demo(num: int, steps: int, seed: int, out: str) -> None:
    """Samples handwritten digits by predictor-corrector and writes a PNG grid."""
    from sbm_fast.nn import shipped

    checked_out(out, ".png")
    net = shipped.digits()
    x, info = sbm_fast.sample(
        net,
        net.sde,
        num_samples=num,
        method="pc",
        steps=steps,
        seed=seed,
        progress=True,
        return_info=True,
        **DEMO_OPTIONS,
    )
    _report(info)
    # Ink is high in the data; on a picture it is dark.
    click.echo(f"picture   {save_grid(x, out, data_range=(1.0, -1.0), zoom=6)}")


@main.command()
@click.argument("weights", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--method", default="pc", show_default=True, help="Sampling method.")
@click.option("--sde", "sde_text", help="Such as 'VESDE(0.01, 50)'; default: the network's own.")
@click.option("--steps", type=COUNT, help="Steps of the method; default: its own.")
@click.option("--num", default=16, show_default=True, type=COUNT, help="How many samples.")
@click.option("--seed", type=int, help="Default: a fresh one, which is printed.")
@click.option("--first-sample", default=0, show_default=True, help="Global index of the first.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--option", "-o", "options", multiple=True, metavar="NAME=VALUE",
              help="An option of the method or of sample(), such as -o snr=0.1.")  # fmt: skip
@click.option("--out", default="samples.png", show_default=True, type=click.Path(dir_okay=False),
              help="A picture (.png) or tensors (.safetensors, .npz).")  # fmt: skip
@named_errors
def sample(
    weights: str | None,
    method: str,
    sde_text: str | None,
    steps: int | None,
    num: int,
    seed: int | None,
    first_sample: int,
    backend: str,
    options: tuple[str, ...],
    out: str,
) -> None:
    """Samples from a network of this package (WEIGHTS: .safetensors; default: the digits)."""
    from sbm_fast.nn import UNet, shipped

    write = _writer(checked_out(out, ".png", ".safetensors", ".npz"))
    extra = parse_options(options, SAMPLE_SETS)
    net = UNet.load(weights) if weights else shipped.digits()
    x, info = sbm_fast.sample(
        net,
        parse_sde(sde_text) if sde_text else net.sde,
        num_samples=num,
        method=method,
        steps=steps,
        seed=seed,
        first_sample=first_sample,
        backend=backend,
        progress=True,
        return_info=True,
        **extra,
    )
    _report(info)
    write(x)
    click.echo(f"samples   {out}")


main.add_command(likelihood)


@main.group()
def train() -> None:
    """Trains a network."""


@train.command("digits")
@click.option("--out", default="digits.safetensors", show_default=True,
              type=click.Path(dir_okay=False))  # fmt: skip
@click.option("--steps", type=COUNT, help="Optimisation steps; default: those of the shipped file.")
@click.option("--seed", default=0, show_default=True)
@named_errors
def train_digits(out: str, steps: int | None, seed: int) -> None:
    """Trains the shipped network of handwritten digits by denoising score matching."""
    from sbm_fast.training import digits

    checked_out(out, ".safetensors")
    result = digits.train_digits(out, steps=digits.STEPS if steps is None else steps, seed=seed)
    click.echo(f"held-out loss {result.held_out_loss:.4f}, weights in {out}")


@main.command()
def doctor() -> None:
    """Says what works on this machine, and why the rest does not."""
    click.echo(str(sbm_fast.doctor()))


def _report(info: SampleInfo) -> None:
    method = "ode, adaptive" if info.plan is None else info.plan.method
    click.echo(f"method    {method}, {info.nfe} network evaluations a sample (NFE)")
    click.echo(
        f"seconds   {info.seconds:.2f}: {info.seconds_network:.2f} in the network, "
        f"{info.seconds_sampler:.2f} in the sampler"
    )
    click.echo(f"backend   {info.backend}")
    click.echo(f"seed      {info.seed}")


def _writer(path: Path) -> Callable[[Tensor], object]:
    """What writes samples to a file of this ending."""
    ending = path.suffix.lower()
    if ending == ".safetensors":
        from safetensors.torch import save_file

        return lambda x: save_file({"samples": x.contiguous()}, path)
    if ending == ".npz":
        import numpy as np

        def write_npz(x: Tensor) -> None:
            # Given a name, savez adds an ending to one that is not exactly .npz (.NPZ).
            with open(path, "wb") as file:
                np.savez(file, samples=x.cpu().numpy())

        return write_npz
    return lambda x: save_grid(x, path, zoom=max(1, 64 // x.shape[-1]))
