"""Makes tests/golden/edm/*: snapshots by EDM's own code, and what that code computes with them.

    python tests/adapters/make_edm_golden.py CHECKOUT     (of github.com/NVlabs/edm)

A snapshot is what EDM's training writes, but for two things: the source of its classes, which is
not ours to give on, is left empty, and the weights are mostly 0, so that xz makes little of them.
EDM's code is not needed by the tests and is not part of this package.
"""

from __future__ import annotations

import lzma
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"
SMALL = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
WIDE = dict(model_channels=64, channel_mult=[1], channel_mult_emb=1, num_blocks=1)
NCSNPP = dict(
    embedding_type="fourier",
    channel_mult_noise=2,
    encoder_type="residual",
    resample_filter=[1, 3, 3, 1],
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "edm_ddpmpp": ("EDMPrecond", dict(model_type="SongUNet", label_dim=3, augment_dim=9, **SMALL)),
    "vp_ddpmpp": ("VPPrecond", dict(model_type="SongUNet", use_fp16=True, **SMALL)),
    "ve_ncsnpp": ("VEPrecond", dict(model_type="SongUNet", augment_dim=9, **SMALL, **NCSNPP)),
    "iddpm_adm": ("iDDPMPrecond", dict(label_dim=3, attn_resolutions=[8], M=50, **WIDE)),
}


def sparse(shape: torch.Size, random: np.random.Generator) -> torch.Tensor:
    """Mostly 0, a few ±2^-k of the size that keeps activations near 1."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
    scale = 2.0 ** round(np.log2((32 / fan_in) ** 0.5))
    values = random.choice([0.0, scale, -scale], size=tuple(shape), p=[0.97, 0.015, 0.015])
    return torch.from_numpy(values.astype(np.float32))


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    from training import networks  # type: ignore[import-not-found]

    for name in dir(networks):
        if hasattr(getattr(networks, name), "_orig_module_src"):
            getattr(networks, name)._orig_module_src = ""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for number, (name, (kind, options)) in enumerate(CASES.items()):
        random = np.random.default_rng(number)
        net = getattr(networks, kind)(8, 3, **options).eval().requires_grad_(False)
        for parameter in net.parameters():
            of_norm = 1.0 if parameter.ndim == 1 and (parameter == 1).all() else 0.0
            parameter.copy_(of_norm + sparse(parameter.shape, random))
        x = torch.from_numpy(random.standard_normal((4, 3, 8, 8)).astype(np.float32))
        low, high = max(net.sigma_min, 0.002), min(net.sigma_max, 80.0)
        sigma = torch.from_numpy(np.geomspace(low * 1.01, high * 0.99, 4)).float()
        labels = torch.eye(3)[[0, 1, 2, 0]] if net.label_dim else None
        calls: list[Any] = []
        hook = net.model.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        state = x * (1 + sigma[:, None, None, None] ** 2).sqrt()
        arrays = {"x": state, "sigma": sigma, "denoised": net(state, sigma, labels)}
        _, (_, arrays["label"], *_), arrays["F"] = calls[0]
        hook.remove()
        assert torch.isfinite(arrays["F"]).all()
        arrays |= {} if labels is None else {"class_labels": labels}
        np.savez_compressed(GOLDEN / f"{name}.npz", **{k: v.numpy() for k, v in arrays.items()})
        data = pickle.dumps({"ema": net, "dataset_kwargs": {"resolution": 8}})
        (GOLDEN / f"{name}.pkl.xz").write_bytes(lzma.compress(data, preset=9))
        print(name, len(data), (GOLDEN / f"{name}.pkl.xz").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
