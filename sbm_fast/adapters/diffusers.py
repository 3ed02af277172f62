"""Networks of Hugging Face diffusers: `load` a folder or a repository, `wrap` live objects.

What a scheduler samples with is left aside; its configuration also says what the network was
trained on, and that is read: the noise levels, what is predicted, and the network's time.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from sbm_fast.adapters._schedulers import SCHEDULERS, Training, count, training
from sbm_fast.files import require_held, unreadable
from sbm_fast.model import ScoreModel

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
_DOWNLOAD = [
    "*.json",
    *(
        f"{folder}diffusion_pytorch_model{shard}.safetensors"
        for folder in ("", "unet/")
        for shard in ("", "-*-of-*")
    ),
]
_INSTALL = "pip install 'sbm_fast[diffusers]'"


class Output(nn.Module):
    """The output tensor of a network of diffusers: (x, label, **cond) → sign · net(…).sample.

    ``cond`` goes to the network by name (``class_labels``; ``encoder_hidden_states`` …).

    Args:
        net: takes (x, timestep, **cond, return_dict=False) and gives a tuple.
        sign: 1 or −1.
    """

    def __init__(self, net: nn.Module, sign: int = 1) -> None:
        super().__init__()
        self.net = net
        self.training = net.training
        self.sign = sign
        # An embedding table takes the number of a level; the others take any real one.
        self.table = getattr(net.config, "time_embedding_type", None) == "learned"

    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        """The network at x [B, C, …], label [B]."""
        label = label.round().long() if self.table else label
        output = self.net(x, label, return_dict=False, **cond)[0]
        return output if self.sign == 1 else -output


def load(source: str | os.PathLike[str]) -> ScoreModel:
    """The ``UNet2DModel`` in a folder, or in a repository of the Hugging Face Hub.

    The folder is that of a pipeline (``unet/`` and ``scheduler/``, or both side by side as in the
    first releases) or of a network with its ``scheduler_config.json`` beside it. Only JSON and
    safetensors are read. The result's ``sde`` is what the network was trained on; its samples are
    in the network's range ([−1, 1] for DDPM, [0, 1] for score_sde's VE networks). A network with
    classes takes ``cond={"class_labels": …}``; which of them stands for none is not in the files:
    set ``null_cond`` of the result for guidance.

    Args:
        source: a path, or "owner/name" (asks the Hub, through ``huggingface_hub``).

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError: there is no such folder or file.
        ValueError: the folder holds another network than a UNet2DModel, weights that are not
            safetensors or do not fit, or a scheduler that is not in `SCHEDULERS`; the message names
            the file and the problem.
    """
    folder = _folder(source)
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _read_json(home / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        problem = f"its network is a {config.get('_class_name')!r}, expected a 'UNet2DModel'"
        raise unreadable(home / "config.json", problem)
    path = folder / "scheduler" / "scheduler_config.json"
    path = path if path.parent.is_dir() else folder / "scheduler_config.json"
    schedule = _read_json(path)
    with _naming(path):
        trained = training(schedule.get("_class_name"), schedule)
    network = _read_network(home, config)
    with _naming(home / "config.json"):
        return _model(network, config, trained)


def wrap(unet: nn.Module, scheduler: object) -> ScoreModel:
    """A live network of diffusers with the scheduler it was trained with.

    Args:
        unet: a ``UNet2DModel``, or any network of diffusers that is called as
            ``unet(x, timestep, **cond, return_dict=False)``. It is neither copied nor changed: call
            its ``eval()`` yourself.
        scheduler: an object of one of the classes in `SCHEDULERS`, or of one derived from them.

    Raises:
        TypeError: ``unet`` or ``scheduler`` is no such object.
        ValueError: the scheduler's configuration is not understood, or does not fit the network.
    """
    config = getattr(unet, "config", None)
    if not isinstance(unet, nn.Module) or not isinstance(config, Mapping):
        raise TypeError(f"unet: expected a network of diffusers, got {type(unet).__name__}")
    schedule = getattr(scheduler, "config", None)
    if not isinstance(schedule, Mapping):
        got = type(scheduler).__name__
        raise TypeError(f"scheduler: expected a scheduler of diffusers, got {got}")
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    name = next((name for name in names if name in SCHEDULERS), names[0])
    return _model(unet, config, training(name, schedule))


def _model(network: nn.Module, config: Mapping[str, Any], trained: Training) -> ScoreModel:
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    expected = inputs if trained.variance is None or inputs is None else 2 * inputs
    if outputs != expected:
        raise ValueError(
            f"out_channels: expected {expected} for in_channels = {inputs} and variance "
            f"{trained.variance!r}, got {outputs}"
        )
    # Networks of signals and films have other shapes, which their configurations do not tell.
    flat = any("2D" in cls.__name__ for cls in type(network).__mro__)
    size = config.get("sample_size") if flat else None
    sizes = (size, size) if isinstance(size, int) else size
    return ScoreModel(
        Output(network, trained.sign),
        predicts=trained.predicts,
        time=trained.time,
        sde=trained.sde,
        sample_shape=(inputs, *sizes) if inputs and sizes else None,
        sigma_data=trained.sigma_data,
        variance=trained.variance,
    )


def _folder(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise unreadable(source, "expected the folder of a network or a pipeline, this is a file")
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        raise FileNotFoundError(f"folder {os.fspath(source)!r} does not exist")
    hub = _import("huggingface_hub")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=_DOWNLOAD))
    except Exception as error:  # whatever its HTTP library raises: no such repository, no network
        raise FileNotFoundError(
            f"there is no folder {source!r}, and the Hugging Face Hub did not give it: {error}"
        ) from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"this needs {name}, which cannot be imported ({error}); {_INSTALL}"
        raise ImportError(problem) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"file {os.fspath(path)!r} does not exist")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise unreadable(path, f"expected an object, it holds a {type(value).__name__}")
    return value


def _read_network(home: Path, config: dict[str, Any]) -> nn.Module:
    shapes = _shapes(home)
    with _naming(home / "config.json"):
        _bound(config, shapes)
    build: Callable[..., Any] = _import("diffusers").UNet2DModel.from_pretrained
    try:
        network, info = build(
            os.fspath(home),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,  # True needs another package
            torch_dtype=torch.float32,
        )
    except Exception as error:  # diffusers raises of all kinds for a configuration or weights
        raise unreadable(home, f"diffusers cannot read it: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise unreadable(home, f"{problem.replace('_', ' ')}: {min(map(str, info[problem]))}")
    return network.eval()


def _shapes(home: Path) -> list[int]:
    """The number of elements of every tensor in the folder's safetensors files."""
    files = sorted(file for file in home.iterdir() if _WEIGHTS.fullmatch(file.name))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt*") for file in home.glob(pattern))
        if others:
            raise unreadable(
                home / others[0],
                "only safetensors are read, and this is a pickle; convert it where you trust it: "
                "UNet2DModel.from_pretrained(…).save_pretrained(…, safe_serialization=True)",
            )
        raise FileNotFoundError(
            f"there is no diffusion_pytorch_model.safetensors in {os.fspath(home)!r}, and only "
            "safetensors are read"
        )
    sizes = []
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
        except safetensors.SafetensorError as error:
            problem = f"it is no safetensors file or is cut off ({error})"
            raise unreadable(file, problem) from error
        sizes += [int(np.prod(shape, dtype=np.float64)) for shape in shapes]
    return sizes


def _bound(config: dict[str, Any], sizes: list[int]) -> None:
    """Refuse a configuration that asks for far more than the weights hold, before it is built."""
    widths = config.get("block_out_channels")
    if (
        not isinstance(widths, list)
        or not widths
        or not all(type(w) is int and w > 0 for w in widths)
    ):
        raise ValueError(f"block_out_channels: expected integers ≥ 1, got {widths!r:.80}")
    layers = count(config, "layers_per_block")
    embedding = config.get("time_embedding_dim") or 4 * widths[0]
    classes = config.get("num_class_embeds") or 0
    largest = {
        f"convolutions of {max(widths)} channels": 9 * max(widths) ** 2,
        f"time_embedding_dim {embedding}": embedding**2,
        f"num_class_embeds {classes}": classes * embedding,
    }
    for key in ("in_channels", "out_channels"):
        channels = config.get(key) or 0
        largest[f"{key} {channels}"] = 9 * channels * widths[0]
    elements = layers * sum(9 * width**2 for width in widths)
    require_held(len(widths) * layers, elements, largest, sizes, sum(sizes))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a configuration name the file that it stands in."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise unreadable(path, str(error)) from error
