"""A network of this package with the weights of the published code's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sbm_fast.nn import checkpoint
from sbm_fast.nn.network import Network
from sbm_fast.nn.peer_weights import from_peer

T = TypeVar("T", bound=Network)


def build(
    cls: type[T],
    config: Mapping[str, Any],
    carried: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> T:
    """A ``cls`` in evaluation mode, made with ``config`` and ``carried``, see `Network`.

    Args:
        tensors: the original's ``state_dict()`` without what the configuration settles.

    Raises:
        TypeError, ValueError: an argument is outside its range, a tensor is missing, is left over
            or has another shape; the message names it.
    """
    arguments = inspect.signature(cls).parameters.values()
    whole = {argument.name: argument.default for argument in arguments} | dict(config)
    checkpoint.bound(cls, whole, tensors)
    # Its initial weights are drawn and thrown away; the generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        network = cls(**config, **carried)
    fill(network, tensors)
    return network.eval()


def fill(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Give ``network`` the original's tensors. Errors as `build`."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
        if not value.is_floating_point():
            raise ValueError(f"{name!r} should be floating, is {value.dtype}")
    known = {peer.name for peer in network.peer_tensors()}
    if surplus := tensors.keys() - known:
        raise ValueError(f"tensor {min(surplus)!r} is not part of it ({len(surplus)} in all)")
    network.load_state_dict(from_peer(network, tensors))
