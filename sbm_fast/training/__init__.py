"""Training of score models: losses, averaged weights, the loop, and the digits shipped with it."""

from sbm_fast.training.digits import train_digits
from sbm_fast.training.ema import EMA
from sbm_fast.training.train import TrainResult, held_out_loss, train

__all__ = ["EMA", "TrainResult", "held_out_loss", "train", "train_digits"]
