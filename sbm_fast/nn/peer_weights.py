"""Weights of the published code in our networks: names, order and layouts.

`Network.peer_tensors` says for each tensor of the original module where it goes here; what reads
the original's files (`sbm_fast.adapters`) then needs to know nothing of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PeerTensor:
    """One tensor of the original module.

    Attributes:
        name: its name in the original's ``state_dict()``, without the ``module.`` of DataParallel.
        shape: its shape there.
        target: the name here; None: it does nothing there.
        rows: it gives target[rows[0]:rows[1]]; None: all of it.
        layout: "same"; "product": [in, out] of a product over channels, here a 1x1 convolution
            [out, in, 1, 1]; "heads": rows in the order (head, channel, q k v), here (q k v, head,
            channel).
        heads: attention heads, for "heads".
        trainable: whether it is among the original's trainable parameters (score_sde's EMA holds
            those only, as a list in this order).
    """

    name: str
    shape: tuple[int, ...]
    target: str | None
    rows: tuple[int, int] | None = None
    layout: str = "same"
    heads: int = 1
    trainable: bool = True

    def ours(self, tensor: Tensor) -> Tensor:
        """The original's ``tensor`` in our layout: what target[rows] gets, up to trailing ones.

        Raises:
            ValueError: ``tensor`` has another shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name!r} should be {list(self.shape)}, is {list(tensor.shape)}")
        if self.layout == "product":
            return tensor.t()
        if self.layout == "heads":
            split = tensor.reshape(self.heads, -1, 3, *tensor.shape[1:])
            return split.movedim(2, 0).reshape(tensor.shape)
        return tensor


def from_peer(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``state_dict`` of ``net`` from the original's tensors by name; others are not looked at.

    Raises:
        ValueError: one is missing or has another shape; the message names it.
    """
    own = net.state_dict()
    state = {name: torch.empty_like(tensor) for name, tensor in own.items()}
    for peer in net.peer_tensors():  # type: ignore[operator]
        if peer.name not in tensors:
            raise ValueError(f"tensor {peer.name!r} is missing")
        if peer.target is None:
            continue
        target = state[peer.target]
        part = target if peer.rows is None else target[slice(*peer.rows)]
        part.copy_(peer.ours(tensors[peer.name]).reshape(part.shape))
    return state


def tensors_of(
    module: nn.Module, ours: str, names: Mapping[str, str], theirs: str
) -> list[PeerTensor]:
    """Tensors of a module whose parts have other names there, otherwise alike.

    Args:
        module: ours, with the name ``ours``.
        names: child of ``module`` -> name there, in the original's order; "" is ``module`` itself.
        theirs: the original's name of ``module``.
    """
    found = []
    for own, peer in names.items():
        part = module.get_submodule(own)
        for kind in ("weight", "bias"):
            tensor = getattr(part, kind, None)
            if tensor is None:
                continue
            found.append(
                PeerTensor(join(theirs, peer, kind), tuple(tensor.shape), join(ours, own, kind))
            )
    return found


def join(*parts: str) -> str:
    """A dotted name of those parts that are not empty."""
    return ".".join(part for part in parts if part)
