"""The network that ships with the package: handwritten digits in a few minutes on a CPU."""

from __future__ import annotations

import os
from typing import Any

import torch

import sbm_fast
from sbm_fast.data import digits
from sbm_fast.nn import UNet
from sbm_fast.sde import VPSDE
from sbm_fast.training.train import TrainResult, train

STEPS = 5000
# Standard deviation of all pixels of the training part.
SIGMA_DATA = 0.7524


SDE = VPSDE()


def digits_unet() -> UNet:
    """The untrained network: 8x8 and 4x4 levels, "edm" prediction, trained under the VP SDE.

    Labelled by ln(nsr)/4 it knows nothing of the VP's own time, and VP reaches nsr 0 ... 148: the
    same weights run under VE, sub-VP and EDM SDEs whose noise stays below that.
    """
    return UNet(
        channels=32,
        channel_mult=(1, 2),
        resample_conv=False,
        embedding="fourier",
        embedding_width=64,
        predicts="edm",
        time="edm",
        sde=SDE,
        sample_shape=(1, 8, 8),
        sigma_data=SIGMA_DATA,
    )


def train_digits(
    out: str | os.PathLike[str], *, steps: int = STEPS, seed: int = 0, progress: bool = True
) -> TrainResult:
    """Train `digits_unet` on `digits` and write it, with averaged weights, to ``out``.

    This is ``sbm-fast train digits --out OUT --steps N --seed S``, which made the weights that
    ship. The file records the command, the held-out loss and the versions. It holds float16: half
    the size, and a relative rounding of 5e-4 is far below what the training noise leaves. Equal
    seeds give equal bytes on the same machine with the same number of threads (the shipped file:
    ``OMP_NUM_THREADS=1``); otherwise sums round differently.

    Args:
        out: safetensors file to write.
        steps: optimisation steps.
        seed: of the initial weights, batches and noise.
        progress: show a bar.

    Raises:
        ModuleNotFoundError: scikit-learn, which holds the images, is not installed.
        ValueError: ``steps`` is below 1.
    """
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_unet()
    result = train(
        model,
        SDE,
        data.train,
        steps=steps,
        held_out=data.held_out,
        seed=seed,
        progress=progress,
    )
    model.save(out, dtype=torch.float16, metadata=_record(steps, seed, result))
    return result


def _record(steps: int, seed: int, result: TrainResult) -> dict[str, Any]:
    # No times and no machine: equal training gives equal bytes.
    return {
        "command": f"sbm-fast train digits --out digits.safetensors --steps {steps} --seed {seed}",
        "data": "UCI optical recognition of handwritten digits, as in scikit-learn; i % 6 != 5",
        "held_out_loss": result.held_out_loss,
        "loss": "dsm, weighting 'variance', sum over 64 pixels, mean over i % 6 == 5 x 20 draws",
        "weights": "exponential moving average, stored as float16",
        "torch": torch.__version__,
        "sbm_fast": sbm_fast.__version__,
    }
