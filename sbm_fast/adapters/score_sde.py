"""Networks of score_sde (Song et al. 2021, arXiv 2011.13456; the PyTorch code): `load` a
checkpoint, `wrap` a live module."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbm_fast.adapters._network import fill
from sbm_fast.files import require_file, unreadable
from sbm_fast.ladder import DDPMSchedule, Ladder, NCSNLadder
from sbm_fast.model import ScoreModel, as_score_model
from sbm_fast.nn import DDPM, NCSNpp
from sbm_fast.nn.network import Network
from sbm_fast.sde import SDE, VESDE, VPSDE, SubVPSDE, as_sde

_COMMON = {
    "channels": "nf",
    "channel_mult": "ch_mult",
    "num_blocks": "num_res_blocks",
    "attention_resolutions": "attn_resolutions",
    "conditional": "conditional",
    "resample_conv": "resamp_with_conv",
    "scale_by_sigma": "scale_by_sigma",
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
    "num_scales": "num_scales",
    "nonlinearity": "nonlinearity",
    "dropout": "dropout",
}
_OF_NCSNPP = _COMMON | {
    "embedding": "embedding_type",
    "fourier_scale": "fourier_scale",
    "resblock": "resblock_type",
    "fir": "fir",
    "fir_kernel": "fir_kernel",
    "skip_rescale": "skip_rescale",
    "progressive": "progressive",
    "progressive_input": "progressive_input",
    "progressive_combine": "progressive_combine",
}
# What some configurations leave out, as another entry makes it idle: it is read only with that one.
_IDLE = {"fourier_scale": ("embedding_type", "fourier"), "fir_kernel": ("fir", True)}
_NETWORKS: dict[str, tuple[type[Network], dict[str, str]]] = {
    "ncsnpp": (NCSNpp, _OF_NCSNPP),
    "ddpm": (DDPM, _COMMON),
}


class Descending(nn.Module):
    """A network on N levels of σ that counts them in integers from the largest down.

    (x, index [B]) → module(x, N−1−index); a label between two levels is rounded, as score_sde does.
    """

    def __init__(self, module: Callable[..., Tensor], levels: int) -> None:
        super().__init__()
        self.module = module
        self.levels = levels
        self.training = getattr(module, "training", False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """The network's output at x [B, …]."""
        return self.module(x, (self.levels - 1 - label).round().long())


def load(path: str | os.PathLike[str], preset: object, *, ema: bool = True) -> ScoreModel:
    """The network of a checkpoint that score_sde's training wrote, ``checkpoint_N.pth``.

    The file holds weights and does not say of what: the configuration has to be given. The result's
    ``net`` is a `sbm_fast.nn.NCSNpp` or `sbm_fast.nn.DDPM` in evaluation mode, its ``sde`` what it
    was trained on; its ``metadata["data_range"]`` is the range of its samples ([0, 1] for
    VE networks, otherwise [−1, 1]).

    Args:
        path: the file. It is read by torch's reader of weights, which runs nothing from it.
        preset: a name, see `sbm_fast.nn.presets` ("ve/cifar10_ncsnpp_continuous" …); or a
            configuration of score_sde: anything with ``model``, ``data`` and ``training``, as
            attributes (``ml_collections``) or as keys.
        ema: the moving average of the weights, which the published figures are of; False: the
            weights themselves.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: preset is neither a name nor a configuration.
        ValueError: the configuration is unknown or incomplete; the file is no such checkpoint, is
            cut off, asks for anything but weights, or does not fit the configuration. The message
            names the file and the problem.
    """
    if not isinstance(ema, bool):
        raise TypeError(f"ema: expected True or False, got {ema!r}")
    require_file(path)
    # Its initial weights are drawn and thrown away; the generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        network = Network.from_preset(preset) if isinstance(preset, str) else _configured(preset)
    data = _read(path)
    try:
        fill(network, _tensors(network, data, ema=ema))
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"it does not fit the configuration given as preset: {error}"
        raise unreadable(path, problem) from error
    network.metadata |= {"source": "score_sde", "ema": ema, "step": int(data["step"])}
    return as_score_model(network.eval(), None)


