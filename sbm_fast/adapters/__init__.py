"""Networks that were trained elsewhere, as a ready `sbm_fast.ScoreModel` with its training SDE.

>>> model = sbm_fast.adapters.diffusers.load("google/ddpm-cifar10-32")
>>> x = sbm_fast.sample(model, model.sde, num_samples=16, method="ddim", steps=50)

`diffusers` reads folders, repositories and live objects of Hugging Face diffusers; `levels` joins
one network per noise level. Nothing from a file is executed: code that a file brings along, or asks
for, is an error that says so.
"""

from sbm_fast.adapters import diffusers
from sbm_fast.adapters._levels import levels

__all__ = ["diffusers", "levels"]
