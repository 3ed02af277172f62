"""`Network`: what all networks of this package share, and `Prepared`, their time table."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from sbm_fast.model import VARIANCES
from sbm_fast.nn import checkpoint, options
from sbm_fast.nn.blocks import Block

if TYPE_CHECKING:
    from typing_extensions import Self

    from sbm_fast.nn.peer_weights import PeerTensor
    from sbm_fast.sde import SDE

PREDICTIONS = ("score", "eps", "x0", "v", "edm")
TIMES = ("t", "999t", "index", "sigma", "log_sigma", "edm")


class Network(nn.Module):
    """A network F(x, label, **cond) that knows what it predicts, its time and its SDE.

    The module carries ``predicts``, ``time``, ``sde``, ``sample_shape``, ``sigma_data``,
    ``null_cond`` and ``variance``, which is what `sbm_fast.as_score_model` asks of a network:
    ``sbm_fast.sample(net, sde)`` needs no wrapper. ``config`` holds the other arguments of the
    constructor as JSON values, ``metadata`` whatever belongs to the weights, ``blocks`` the
    residual blocks in the order in which they run.

    A subclass gives three functions of time and one of the image, so that `forward` and `prepare`
    are the same formula:

        part = time_part(label)            all that depends on the label only
        emb  = embedding(part, **cond)     joined with conditioning, [B, W]
        v_i  = time_i(emb)                 for every residual block i
        F    = body(x, [v_1 ... v_n], output_scale(label))

    Args:
        config: the subclass's own arguments.
        predicts: "score", "eps", "x0", "v" or "edm", see `sbm_fast.parameterization`.
        time: what ``label`` is: "t", "999t", "index", "sigma", "log_sigma", "edm" or a callable.
        sde: the SDE that the network is trained under; None: the one it is run under.
        sample_shape: shape of one sample without the batch, for ``sample(shape=None)``.
        sigma_data: standard deviation of the data (only "edm" uses it).
        null_cond: conditioning that stands for "none" in guidance.
        variance: "learned_range" where the second half of F's channels is that (see `ScoreModel`).

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

    SIZES: ClassVar[tuple[str, ...]]
    """Entries of ``config`` that say how large the network is: ints, or lists of ints."""
    config: dict[str, Any]

    def __init__(
        self,
        config: dict[str, Any],
        *,
        predicts: str,
        time: str | Callable[..., Any],
        sde: SDE | None = None,
        sample_shape: Sequence[int] | None = None,
        sigma_data: float = 0.5,
        null_cond: Mapping[str, Any] | None = None,
        variance: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.predicts = options.choice("predicts", predicts, PREDICTIONS)
        self.time = time if callable(time) else options.choice("time", time, TIMES)
        self.sde = sde
        self.sample_shape = None if sample_shape is None else self._checked_shape(sample_shape)
        self.sigma_data = options.real("sigma_data", sigma_data)
        if null_cond is not None and not isinstance(null_cond, Mapping):
            raise TypeError(
                f"null_cond must be a dict of keyword arguments, got {options.shown(null_cond)}"
            )
        self.null_cond = null_cond
        self.variance = options.choice("variance", variance, VARIANCES)
        self.metadata: dict[str, Any] = {}

    @abstractmethod
    def time_part(self, label: Tensor) -> Tensor:
        """What depends on the label only: [B] -> [B, P]."""

    def embedding(self, part: Tensor, **cond: Any) -> Tensor:
        """``part`` [B, P] joined with the conditioning: what blocks project, [B, W]."""
        if cond:
            raise TypeError(f"{type(self).__name__} takes no conditioning, got {', '.join(cond)}")
        return part

    def output_scale(self, label: Tensor) -> Tensor | None:
        """What the output is divided by, [B]; None: nothing."""
        return None

    @abstractmethod
    def body(self, x: Tensor, vs: Sequence[Tensor | None], scale: Tensor | None) -> Tensor:
        """F of x, the projections of all blocks in order, and `output_scale`."""

    @abstractmethod
    def check_input(self, x: Tensor) -> None:
        """ValueError for an x of another shape than the network takes."""

    @abstractmethod
    def _checked_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``sample_shape`` as a tuple; TypeError or ValueError for one that it cannot be."""

    @classmethod
    @abstractmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        """Least number of tensors, of elements in all of them, and of elements that some tensor
        has, by what asks for it.

        Cheap to know before anything is allocated; ``config`` is unchecked but for `SIZES`.
        """

    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        """F(x, label, **cond): x [B, …], label [B] -> F [B, …].

        Raises:
            ValueError: x or label has another shape than the network takes.
            TypeError: a conditioning that the network does not take.
        """
        self.check_input(x)
        if label.shape != x.shape[:1]:
            raise ValueError(f"label must be [{x.shape[0]}] as the batch, got {list(label.shape)}")
        projections = self.projections()
        if not projections:
            return self._timeless(x, self.output_scale(label), cond)
        emb = self.embedding(self.time_part(label), **cond)
        vs = [project(emb) for project in projections]
        return self.body(x, vs, self.output_scale(label))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks in the order in which they run."""
        return tuple(_blocks(self))

    def projections(self) -> list[nn.Linear]:
        """What gives every block its v from the embedding; empty for networks without time."""
        return [block.time for block in self.blocks if block.time is not None]

    def prepare(self, labels: Tensor) -> Prepared:
        """The network with the time of a whole plan done: labels [R] -> `Prepared`.

        Raises:
            ValueError: labels is not one-dimensional.
        """
        if labels.ndim != 1:
            raise ValueError(f"labels must be [R], got {list(labels.shape)}")
        return Prepared(self, labels)

    def peer_tensors(self) -> list[PeerTensor]:
        """The parameters and buffers of the published code's module of this configuration.

        In that code's order, each with its name there and where it goes here.

        Raises:
            NotImplementedError: there is no published code for this class.
        """
        raise NotImplementedError(f"{type(self).__name__} has no published code")

    def num_parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write weights, configuration and ``metadata`` (JSON values) to a safetensors file.

        ``dtype`` (float32, float16, bfloat16) is the storage type, None: as they are. The
        frequencies of a time embedding are not rounded. The file appears whole or not at all.

        Raises:
            TypeError: ``time`` is a callable that is not of `sbm_fast.nn.labels`, the SDE is of an
                unknown class, or ``null_cond`` or ``metadata`` holds what JSON cannot.
        """
        checkpoint.save(self, path, dtype=dtype, metadata=metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = torch.float32
    ) -> Self:
        """Read what `save` wrote; nothing from the file is executed.

        ``Network.load`` reads a network of any class, a subclass only its own. ``dtype`` is the
        type of the weights, None: as stored. ``metadata`` of the result holds what was given to
        `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, is cut off, was written by something else, or its
                configuration does not fit its weights; the message names the file and the problem.
        """
        return checkpoint.load(cls, path, dtype=dtype)

    @staticmethod
    def from_preset(name: str, **overrides: Any) -> Network:
        """A new network of a published configuration, see `sbm_fast.nn.presets`.

        ``overrides`` replace arguments of its constructor. The SDE stays that of the preset: where
        they change its noise levels, give ``sde`` too.

        Raises:
            ValueError: there is no such preset; the message names the nearest ones.
            TypeError: an override is no argument of the constructor.
        """
        from sbm_fast.nn.presets import build

        return build(name, **overrides)

    def _timeless(self, x: Tensor, scale: Tensor | None, cond: Mapping[str, Any]) -> Tensor:
        """F of a network whose blocks get no embedding, and so no conditioning either."""
        if cond:
            name = type(self).__name__
            raise TypeError(f"{name} without time takes no conditioning, got {', '.join(cond)}")
        return self.body(x, [None] * len(self.blocks), scale)


def _blocks(module: nn.Module) -> Iterator[Block]:
    # At every call: one may have been put in the place of another.
    for child in module._modules.values():
        if isinstance(child, Block):
            yield child
        elif child is not None:
            yield from _blocks(child)


CHUNK = 64
"""Labels that one product of the time table takes."""


def can_be_prepared(net: object) -> TypeGuard[Network]:
    """Whether ``net.prepare(labels)`` says all that a call of ``net`` does.

    False for anything but a `Network` with the `forward` of this module, without hooks, not
    compiled in place, and with the projections that it was built with.
    """
    if not isinstance(net, Network) or type(net).forward is not Network.forward:
        return False
    if net._compiled_call_impl is not None:  # ``net.compile()``
        return False
    projections = net.projections()
    for module in (net, *projections):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return False
    return all(type(projection) is nn.Linear for projection in projections)


class Prepared:
    """A `Network` at the times of a plan: (x [B, ...], row [B], **cond) -> F like ``net(x, label)``
    at label = labels[row].

    Embeddings and the projections v_i of all residual blocks are made here, once, in products with
    the blocks' weights one below the other; a call gathers them by ``row`` on its device (no host
    reads), and new labels need no new graph. With conditioning, the table ends at
    `Network.time_part`, and a call makes its v_i in one product.

    The v_i differ from those of ``net(x, label)`` by the order of summation in the matrix product:
    with W inputs and unit roundoff u, |Δv| ≤ 2 W u Σ_j |w_j e_j| (twice the bound of a dot product
    in any order, Higham 2002, eq. 3.5), and as the embedding e itself is made of two such products.
    Every product takes `CHUNK` labels, the last ones filled up, so that a row's values do not
    depend on how many rows come after it.

    The table holds values, not the weights: `refresh` or prepare again when these have changed.

    Args:
        net: the network.
        labels: [R], at least the rows that will be asked for.
    """

    def __init__(self, net: Network, labels: Tensor) -> None:
        self.net = net
        self.rows = labels.shape[0]
        self._widths = [projection.out_features for projection in net.projections()]
        self._labels = labels
        self._known: frozenset[str] = frozenset()
        self._held = self._made()

    def refresh(self) -> None:
        """Makes the table again from the weights as they are now, in the same memory."""
        for name, value in self._made().items():
            self._held[name].copy_(value)

    @torch.no_grad()
    def _made(self) -> dict[str, Tensor]:
        """The table: what a call reads, by name."""
        net, labels, made = self.net, self._labels, {}
        scale = net.output_scale(labels)
        if scale is not None:
            made["scale"] = scale
        projections = net.projections()
        if not projections or not self.rows:
            return made
        made["weight"] = torch.cat([projection.weight for projection in projections])
        made["bias"] = torch.cat([projection.bias for projection in projections])
        filled = torch.cat((labels, labels[-1:].expand(-self.rows % CHUNK)))
        parts = [net.time_part(chunk) for chunk in filled.split(CHUNK)]
        of_blocks = [
            nn.functional.linear(net.embedding(part), made["weight"], made["bias"])
            for part in parts
        ]
        made |= {"part": torch.cat(parts), "v": torch.cat(of_blocks)}
        for name in ("part", "v"):  # a row that was filled up is none to ask for
            made[name] = made[name][: self.rows]
        return made

    def __call__(self, x: Tensor, row: Tensor, **cond: Any) -> Tensor:
        """F [B, …] of x [B, …] and row [B], int32 or int64.

        Raises:
            ValueError: x or row has another shape.
            TypeError: row holds no integers; a conditioning that the network does not take.
            IndexError: there is no such row (on a CPU; a GPU stops at it).
        """
        self.net.check_input(x)
        if row.shape != x.shape[:1]:
            raise ValueError(f"row must be [{x.shape[0]}] as the batch, got {list(row.shape)}")
        if row.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"row must be int32 or int64, got {row.dtype}")
        held, scale = self._held, None
        if "scale" in held:
            scale = held["scale"].index_select(0, row)
        if "v" not in held:
            # Without rows there are no samples either.
            return self.net._timeless(x, scale, {} if self._widths else cond)
        if any(value is not None for value in cond.values()):
            emb = self.net.embedding(held["part"].index_select(0, row), **cond)
            v = nn.functional.linear(emb, held["weight"], held["bias"])
        else:
            if cond.keys() - self._known:  # a name that the network does not take is refused
                self.net.embedding(held["part"][:0], **cond)
                self._known = frozenset(cond)
            v = held["v"].index_select(0, row)
        return self.net.body(x, v.split(self._widths, dim=1), scale)