def wrap(module: Callable[..., Tensor], sde: object, *, continuous: bool = True) -> ScoreModel:
    """A live network of score_sde: module(x, labels).

    ==================  ===========================  ====================  ======================
    SDE                 under                        the network gives     its labels
    ==================  ===========================  ====================  ======================
    VP, sub-VP          the SDE                      "eps"                 999 t
    VP, discrete        `DDPMSchedule` of its N β    "eps"                 0 … N−1
    VE                  the SDE                      "score"               σ
    VE, discrete        `NCSNLadder` of its N σ      "score"               N−1 … 0
    ==================  ===========================  ====================  ======================

    Args:
        module: neither copied nor changed: call its ``eval()`` yourself.
        sde: an SDE of score_sde or of this package; a ladder says by itself that it is discrete.
        continuous: ``config.training.continuous``. Sub-VP is continuous always.

    Raises:
        TypeError: module is not callable, sde is no SDE.
        ValueError: the SDE is not one of these.
    """
    if not callable(module) or isinstance(module, type):
        raise TypeError(f"module: expected a callable (x, labels) -> tensor, got {module!r:.80}")
    own = as_sde(sde)
    if not continuous and not isinstance(own, (Ladder, SubVPSDE)):
        own = _ladder(sde, own)
    if isinstance(own, (VPSDE, SubVPSDE)):
        return ScoreModel(module, predicts="eps", time="999t", sde=own)
    if isinstance(own, DDPMSchedule):
        return ScoreModel(module, predicts="eps", time="index", sde=own)
    if isinstance(own, VESDE):
        return ScoreModel(module, predicts="score", time="sigma", sde=own)
    if isinstance(own, NCSNLadder):
        return ScoreModel(Descending(module, own.levels), predicts="score", time="index", sde=own)
    raise ValueError(f"sde: expected a VP, sub-VP or VE SDE, got {own!r:.80}")


def _ladder(sde: Any, own: SDE) -> Ladder:
    """The N levels of the SDE, by the formulas of score_sde."""
    levels = getattr(sde, "N", None)
    if not isinstance(levels, int):
        raise ValueError("sde: expected an SDE with N levels, or a ladder, with continuous=False")
    if isinstance(own, VPSDE):
        return _chain(own.beta_min, own.beta_max, levels)
    if isinstance(own, VESDE):
        return NCSNLadder.geometric(own.sigma_max, own.sigma_min, levels)
    raise ValueError(f"sde: {type(own).__name__} has no discrete levels")


def _chain(beta_min: float, beta_max: float, levels: int) -> DDPMSchedule:
    return DDPMSchedule.linear(levels, beta_min / levels, beta_max / levels)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        # Mapped into memory, the optimiser's part of the file is never read.
        mapped = zipfile.is_zipfile(path)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # it raises of all kinds for what is no such file
        raise unreadable(path, f"it holds more than weights, or is cut off ({error})") from error
    for key, kind in (("model", dict), ("ema", dict), ("step", int)):
        if not isinstance(data, dict) or not isinstance(data.get(key), kind):
            raise unreadable(path, f"it has no {key!r}, so score_sde's training did not write it")
    return data


