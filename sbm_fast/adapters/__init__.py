"""Networks that were trained elsewhere, as a ready `sbm_fast.ScoreModel` with its training SDE.

>>> model = sbm_fast.adapters.edm.load("edm-cifar10-32x32-cond-vp.pkl")
>>> x = sbm_fast.sample(model, model.sde, method="edm", cond={"class_labels": labels})

`score_sde`, `edm` and `diffusers` read what those programs wrote and wrap their live objects;
`levels` joins one network per noise level. Nothing from a file is executed: code that a file brings
along stays unread, and anything that it asks to be called is an error that says so.
"""

from sbm_fast.adapters import diffusers, edm, score_sde
from sbm_fast.adapters._levels import levels

__all__ = ["diffusers", "edm", "levels", "score_sde"]
