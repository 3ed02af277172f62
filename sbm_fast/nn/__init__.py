"""Networks that know what they predict, the time they take and the SDE they were trained under."""

from sbm_fast.nn import functional, presets
from sbm_fast.nn.adm import ADM
from sbm_fast.nn.checkpoint import read_metadata
from sbm_fast.nn.mlp import MLP
from sbm_fast.nn.ncsnpp import DDPM, NCSNpp
from sbm_fast.nn.network import Network, Prepared
from sbm_fast.nn.norm import GroupNormSiLU
from sbm_fast.nn.songunet import SongUNet
from sbm_fast.nn.unet import UNet

__all__ = [
    "ADM",
    "DDPM",
    "MLP",
    "GroupNormSiLU",
    "NCSNpp",
    "Network",
    "Prepared",
    "SongUNet",
    "UNet",
    "functional",
    "presets",
    "read_metadata",
]
