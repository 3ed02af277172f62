"""Products of a network's Jacobian by its input, J = ∂F/∂input, with vectors.

"vjp" gives Jᵀv: one forward that keeps its graph, then a backward for every vector. "jvp" gives J v
by forward-mode differentiation, which stores no activations. Both have the same trace and the same
vᵀJv.

Several vectors at once cost one pass under `torch.vmap` where the network's derivatives support
it. It is tried once, and the outcome stands in `Jacobian.batched`:

- "jvp": on every device, as it also makes F once instead of once a vector (digits network, 2 cores,
  8 vectors: 32 against 135 ms for one sample, 189 against 405 ms for 64);
- "vjp": on every device but the CPU, where a loop over the retained graph is as fast or faster
  (14 against 11 ms for one sample, 104 against 130 ms for 64) and channels_last networks have no
  vmap at all. On a GPU it saves launches.

Both read packed weights where a run holds the network's parameters frozen (`sbm_fast.nn.conv`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sbm_fast.row_step import INPUT_CHANGED, check_outputs

PRODUCTS = ("vjp", "jvp")
INDEPENDENT = (
    "its output does not depend differentiably on its input (a constant, a detached tensor, or "
    "computed under torch.no_grad() or by another library)"
)

Network = Callable[[Tensor], Tensor]
Fill = Callable[[Tensor, int], None]
"""Writes vector k into a tensor [B, …]."""

_FORWARD_MODE = threading.Lock()
"""torch's level of forward-mode differentiation is one for the process."""
CHUNK = 16
"""Vectors that exist at a time, and that one pass takes where it takes several."""


class NotDifferentiable(ValueError):
    """The network has no such product; the message says why and names `model`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"model: {reason}")
        self.reason = reason


class Jacobian(ABC):
    """J of a network at inputs [B, …]; every sample's output depends on that sample alone.

    Neither the network's parameters nor the caller's grad mode matter, but no method may be called
    in inference mode.

    Args:
        network: F = network(inputs), of the inputs' shape, B samples in the inputs' order.
        inputs: not changed, and need not require grad.
        batched: whether one pass takes several vectors; None: not known yet.

    Raises (here or in `products`):
        NotDifferentiable: as it says.
        ValueError: naming `model`, for an output that is no tensor like the inputs, or a network
            that changed its input in place.
    """

    output: Tensor
    """F, without a graph; "jvp" has it after the first products."""

    def __init__(self, network: Network, inputs: Tensor, batched: bool | None) -> None:
        self.batched = batched
        self._network = network
        self._inputs = inputs.clone() if inputs.is_inference() else inputs.detach()
        self.shape = inputs.shape

    def products(self, fill: Fill, count: int, last: bool = True) -> Iterator[tuple[int, Tensor]]:
        """(k, products of vectors k … k + n − 1 [n, B, …]), chunk by chunk; `last`: no more
        products will be asked for."""
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            shape = (stop - start, *self._inputs.shape)
            vectors = self._inputs.new_empty(shape, dtype=self.vector_dtype)
            for k in range(start, stop):
                fill(vectors[k - start], k)
            yield start, self._multiply(vectors, last and stop == count)

    def _multiply(self, vectors: Tensor, last: bool) -> Tensor:
        if len(vectors) > 1 and self.batched is not False:
            try:
                together = self._together(vectors, last and self.batched is True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if self.batched:
                    raise NotDifferentiable(self._failed(error)) from error
                self.batched = False
            else:
                self.batched = True
                return together
        final = len(vectors) - 1
        return torch.stack([self._guarded(v, last and k == final) for k, v in enumerate(vectors)])

    def _guarded(self, vector: Tensor, last: bool) -> Tensor:
        try:
            product = self._one(vector, last)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotDifferentiable(self._failed(error)) from error
        if product is None:
            raise NotDifferentiable(INDEPENDENT)
        return product

    def _called(self, inputs: Tensor) -> Tensor:
        version = inputs._version
        output = self._network(inputs)
        check_outputs([output], inputs, None)
        if inputs._version != version:
            raise ValueError(INPUT_CHANGED)
        return output

    @property
    @abstractmethod
    def vector_dtype(self) -> torch.dtype:
        """Of the vectors that `Fill` writes."""

    @abstractmethod
    def _together(self, vectors: Tensor, last: bool) -> Tensor:
        """Products [n, B, …]; RuntimeError where the network can't."""

    @abstractmethod
    def _one(self, vector: Tensor, last: bool) -> Tensor | None:
        """The product with one vector; None: the output does not depend on the input."""

    @abstractmethod
    def _failed(self, error: RuntimeError) -> str:
        """What an error of the differentiation means."""