def _tensors(network: Network, data: Mapping[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """The ``state_dict()`` of the original, with the moving average where it is asked for."""
    tensors = {str(name).removeprefix("module."): value for name, value in data["model"].items()}
    _check_levels(network, tensors.pop("sigmas", None))
    if ema:
        # A list without names: the trainable parameters in the order of the module.
        names = [peer.name for peer in network.peer_tensors() if peer.trainable]
        average = data["ema"].get("shadow_params")
        if not isinstance(average, list) or len(average) != len(names):
            count = len(average) if isinstance(average, list) else "none"
            raise ValueError(f"expected {len(names)} averaged parameters, got {count}")
        tensors |= zip(names, average, strict=True)
    return tensors


def _check_levels(network: Network, sigmas: Any) -> None:
    """The file's table of σ is the configuration's, where the network has to do with σ."""
    config = network.config
    if network.predicts != "score" or not isinstance(sigmas, Tensor):
        return
    ends = [config["sigma_max"], config["sigma_min"], config["num_scales"]]
    if sigmas.ndim != 1 or not len(sigmas):
        raise ValueError(f"sigmas: expected a list of levels, got the shape {list(sigmas.shape)}")
    found = [float(sigmas[0]), float(sigmas[-1]), len(sigmas)]
    if not np.allclose(ends, found, rtol=1e-4):
        raise ValueError(f"its σ_max, σ_min and their number are {found}, expected {ends}")


def _configured(config: object) -> Network:
    """A new network of a configuration of score_sde."""
    model, data, training = (_part(config, name) for name in ("model", "data", "training"))
    name = str(_get(model, "model", "name"))
    if name not in _NETWORKS:
        raise ValueError(f"model.name: expected one of {', '.join(_NETWORKS)}, got {name!r}")
    cls, names = _NETWORKS[name]
    if (norm := _get(model, "model", "normalization")) != "GroupNorm":
        raise ValueError(f"model.normalization: expected 'GroupNorm', got {norm!r}")
    settled = [theirs for theirs in names.values() if theirs not in _IDLE]
    read = {theirs: _plain(_get(model, "model", theirs)) for theirs in settled}
    for idle, (switch, value) in _IDLE.items():
        if read.get(switch) == value:
            read[idle] = _plain(_get(model, "model", idle))
    arguments = {ours: read[theirs] for ours, theirs in names.items() if theirs in read}
    size, channels = _get(data, "data", "image_size"), _get(data, "data", "num_channels")
    centered = bool(_get(data, "data", "centered"))
    trained = _trained(str(_get(training, "training", "sde")), training, arguments, model)
    arguments |= dict(image_size=size, in_channels=channels, centered=centered, **trained)
    network = cls(**arguments, sample_shape=(channels, size, size))
    network.metadata = {"data_range": [-1, 1] if centered else [0, 1]}
    return network


def _trained(
    kind: str, training: object, arguments: Mapping[str, Any], model: object
) -> dict[str, Any]:
    """What the network predicts, its time and its SDE."""
    continuous = bool(_get(training, "training", "continuous"))
    levels = arguments["num_scales"]
    if kind == "vesde":
        ends = arguments["sigma_min"], arguments["sigma_max"]
        if continuous:
            return dict(predicts="score", time="sigma", sde=VESDE(*ends))
        ladder = NCSNLadder.geometric(ends[1], ends[0], levels)
        return dict(predicts="score", time="index", sde=ladder, ascending_labels=True)
    if kind not in ("vpsde", "subvpsde"):
        raise ValueError(f"training.sde: expected vpsde, subvpsde or vesde, got {kind!r}")
    low, high = (float(_get(model, "model", name)) for name in ("beta_min", "beta_max"))
    if kind == "subvpsde":
        return dict(predicts="eps", time="999t", sde=SubVPSDE(low, high))
    if continuous:
        return dict(predicts="eps", time="999t", sde=VPSDE(low, high))
    return dict(predicts="eps", time="index", sde=_chain(low, high, levels))


def _part(config: object, name: str) -> object:
    part = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if part is None:
        raise TypeError(
            "preset: expected a name or a configuration with model, data and training, got "
            f"a {type(config).__name__} without {name}"
        )
    return part


def _get(part: object, of: str, name: str) -> Any:
    value = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
    if value is None:
        raise ValueError(f"preset: {of}.{name} is missing")
    return value


def _plain(value: Any) -> Any:
    """Names in lower case, as score_sde reads them; lists as they are."""
    return value.lower() if isinstance(value, str) else value
