"""Makes tests/golden/score_sde/*: checkpoints by score_sde's own code, and its scores with them.

    python tests/adapters/make_score_sde_golden.py CHECKOUT  (of yang-song/score_sde_pytorch)

A checkpoint is what its training writes, but for the optimiser's state, which is left empty, and
for weights that are mostly 0, so that xz makes little of them. Its code compiles CUDA extensions at
import; a stand-in gives it the filter in plain torch.
"""

from __future__ import annotations

import io
import lzma
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from score_sde_cases import CASES, Config
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "score_sde"


def sparse(shape: torch.Size, random: np.random.Generator) -> Tensor:
    """Mostly 0, a few ±2^-k of the size that keeps activations near 1."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
    scale = 2.0 ** round(np.log2((32 / fan_in) ** 0.5))
    values = random.choice([0.0, scale, -scale], size=tuple(shape), p=[0.97, 0.015, 0.015])
    return torch.from_numpy(values.astype(np.float32))


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: Any = (0, 0)) -> Tensor:
    """Zeros between the pixels, padding, convolution with the flipped kernel, every n-th pixel."""
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height * up, width * up)
    spread[:, :, ::up, ::up] = x
    spread = torch.nn.functional.pad(spread, (*pad, *pad))
    weight = kernel.flip(0, 1).expand(channels, 1, *kernel.shape)
    return torch.nn.functional.conv2d(spread, weight, groups=channels)[:, :, ::down, ::down]


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    sys.modules["op"] = types.ModuleType("op")
    sys.modules["op"].upfirdn2d = upfirdn2d  # type: ignore[attr-defined]
    import sde_lib  # type: ignore[import-not-found]
    from models import ddpm, ema, ncsnpp, utils  # type: ignore[import-not-found]

    GOLDEN.mkdir(parents=True, exist_ok=True)
    for number, (name, config) in enumerate(CASES.items()):
        random = np.random.default_rng(number)
        cls = {"ncsnpp": ncsnpp.NCSNpp, "ddpm": ddpm.DDPM}[config.model.name]
        net = torch.nn.DataParallel(cls(config)).eval()
        average = ema.ExponentialMovingAverage(net.parameters(), decay=0.999)
        for weights in (net.parameters(), average.shadow_params):
            for parameter in weights:
                if not isinstance(parameter, torch.nn.Parameter) or parameter.requires_grad:
                    of_norm = 1.0 if parameter.ndim == 1 and (parameter == 1).all() else 0.0
                    parameter.data.copy_(of_norm + sparse(parameter.shape, random))
        state = {"optimizer": {}, "model": net.state_dict(), "step": 17}
        kept = ("decay", "num_updates", "shadow_params")
        state["ema"] = {key: getattr(average, key) for key in kept}
        file = io.BytesIO()
        torch.save(state, file)
        (GOLDEN / f"{name}.pth.xz").write_bytes(lzma.compress(file.getvalue(), preset=9))
        t = torch.tensor([0.02, 0.3, 1.0])
        x = torch.from_numpy(random.standard_normal((3, 3, 8, 8)).astype(np.float32))
        arrays = {"t": t, "x": x, "model": score(sde_lib, utils, net, config, x, t)}
        average.copy_to(net.parameters())
        arrays["ema"] = score(sde_lib, utils, net, config, x, t)
        np.savez_compressed(GOLDEN / f"{name}.npz", **{k: v.numpy() for k, v in arrays.items()})
        print(name, len(file.getvalue()), (GOLDEN / f"{name}.pth.xz").stat().st_size)


@torch.no_grad()
def score(sde_lib: Any, utils: Any, net: Any, config: Config, x: Tensor, t: Tensor) -> Tensor:
    """score_sde's score at times t; a discrete network is asked on the levels nearest to t."""
    kinds = {"vpsde": sde_lib.VPSDE, "subvpsde": sde_lib.subVPSDE, "vesde": sde_lib.VESDE}
    model = config.model
    ends = (model.sigma_min, model.sigma_max)
    ends = ends if config.training.sde == "vesde" else (model.beta_min, model.beta_max)
    sde = kinds[config.training.sde](*ends, model.num_scales)
    if not config.training.continuous:
        t = (t * (sde.N - 1)).round() / (sde.N - 1)
    return utils.get_score_fn(sde, net, continuous=config.training.continuous)(x, t)


if __name__ == "__main__":
    main(sys.argv[1])
