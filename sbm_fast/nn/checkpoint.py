"""Checkpoints of this package's networks: safetensors, with everything else as one JSON entry.

The header of a safetensors file holds strings. One of them, ``sbm_fast``, is a JSON object:

    {"class": "UNet", "version": 1, "config": {...}, "predicts": "edm", "time": "edm",
     "sde": {"class": "VPSDE", "beta_min": 0.1, "beta_max": 20.0} or null,
     "sample_shape": [1, 8, 8] or null, "sigma_data": 0.5, "metadata": {...}}

and "null_cond" and "variance" where the network has them. "time" is an object like "sde"
where it is one of `sbm_fast.nn.labels`.

It is one entry, not several, so that the same weights always give the same bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sbm_fast.files import require_file, require_held, unreadable
from sbm_fast.nn.embedding import Embedding

if TYPE_CHECKING:
    from sbm_fast.nn.network import Network
    from sbm_fast.sde import SDE

T = TypeVar("T", bound="Network")
VERSION = 1
_KEY = "sbm_fast"
_ATTRIBUTES = ("predicts", "time", "sample_shape", "sigma_data")
_OPTIONAL = ("null_cond", "variance")
_STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What a checkpoint may name as its SDE or its time; a class name from a file is never looked up
# anywhere else.
_SDES = {
    "VESDE": ("sigma_min", "sigma_max"),
    "VPSDE": ("beta_min", "beta_max"),
    "SubVPSDE": ("beta_min", "beta_max"),
    "EDMSDE": ("sigma_min", "sigma_max"),
    "NCSNLadder": ("sigmas",),
    "DDPMSchedule": ("betas",),
}
_LABELS = {"HalfLog": ("sde",), "Steps": ("steps",), "NearestLevel": ("sde",)}


def save(
    model: Network,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write ``model`` to ``path``; see `Network.save`."""
    if dtype is not None and dtype not in _STORED:
        raise ValueError(f"dtype must be a float type of torch, got {dtype}")
    name = type(model).__name__
    if classes().get(name) is not type(model):
        raise TypeError(f"only {', '.join(classes())} can be saved, got {name}")
    header = {
        "class": name,
        "version": VERSION,
        "config": model.config,
        **{name: getattr(model, name) for name in _ATTRIBUTES},
        "time": _describe_time(model.time),
        "sde": describe_sde(model.sde),
        "metadata": model.metadata if metadata is None else metadata,
    }
    header |= {key: value for key in _OPTIONAL if (value := getattr(model, key)) is not None}
    exact = {f"{key}.frequencies" for key, m in model.named_modules() if isinstance(m, Embedding)}
    weights = {
        key: tensor.detach().to("cpu", None if key in exact else dtype).contiguous()
        for key, tensor in model.state_dict().items()
    }
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise TypeError(f"null_cond or metadata cannot be stored as JSON: {error}") from error
    data = safetensors.torch.save(weights, {_KEY: text})
    _write(Path(path), data)


