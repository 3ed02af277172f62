"""Writes networks.npz: outputs of the published code for the cases of `tests/network_cases.py`.

    PYTHONPATH=.:tests python tests/golden/make_networks.py SCORE_SDE_PYTORCH EDM

with clones of github.com/yang-song/score_sde_pytorch (made with cb1f359) and github.com/NVlabs/edm
(008a4e5). Their code runs unchanged but for two calls that torch rejects (a flip by a negative
stride, a mode passed by position), and for the CUDA filter, in whose place stands its own
``upfirdn2d_native``.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network_cases import CASES, Case, tensor
from torch import Tensor, nn

NAMES = {
    **{"channels": "nf", "channel_mult": "ch_mult", "num_blocks": "num_res_blocks"},
    **{"attention_resolutions": "attn_resolutions", "resample_conv": "resamp_with_conv"},
    **{"resblock": "resblock_type", "embedding": "embedding_type"},
}
EDM_NAMES = {
    **{"channels": "model_channels", "attention_resolutions": "attn_resolutions"},
    **{"embedding": "embedding_type", "encoder": "encoder_type", "decoder": "decoder_type"},
    "fir_kernel": "resample_filter",
}
CLASSES = {"NCSNpp": "ncsnpp", "DDPM": "ddpm", "SongUNet": "SongUNet", "ADM": "DhariwalUNet"}


class Options(dict[str, Any]):
    """ml_collections.ConfigDict, as far as it is needed."""

    __getattr__ = dict.__getitem__


def module(name: str, source: str = "", **members: object) -> types.ModuleType:
    """A module of that source, importable."""
    made = types.ModuleType(name)
    made.__dict__.update(members)
    sys.modules[name] = made
    exec(source, made.__dict__)
    return made


def score_sde(folder: Path) -> dict[str, Any]:
    """Classes by the name of their file in models/."""
    source = (folder / "op" / "upfirdn2d.py").read_text()
    native = source[source.index("def upfirdn2d_native") :]
    op = module("op", "import torch\nfrom torch.nn import functional as F\n" + native)

    def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: Any = (0, 0)) -> Any:
        return op.upfirdn2d_native(x, kernel, up, up, down, down, *pad, *pad)

    op.__dict__["upfirdn2d"] = upfirdn2d
    module("sde_lib")
    module("models").__path__ = []
    for name in ("utils", "normalization", "layers", "up_or_down_sampling", "layerspp"):
        text = (folder / "models" / f"{name}.py").read_text()
        text = text.replace("(H * 2, W * 2), 'nearest'", "(H * 2, W * 2), mode='nearest'")
        text = text.replace("w[..., ::-1, ::-1]", "w.flip(-1, -2)")
        setattr(sys.modules["models"], name, module(f"models.{name}", in_package(text)))
    files = {name: (folder / "models" / f"{name}.py").read_text() for name in ("ncsnpp", "ddpm")}
    made = {name: module(f"models.{name}", in_package(text)) for name, text in files.items()}
    return {"ncsnpp": made["ncsnpp"].NCSNpp, "ddpm": made["ddpm"].DDPM}


def in_package(text: str) -> str:
    return "__package__ = 'models'\n" + text


def edm(folder: Path) -> dict[str, Any]:
    """Classes by their name."""
    module("torch_utils").__dict__["persistence"] = module(
        "torch_utils.persistence", persistent_class=lambda cls: cls
    )
    return vars(module("edm", (folder / "training" / "networks.py").read_text()))


def original(case: Case, classes: dict[str, Any]) -> nn.Module:
    """The published code's module of this case, its weights drawn by formula."""
    config = case.cls(image_size=case.size, **case.config).config
    name = CLASSES[case.cls.__name__]
    if name in ("ncsnpp", "ddpm"):
        model = {NAMES.get(key, key): value for key, value in config.items()}
        model |= {"init_scale": 0.0, "normalization": "GroupNorm"}
        data = Options(image_size=case.size, num_channels=3, centered=config["centered"])
        training = Options(continuous=True)
        net = classes[name](Options(model=Options(model), data=data, training=training))
    else:
        given = {EDM_NAMES.get(key, key): value for key, value in config.items()}
        size = given.pop("image_size")
        given.pop("channels_per_head", None)
        net = classes[name](img_resolution=size, **given)
    fixed = ("sigmas", "resample_filter")
    state = {
        key: value if key.endswith(fixed) else tensor(key, tuple(value.shape))
        for key, value in net.state_dict().items()
    }
    net.load_state_dict(state)
    return net.eval()


def output(case: Case, net: nn.Module) -> np.ndarray:
    label = torch.tensor(case.labels)
    if case.cls.__name__ == "DDPM":
        label = label.long()
    cond: list[Any] = []
    if case.cls.__name__ in ("SongUNet", "ADM"):
        classes = case.cond.get("class_labels")
        width = case.config.get("label_dim", 0)
        one_hot = None if classes is None else nn.functional.one_hot(classes, width).float()
        cond = [one_hot, case.cond.get("augment_labels")]
    with torch.no_grad():
        return net(case.image(), label, *cond).float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("score_sde", type=Path)
    parser.add_argument("edm", type=Path)
    args = parser.parse_args()
    classes = score_sde(args.score_sde) | edm(args.edm)
    outputs = {name: output(case, original(case, classes)) for name, case in CASES.items()}
    np.savez(Path(__file__).with_name("networks.npz"), **outputs)


if __name__ == "__main__":
    main()
