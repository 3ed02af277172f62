"""Ops that fill a tensor with counter-based noise (the noise contract: see `sbm_fast.noise`).

`<kind>_(out [B, …], keys int64 [B], draw, stream)` writes, for every sample b, elements 4j … 4j+3
(logical C order, whatever out's memory format) from the words of
Philox4x32-10(counter=(j_lo, j_hi, draw, stream), key=keys[b]). `keys_(out int64 [B], seed,
first_sample)` writes the keys of consecutive global samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sbm_fast.ops import _philox
from sbm_fast.ops._library import register


def _fill_reference(transform: Callable[[_philox.Words], Tensor]) -> Callable[..., None]:
    def reference(out: Tensor, keys: Tensor, draw: int, stream: int) -> None:
        if out.numel() == 0:
            return
        numel = out[0].numel()
        values = transform(_philox.sample_words(keys, numel, draw, stream))
        # Rounded to float32 first: float64 tensors hold the same law, not a finer one.
        if values.is_floating_point():
            values = values.to(torch.float32)
        out.copy_(values[:, :numel].reshape(out.shape))

    return reference


_TRANSFORMS = {
    "normal": _philox.to_normal,
    "uniform": _philox.uniforms,
    "rademacher": _philox.signs,
    "words": _philox.words_int32,
}
REFERENCES = {kind: _fill_reference(t) for kind, t in _TRANSFORMS.items()}
OPS = {
    kind: register(f"{kind}_(Tensor(a!) out, Tensor keys, int draw, int stream) -> ()", reference)
    for kind, reference in REFERENCES.items()
}


def keys_reference(out: Tensor, seed: int, first_sample: int) -> None:
    _philox.sample_keys(seed, first_sample, out)


keys_ = register("keys_(Tensor(a!) out, int seed, int first_sample) -> ()", keys_reference)
