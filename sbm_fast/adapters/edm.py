"""Networks of EDM (Karras et al. 2022, arXiv 2206.00364): `load` a snapshot, `wrap` a live one.

EDM's snapshots are pickles that bring the source of their classes along. Here that source is not
run: the records of the classes' names, arguments and tensors become networks of this package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sbm_fast.adapters._network import build
from sbm_fast.adapters._unpickle import Record, read_pickle
from sbm_fast.files import unreadable
from sbm_fast.model import ScoreModel, as_score_model
from sbm_fast.nn import ADM, SongUNet
from sbm_fast.nn.labels import HalfLog, NearestLevel, Steps
from sbm_fast.nn.network import Network
from sbm_fast.sde import EDMSDE, VESDE, VPSDE, DDPMSchedule

SIGMAS = (0.002, 80.0)
"""Noise levels of EDM's samplers, for networks that name none of their own."""

_ARGUMENTS = {
    "img_resolution": "image_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "label_dim": "label_dim",
    "augment_dim": "augment_dim",
    "model_channels": "channels",
    "channel_mult": "channel_mult",
    "channel_mult_emb": "channel_mult_emb",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attention_resolutions",
    "dropout": "dropout",
    "label_dropout": "label_dropout",
}
_ARGUMENTS_OF_SONG = _ARGUMENTS | {
    "embedding_type": "embedding",
    "channel_mult_noise": "channel_mult_noise",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
    "resample_filter": "fir_kernel",
}
_NETWORKS: dict[str, tuple[type[Network], dict[str, str]]] = {
    "SongUNet": (SongUNet, _ARGUMENTS_OF_SONG),
    "DhariwalUNet": (ADM, _ARGUMENTS),
}


_PROBLEMS = (
    TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError
)  # fmt: skip
_MODULES = 10_000  # EDM's largest network has a tenth of that


def load(path: str | os.PathLike[str]) -> ScoreModel:
    """The network ``ema`` of a snapshot that EDM's training wrote, such as its published ones.

    =================  ============================  =====================  ======================
    preconditioning    SDE                           the network predicts   its time
    =================  ============================  =====================  ======================
    ``EDMPrecond``     `EDMSDE`                      "edm"                  ¼ ln σ
    ``VPPrecond``      `VPSDE`                       "eps"                  (M − 1) t
    ``VEPrecond``      `VESDE`                       "eps" (its F is −ε)    ln(σ/2)
    ``iDDPMPrecond``   `DDPMSchedule` of its levels  "eps", and a variance  index, the nearest one
    =================  ============================  =====================  ======================

    ``net`` of the result is a `sbm_fast.nn.SongUNet` or `sbm_fast.nn.ADM` in evaluation mode and
    float32, with ``use_fp16`` and the class names in its ``metadata``. The sign of VE networks is
    taken into the weights of their last convolution. A network with classes takes
    ``cond={"class_labels": …}``, int [B] or one-hot [B, label_dim]; none of them is zeros.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such snapshot, is cut off, or asks for anything but data; the message
            names the file and the problem.
    """
    data = read_pickle(path)
    outer = data.get("ema") if isinstance(data, dict) else data
    try:
        if not isinstance(outer, Record) or outer.class_name not in _PRECONDITIONINGS:
            known = ", ".join(_PRECONDITIONINGS)
            raise ValueError(f"expected a network of class {known}, got {_named(outer)}")
        network = _network(outer)
    except _PROBLEMS as error:
        raise unreadable(path, f"its network is not usable: {error}") from error
    return as_score_model(network, None)


def wrap(net: Any) -> ScoreModel:
    """A live network of EDM's code: net(x, σ, class_labels=None) → D.

    It runs under `EDMSDE` over its own ``sigma_min`` … ``sigma_max`` where these are positive and
    finite, otherwise over those of EDM's samplers, 0.002 … 80. From D, the score at a small σ has
    few digits left, (D − x)/σ²; `load` takes the raw output, which has them.

    Raises: TypeError for anything that is no such network.
    """
    if not callable(net) or not hasattr(net, "sigma_min") or not hasattr(net, "sigma_max"):
        raise TypeError(
            "net: expected a network of EDM, net(x, sigma, class_labels) with sigma_min and "
            f"sigma_max, got {type(net).__name__}"
        )
    channels, size = getattr(net, "img_channels", None), getattr(net, "img_resolution", None)
    return ScoreModel(
        net,
        predicts="x0",
        time="sigma",
        sde=_range(net.sigma_min, net.sigma_max),
        sample_shape=(channels, size, size) if channels and size else None,
        null_cond={"class_labels": None} if getattr(net, "label_dim", 0) else None,
    )


