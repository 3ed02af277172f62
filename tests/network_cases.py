"""Tiny networks of every class, with weights and inputs drawn by a formula: tests share them, and
`tests/golden/make_networks.py` gives the same ones to the published code."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.nn import ADM, DDPM, NCSNpp, Network, SongUNet
from sbm_fast.nn.peer_weights import from_peer


@dataclass(frozen=True, eq=False)
class Case:
    """A configuration, the labels it is asked at, and its conditioning."""

    cls: type[Network]
    config: dict[str, Any]
    labels: tuple[float, ...]
    classes: tuple[int, ...] | None = None
    augmented: bool = False
    size: int = field(default=16)

    @property
    def cond(self) -> dict[str, Tensor]:
        found = {}
        if self.classes is not None:
            found["class_labels"] = torch.tensor(self.classes)
        if self.augmented:
            found["augment_labels"] = draw("augment_labels", (len(self.labels), 9))
        return found

    def image(self) -> Tensor:
        x = draw("image", (len(self.labels), 3, self.size, self.size))
        return x if self.config.get("centered", True) else torch.sigmoid(x)

    def network(self) -> Network:
        """In evaluation mode, with the published code's tensors drawn by `tensor`."""
        return copy.deepcopy(_made(self))


@functools.cache
def _made(case: Case) -> Network:
    net = case.cls(image_size=case.size, **case.config).eval()
    drawn = {peer.name: tensor(peer.name, peer.shape) for peer in net.peer_tensors()}
    net.load_state_dict(from_peer(net, drawn))
    return net


SMALL: dict[str, Any] = {
    **{"channels": 8, "channel_mult": (1, 2), "num_blocks": 1},
    "attention_resolutions": (8,),
}
VE: dict[str, Any] = {
    **{"embedding": "fourier", "scale_by_sigma": True, "centered": False},
    **{"predicts": "score", "time": "sigma"},
}
FIR = (1, 3, 3, 1)
INDEX, SIGMA, NOISE = (2.0, 961.0), (0.013, 41.7), (-1.3, 0.9)
CASES = {
    "ddpmpp": Case(NCSNpp, SMALL, INDEX),
    "ncsnpp": Case(NCSNpp, {**SMALL, **VE, "fir": True, "progressive_input": "residual"}, SIGMA),
    "ncsnpp_pyramids": Case(
        NCSNpp,
        {
            **{**SMALL, **VE, "fir": True, "channel_mult": (1, 1, 2)},
            **{"progressive": "output_skip", "progressive_input": "input_skip"},
        },
        SIGMA,
    ),
    "ncsnpp_ddpm_blocks": Case(
        NCSNpp,
        {
            **{**SMALL, "resblock": "ddpm", "skip_rescale": False, "progressive": "residual"},
            **{"progressive_input": "input_skip", "progressive_combine": "cat"},
        },
        INDEX,
    ),
    "ncsnpp_unconditional": Case(
        NCSNpp, {**SMALL, "conditional": False, "scale_by_sigma": True}, INDEX
    ),
    "ddpm": Case(
        DDPM,
        {**SMALL, "channels": 32, "centered": False, "scale_by_sigma": True},
        INDEX,
        size=8,
    ),
    "song_ddpmpp": Case(
        SongUNet, {**SMALL, "label_dim": 5, "augment_dim": 9}, NOISE, (1, 3), augmented=True
    ),
    "song_ncsnpp": Case(
        SongUNet,
        {
            **{**SMALL, "embedding": "fourier", "channel_mult_noise": 2},
            **{"encoder": "residual", "fir_kernel": FIR},
        },
        NOISE,
    ),
    "song_skips": Case(
        SongUNet, {**SMALL, "encoder": "skip", "decoder": "skip", "fir_kernel": FIR}, NOISE
    ),
    "adm": Case(
        ADM,
        {**SMALL, "channels": 64, "channel_mult": (1, 1), "label_dim": 5},
        NOISE,
        (1, 3),
        size=8,
    ),
}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normals of a seed that the name gives."""
    values = noise.normal(zlib.crc32(name.encode()), (1, max(1, math.prod(shape))))
    return values[0, : math.prod(shape)].reshape(shape)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the published code: sums over inputs keep their variance, nothing is zero."""
    z = draw(name, shape)
    if name.endswith(("freqs", "all_modules.0.W")):
        return 4 * z
    if name.endswith(".W"):
        return 1.3 * z / math.sqrt(shape[0])
    if len(shape) > 1:
        return 1.3 * z / math.sqrt(math.prod(shape[1:]))
    return 0.2 * z + (1.0 if name.endswith("weight") else 0.0)
