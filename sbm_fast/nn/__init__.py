"""Networks that know what they predict, the time they take and the SDE they were trained under."""

from sbm_fast.nn.checkpoint import read_metadata
from sbm_fast.nn.unet import UNet

__all__ = ["UNet", "read_metadata"]