def load(cls: type[T], path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> T:
    """Read a ``cls`` from ``path``; see `Network.load`."""
    header, weights = _read(path)
    name = header.get("class")
    stored_class = classes().get(name) if isinstance(name, str) else None
    if stored_class is None or not issubclass(stored_class, cls):
        raise unreadable(path, f"it holds a {name!r:.80}, not a {cls.__name__!r}")
    config = header.get("config")
    if not isinstance(config, dict):
        raise unreadable(path, "its header has no 'config' object")
    try:
        attributes = {name: header[name] for name in _ATTRIBUTES}
        attributes |= {name: header[name] for name in _OPTIONAL if name in header}
        attributes["time"] = _build_time(header["time"])
        kwargs = {**config, **attributes, "sde": build_sde(header["sde"])}
        model = _build(stored_class, config, kwargs, weights)
    except KeyError as error:
        raise unreadable(path, f"its header lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise unreadable(path, f"its configuration is not usable: {error}") from error
    stored = min((tensor.dtype for tensor in weights.values()), key=lambda kind: kind.itemsize)
    model.to(dtype or stored).load_state_dict(weights)
    metadata = header.get("metadata")
    model.metadata = metadata if isinstance(metadata, dict) else {}
    return model


def classes() -> dict[str, type[Network]]:
    """The networks that a checkpoint may name; a name from a file is never looked up elsewhere."""
    from sbm_fast.nn.adm import ADM
    from sbm_fast.nn.mlp import MLP
    from sbm_fast.nn.ncsnpp import DDPM, NCSNpp
    from sbm_fast.nn.songunet import SongUNet
    from sbm_fast.nn.unet import UNet

    known = (UNet, NCSNpp, DDPM, SongUNet, ADM, MLP)
    return {network.__name__: network for network in known}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of this package; the message names the file and the problem.
    """
    return _read(path, weights=False)[0]


def describe_sde(sde: SDE | None) -> dict[str, Any] | None:
    """``sde`` as JSON values: {"class": name, parameter: value, ...}.

    Raises:
        TypeError: the class of ``sde`` is not one of this package.
    """
    if sde is None:
        return None
    name = type(sde).__name__
    if name not in _SDES:
        raise TypeError(f"sde must be one of {', '.join(_SDES)} to be saved, got {name}")
    return {"class": name} | {key: np.asarray(getattr(sde, key)).tolist() for key in _SDES[name]}


def build_sde(description: Any) -> SDE | None:
    """Inverse of `describe_sde`.

    Raises:
        ValueError: the description names an unknown class or other parameters than that class has.
    """
    from sbm_fast import sde

    if description is None:
        return None
    if not isinstance(description, dict) or description.get("class") not in _SDES:
        raise ValueError(f"sde must name one of {', '.join(_SDES)}, got {description!r:.200}")
    name = description["class"]
    return getattr(sde, name)(**_parameters(description, _SDES[name]))


def _describe_time(time: Any) -> Any:
    name = type(time).__name__
    if not callable(time):
        return time
    if name not in _LABELS:
        raise TypeError("a network whose time is a callable cannot be saved: name one of the times")
    held = {key: getattr(time, key) for key in _LABELS[name]}
    return {"class": name} | {k: describe_sde(v) if k == "sde" else v for k, v in held.items()}


def _build_time(description: Any) -> Any:
    from sbm_fast.nn import labels

    if not isinstance(description, dict):
        return description
    name = description.get("class")
    if name not in _LABELS:
        raise ValueError(f"time must name one of {', '.join(_LABELS)}, got {description!r:.200}")
    held = _parameters(description, _LABELS[name])
    return getattr(labels, name)(*(build_sde(v) if k == "sde" else v for k, v in held.items()))


def _parameters(description: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    parameters = {key: value for key, value in description.items() if key != "class"}
    if set(parameters) != set(names):
        raise ValueError(
            f"{description['class']} takes {', '.join(names)}, got {', '.join(parameters)}"
        )
    return parameters


def _read(
    path: str | os.PathLike[str], *, weights: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()} if weights else {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise unreadable(path, f"it is no safetensors file or is cut off ({error})") from error
    if text is None:
        raise unreadable(path, f"its header has no {_KEY!r} entry, so another program wrote it")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"its {_KEY!r} entry is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise unreadable(path, f"its format version is {version!r}, this package reads {VERSION}")
    return header, tensors


def _build(
    cls: type[T], config: dict[str, Any], kwargs: dict[str, Any], weights: dict[str, Tensor]
) -> T:
    bound(cls, config, weights)
    # Its initial weights are drawn and thrown away; the generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        model = cls(**kwargs)
    _compare({key: value.shape for key, value in model.state_dict().items()}, weights)
    return model


def bound(cls: type[Network], config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """`require_held` of a configuration and the tensors of a file.

    Building on the meta device would show the shapes as well, but its first use imports for
    seconds.
    """
    numbers: list[Any] = []
    for name in cls.SIZES:
        value = config[name]
        numbers += value if isinstance(value, (list, tuple)) else [value]
    if not all(type(number) is int and number >= 0 for number in numbers):
        return  # the constructor names what is wrong
    # By their memory: a pickle can name one tensor any number of times.
    memory = {t.untyped_storage().data_ptr(): t for t in weights.values()}
    in_all = sum(t.untyped_storage().nbytes() // t.itemsize for t in memory.values())
    require_held(*cls.demands(config), [tensor.numel() for tensor in weights.values()], in_all)


def _compare(expected: dict[str, torch.Size], weights: dict[str, Tensor]) -> None:
    missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing:
        raise ValueError(f"tensor {min(missing)!r} is missing ({len(missing)} in all)")
    if surplus:
        raise ValueError(f"tensor {min(surplus)!r} is not part of it ({len(surplus)} in all)")
    for key, shape in expected.items():
        if weights[key].shape != shape:
            raise ValueError(f"{key!r} should be {list(shape)}, is {list(weights[key].shape)}")
        if weights[key].dtype not in _STORED:
            raise ValueError(f"{key!r} should be floating, is {weights[key].dtype}")


def _write(path: Path, data: bytes) -> None:
    # Through a temporary file beside it: an interrupted save leaves the old checkpoint intact.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes it private; a checkpoint gets the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