class VectorJacobian(Jacobian):
    """Jᵀv by the backward of one forward, which runs here."""

    def __init__(self, network: Network, inputs: Tensor, batched: bool | None = None) -> None:
        super().__init__(network, inputs, False if inputs.device.type == "cpu" else batched)
        with torch.enable_grad():
            # A copy, no leaf: autograd has its own error for leaves that are changed in place.
            self._at = self._inputs.detach().requires_grad_().clone()
            try:
                self._graph = self._called(self._at)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = f"its forward under autograd failed ({_words(error)})"
                raise NotDifferentiable(reason) from error
        if not self._graph.requires_grad:
            raise NotDifferentiable(INDEPENDENT)
        self.output = self._graph.detach()

    @property
    def vector_dtype(self) -> torch.dtype:
        return self.output.dtype

    def _together(self, vectors: Tensor, last: bool) -> Tensor:
        return torch.autograd.grad(
            self._graph, self._at, vectors, retain_graph=not last, is_grads_batched=True
        )[0]

    def _one(self, vector: Tensor, last: bool) -> Tensor | None:
        graph, at = self._graph, self._at
        try:
            return torch.autograd.grad(graph, at, vector, retain_graph=not last, allow_unused=True)[
                0
            ]
        except RuntimeError as error:
            if last or "donated buffers" not in str(error):
                raise
        # A compiled network's backward frees what it reads: the next product needs a new forward.
        product = torch.autograd.grad(graph, at, vector, allow_unused=True)[0]
        with torch.enable_grad():
            self._graph = self._called(self._at)
        return product

    def _failed(self, error: RuntimeError) -> str:
        return f"its backward failed ({_words(error)})"


class JacobianVector(Jacobian):
    """J v by forward-mode differentiation: the network runs again for every pass."""

    @property
    def vector_dtype(self) -> torch.dtype:
        return self._inputs.dtype

    def _together(self, vectors: Tensor, last: bool) -> Tensor:
        def both(vector: Tensor) -> Any:
            return torch.func.jvp(self._called, (self._inputs,), (vector,), strict=True)

        # F does not depend on the vector: it is made once.
        axes: Any = (None, 0)
        with _FORWARD_MODE, torch.no_grad():
            output, products = torch.vmap(both, out_dims=axes, randomness="same")(vectors)
        self.output = output.detach()
        return products

    def _one(self, vector: Tensor, last: bool) -> Tensor | None:
        with _FORWARD_MODE, torch.no_grad(), forward_ad.dual_level():
            dual = self._called(forward_ad.make_dual(self._inputs, vector))
            output, tangent = forward_ad.unpack_dual(dual)
        self.output = output.detach()  # a network that is a gradient itself may keep a graph
        return tangent

    def _failed(self, error: RuntimeError) -> str:
        reason = f"its forward-mode derivative failed ({_words(error)})"
        if "view size is not compatible" in str(error):
            reason += (
                "; native GroupNorm has none for channels_last tensors: bring the network to "
                "torch.contiguous_format, or take product='vjp'"
            )
        return reason


def _words(error: RuntimeError) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
