"""The networks and the data that likelihoods are measured on."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkout import ROOT
from sbm_fast import VPSDE, noise
from sbm_fast.data import digits
from sbm_fast.nn import UNet, shipped
from sbm_fast.training.digits import SIGMA_DATA
from sbm_fast.training.train import train

CACHE = ROOT / "build" / "likelihood"
STEPS = 400
SEED = 0
LEVELS = 17


@dataclass(frozen=True, eq=False)
class Model:
    """A network and the held-out loss of its weights."""

    name: str
    network: UNet
    held_out_loss: float


def shipped_digits() -> Model:
    """The network that comes with the package."""
    network = shipped.digits().eval()
    return Model("shipped digits", network, float(network.metadata["held_out_loss"]))


def wide_unet() -> Model:
    """Four times as many weights, trained here for a few hundred steps; kept under build/."""
    path = CACHE / f"unet-{STEPS}-{SEED}.safetensors"
    if not path.exists():
        _train(path)
    network = UNet.load(path).eval()
    return Model("U-Net", network, float(network.metadata["held_out_loss"]))


def _train(path: Path) -> None:
    data, sde = digits(), VPSDE()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = UNet(
            channels=64,
            channel_mult=(1, 2),
            resample_conv=False,
            embedding="fourier",
            embedding_width=64,
            predicts="edm",
            time="edm",
            sde=sde,
            sample_shape=(1, 8, 8),
            sigma_data=SIGMA_DATA,
        )
    held_out = data.held_out
    # A shorter memory than the default's 1000 steps, which are more than there are.
    done = train(
        network,
        sde,
        data.train,
        steps=STEPS,
        ema_decay=0.99,
        held_out=held_out,
        seed=SEED,
        progress=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save(path, metadata={"held_out_loss": done.held_out_loss, "steps": STEPS})


def dequantised(samples: int) -> tuple[Tensor, Tensor]:
    """The first held-out digits, x + (u − ½)/8 with fixed u, and the keys of their probes."""
    x, keys = digits().held_out[:samples], noise.keys(SEED, samples)
    u = noise.uniform(None, x.shape, keys=keys, stream=noise.DEQUANTISATION)
    return x + (u - 0.5) * (2 / (LEVELS - 1)), keys


def signs(keys: Tensor, probes: int, shape: tuple[int, ...]) -> Tensor:
    """The probes that `sbm_fast.log_likelihood` draws, [K, N, …]."""
    return torch.stack(
        [
            noise.rademacher(None, (len(keys), *shape), keys=keys, draw=k, stream=noise.PROBE)
            for k in range(probes)
        ]
    )


def in_float64(network: UNet) -> UNet:
    """A copy; its weights are the same numbers."""
    return copy.deepcopy(network).double()


def digest(network: UNet) -> str:
    """Names the weights."""
    whole = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        whole.update(name.encode())
        whole.update(value.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]