def _range(low: float, high: float) -> EDMSDE:
    return EDMSDE(low if low > 0 else SIGMAS[0], high if np.isfinite(high) else SIGMAS[1])


def _edm(state: Mapping[str, Any]) -> dict[str, Any]:
    low, high = max(SIGMAS[0], state["sigma_min"]), min(SIGMAS[1], state["sigma_max"])
    sigma_data = float(state["sigma_data"])
    return dict(predicts="edm", time="edm", sde=EDMSDE(low, high), sigma_data=sigma_data)


def _vp(state: Mapping[str, Any]) -> dict[str, Any]:
    sde = VPSDE(float(state["beta_min"]), float(state["beta_min"]) + float(state["beta_d"]))
    steps = Steps(state["M"])
    return dict(predicts="eps", time="999t" if steps == Steps(1000) else steps, sde=sde)


def _ve(state: Mapping[str, Any]) -> dict[str, Any]:
    sde = VESDE(float(state["sigma_min"]), float(state["sigma_max"]))
    return dict(predicts="eps", time=HalfLog(sde), sde=sde)


def _iddpm(state: Mapping[str, Any]) -> dict[str, Any]:
    u = state["_buffers"]["u"]
    if not isinstance(u, Tensor) or u.ndim != 1 or len(u) < 2 or u[-1] != 0:
        raise ValueError("u: expected the noise levels, from the largest down to 0")
    # u_M = 0 is no level. With ᾱ = 1/(1 + u²): β_i = 1 − ᾱ_i/ᾱ_{i−1}.
    squares = u.double().numpy()[::-1] ** 2
    sde = DDPMSchedule(np.diff(squares) / (1 + squares[1:]))
    return dict(predicts="eps", time=NearestLevel(sde), sde=sde, variance="learned_range")


_PRECONDITIONINGS = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}


def _network(outer: Record) -> Network:
    inner = outer.state["_modules"]["model"]
    if not isinstance(inner, Record) or inner.class_name not in _NETWORKS:
        raise ValueError(f"expected a model of {', '.join(_NETWORKS)}, got {_named(inner)}")
    cls, names = _NETWORKS[inner.class_name]
    config = _config(inner, names)
    tensors = _tensors(inner)
    if outer.class_name == "VEPrecond":
        # D = x + σ F: there F is −ε. All of F comes from these convolutions.
        last = [name for name in tensors if "aux_conv." in name or name.startswith("out_conv.")]
        tensors |= {name: -tensors[name] for name in last}
    size, channels = config["image_size"], config["in_channels"]
    carried = _PRECONDITIONINGS[outer.class_name](outer.state)
    carried["sample_shape"] = (channels, size, size)
    # The filters of resampling follow from the configuration.
    tensors = {name: t for name, t in tensors.items() if not name.endswith("resample_filter")}
    network = build(cls, config, carried, tensors)
    network.metadata = {
        "source": "EDM",
        "preconditioning": outer.class_name,
        "model": inner.class_name,
        "use_fp16": bool(outer.state.get("use_fp16", False)),
        "data_range": [-1, 1],
    }
    return network


def _config(inner: Record, names: Mapping[str, str]) -> dict[str, Any]:
    """The arguments it was made with, under our names."""
    given = dict(zip(names, inner.state["_init_args"], strict=False)) | inner.state["_init_kwargs"]
    if unknown := given.keys() - names.keys():
        raise ValueError(f"{inner.class_name} has an argument {min(unknown)!r} that is not known")
    config = {names[name]: value for name, value in given.items()}
    for name in ("image_size", "in_channels", "out_channels"):
        if type(config.get(name)) is not int:
            raise ValueError(f"{inner.class_name} was made without an integer {name}")
    return config


def _tensors(record: Record) -> dict[str, Tensor]:
    """Its ``state_dict()``."""
    found: dict[str, Tensor] = {}
    modules = [("", record)]
    for prefix, module in modules:  # grows by the children of what it holds
        for kind in ("_parameters", "_buffers"):
            for name, value in module.state[kind].items():
                if isinstance(value, Tensor):
                    found[f"{prefix}{name}"] = value
        for name, child in module.state["_modules"].items():
            if isinstance(child, Record):
                modules.append((f"{prefix}{name}.", child))
        if len(modules) > _MODULES:
            raise ValueError(f"it has more than {_MODULES} modules, or one that holds itself")
    return found


def _named(value: Any) -> str:
    return f"a {value.class_name}" if isinstance(value, Record) else f"a {type(value).__name__}"
