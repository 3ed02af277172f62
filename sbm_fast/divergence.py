"""The divergence of a probability flow along the way: the trace of a network's Jacobian.

With u's slope p u + q F(c_u u) and J = ∂F/∂(network input), div = p d + r tr J, r = q c_u. One
evaluation calls the network forward once and then finds tr J from products of J with vectors:

- "hutchinson": tr J ≈ v_kᵀ J v_k for K probes of signs or normals (Hutchinson 1990; Song et al.
  2021, App. D.2). For a symmetric J the variance of one is 2 (‖J‖²_F − Σ J_ii²) with signs and
  2 ‖J‖²_F with normals, where J is the slope's whole Jacobian, p I + r J: in the coordinates of
  `sbm_fast.flow` that is the small one, so the identity's part is left in. Signs don't see it.
- "exact": Σ_i (J e_i)_i, d products.
- "xtrace": `sbm_fast.xtrace`, K/2 products with test vectors and K/2 with a basis of their images.

The estimators' noise is that of the contract, stream `noise.PROBE`, so a sample's probes are the
same at every evaluation of a solve and in every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sbm_fast import noise
from sbm_fast.arguments import check_dtype
from sbm_fast.backend import Kernels
from sbm_fast.jacobian import (
    PRODUCTS,
    Jacobian,
    JacobianVector,
    Network,
    NotDifferentiable,
    VectorJacobian,
)
from sbm_fast.process import count
from sbm_fast.row_step import FLOATS
from sbm_fast.xtrace import leave_one_out, tree_sum

KINDS = ("hutchinson", "exact", "xtrace")
STATE_DTYPES = (torch.float32, torch.float64)
Dot = Callable[[int, Tensor, Tensor], None]
"""Takes F and the products of probes k, k + 1, … [n, B, …]."""
FORMS: dict[str, type[Jacobian]] = {"vjp": VectorJacobian, "jvp": JacobianVector}


class Divergence:
    """How the divergence of a flow is found; one object serves one solve.

    Args:
        kind: "hutchinson", "exact" or "xtrace".
        probes: products an evaluation (K above); "exact" does not read it.
        gaussian: probes of normals; "xtrace" always has those.
        product: "vjp" (Jᵀv), "jvp" (J v, stores no activations) or "auto": "vjp" where the network
            has it, else "jvp". See `sbm_fast.jacobian`.
        first_draw: draw of the first probe.
        kernels: the ops.

    Attributes:
        columns: Q, the estimates an evaluation gives: `probes`, 1, or probes/2 (XTrace's
            leave-one-out estimates, whose spread is its error estimate).
        products: the product in use; "auto" until the first evaluation has settled it.
        batched: whether one pass takes several vectors; None until that was tried.

    Raises: TypeError or ValueError naming the argument, as for xtrace's odd or < 4 `probes`.
    """

    def __init__(
        self,
        kind: str = "hutchinson",
        probes: int = 1,
        gaussian: bool = False,
        product: str = "auto",
        first_draw: int = 0,
        *,
        kernels: Kernels,
    ) -> None:
        _check_one_of("estimator", kind, KINDS)
        _check_one_of("product", product, ("auto", *PRODUCTS))
        probes = count("probes", probes)
        if kind == "xtrace" and (probes < 4 or probes % 2):
            raise ValueError(
                f"probes: xtrace takes an even number of products ≥ 4 (half of them for test "
                f"vectors), got {probes}"
            )
        if not isinstance(gaussian, bool):
            raise TypeError(f"gaussian: expected True or False, got {gaussian!r}")
        self.kind, self.gaussian = kind, gaussian
        self.first_draw = count("first_draw", first_draw, least=0)
        if self.first_draw + probes > 2**32:
            raise ValueError(
                f"first_draw: draws are below 2³², got {first_draw} for {probes} probes"
            )
        self.columns = {"hutchinson": probes, "exact": 1, "xtrace": probes // 2}[kind]
        self.products = product
        self.batched: bool | None = None
        self._kernels = kernels

    def slope(
        self,
        network: Network,
        inputs: Tensor,
        x: Tensor,
        keys: Tensor,
        coef: Tensor,
        out: Tensor,
        dtype: torch.dtype | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Writes p x + q F to `out` and gives the divergence's columns, float64 [Q, B].

        Args:
            network: [B, …] -> F [B, …], sample by sample; time and conditioning are bound to it.
            inputs: [B, …], what it is called with, in its dtype; not changed.
            x, out: [B, …] float32 or float64, the state and the slope.
            keys: int64 [B].
            coef: float64 [B, 3], (p, q, r).
            dtype: of the sums of "hutchinson", float32 or float64; None: that of x. The other
                kinds sum in float64.
            shift: float64 [B], for "xtrace": it looks at J + a I, and takes a d off again. Its
                error depends on a (docs/likelihood.md), that of the others does not. None: 0.

        Raises:
            ValueError: naming `model` where the network has no such product (`sbm_fast.jacobian`)
                or gives no tensor like `inputs`; `probes` beyond what xtrace can use in d
                dimensions.
        """
        _check_tensors(inputs, x, keys, coef, out, shift)
        dtype = x.dtype if dtype is None else dtype
        check_dtype("dtype", dtype, STATE_DTYPES)
        dimension = x[0].numel() if len(x) else 0
        if self.kind == "xtrace" and 0 < dimension < self.columns:
            raise ValueError(
                f"probes: xtrace takes at most 2 d = {2 * dimension} products in d = {dimension} "
                f"dimensions, got {2 * self.columns}; the exact trace takes d"
            )
        if x.numel() == 0:
            return coef.new_zeros(self.columns, len(x))
        write, first = self._kernels.hutchinson_, self.first_draw
        divergence = x.new_empty((self.columns, len(x)), dtype=dtype)

        def dot(k: int, f: Tensor, products: Tensor) -> None:
            rows = divergence[k : k + len(products)]
            write(out, rows, x, f, products, keys, coef, first + k, noise.PROBE, self.gaussian)

        with torch.inference_mode(False), torch.no_grad():
            f, found = self._differentiated(network, inputs, keys, shift, dot)
            if found is not None:
                write(out, None, x, f, None, keys, coef, first, noise.PROBE, False)
                return coef[:, 0] * dimension + coef[:, 2] * found
            whole = divergence.double()
            return whole + coef[:, 0] * self._excess(x, keys) if self.gaussian else whole

    def _excess(self, x: Tensor, keys: Tensor) -> Tensor:
        """|v_k|² − d of normal probes, float64 [K, B].

        The slope's Jacobian p I + r J is small as a whole, while for most predictions J alone holds
        nearly −p/r of the identity: their noise, p |v|² and r v·J v, has to meet to cancel.
        """
        found = []
        for k in range(self.columns):
            v = torch.empty_like(x)
            self._draw(v, keys, k)
            found.append(tree_sum(v.double().reshape(len(x), -1) ** 2, 1) - x[0].numel())
        return torch.stack(found)

    def _differentiated(
        self, network: Network, inputs: Tensor, keys: Tensor, shift: Tensor | None, dot: Dot
    ) -> tuple[Tensor, Tensor | None]:
        """F, and the traces float64 [Q, B]; None where `dot` was given the probes' products."""
        if self.products != "auto":
            return self._with(self.products, network, inputs, keys, shift, dot)
        reasons = []
        for product in PRODUCTS:
            try:
                found = self._with(product, network, inputs, keys, shift, dot)
            except NotDifferentiable as error:
                reasons.append(f"{product}: {error.reason}")
            else:
                self.products = product
                return found
        raise ValueError("model: cannot be differentiated by its input; " + "; ".join(reasons))

    def _with(
        self,
        product: str,
        network: Network,
        inputs: Tensor,
        keys: Tensor,
        shift: Tensor | None,
        dot: Dot,
    ) -> tuple[Tensor, Tensor | None]:
        jacobian = FORMS[product](network, inputs, self.batched)
        found: Tensor | None = None
        if self.kind == "hutchinson":
            # Chunk by chunk: no more products exist at a time than one chunk holds.
            for k, products in jacobian.products(partial(self._fill, keys), self.columns):
                dot(k, jacobian.output, products)
        elif self.kind == "exact":
            found = _exact_trace(jacobian)[None]
        else:
            found = self._xtrace(jacobian, keys, shift)
        self.batched = jacobian.batched
        return jacobian.output, found

    def _fill(self, keys: Tensor, v: Tensor, k: int) -> None:
        self._draw(v, keys, k)

    def _xtrace(self, jacobian: Jacobian, keys: Tensor, shift: Tensor | None) -> Tensor:
        shape, dtype = jacobian.shape, jacobian.vector_dtype
        vectors = torch.empty((self.columns, *shape), dtype=dtype, device=keys.device)
        for k, v in enumerate(vectors):
            self._draw(v, keys, k)
        omega = vectors.reshape(self.columns, len(keys), -1).double()
        a = None if shift is None else shift[:, None]

        def multiply(v: Tensor) -> Tensor:
            def fill(target: Tensor, k: int) -> None:
                target.copy_(v[k].reshape(shape))

            chunks = jacobian.products(fill, len(v), last=False)
            product = torch.cat([chunk.reshape(len(chunk), *v.shape[1:]) for _, chunk in chunks])
            return product.double() if a is None else product.double() + a * v

        traces = leave_one_out(omega, multiply)
        return traces if shift is None else traces - shift * omega.shape[-1]

    def _draw(self, v: Tensor, keys: Tensor, k: int) -> None:
        """Probe k, as `hutchinson_` makes it."""
        draw = noise.normal if self.gaussian or self.kind == "xtrace" else noise.rademacher
        draw(
            None,
            v.shape,
            draw=self.first_draw + k,
            stream=noise.PROBE,
            keys=keys,
            backend=self._kernels.name,
            out=v,
        )


def _exact_trace(jacobian: Jacobian) -> Tensor:
    """Σ_i (J e_i)_i, float64 [B]."""
    batch = jacobian.shape[0]
    dimension = jacobian.shape[1:].numel()

    def unit(v: Tensor, k: int) -> None:
        v.zero_().view(batch, dimension)[:, k] = 1.0

    diagonal = [
        columns.reshape(-1, batch, dimension).diagonal(k, 0, 2)
        for k, columns in jacobian.products(unit, dimension)
    ]
    return tree_sum(torch.cat(diagonal, 1).double(), 1)


def _check_tensors(
    inputs: Tensor,
    x: Tensor,
    keys: Tensor,
    coef: Tensor,
    out: Tensor,
    shift: Tensor | None,
) -> None:
    """ValueError or TypeError naming the argument that `slope` cannot take."""
    batch = len(x)
    wide = (torch.float64,)
    expected = [
        ("x", x, tuple(x.shape), STATE_DTYPES),
        ("inputs", inputs, tuple(x.shape), FLOATS),
        ("out", out, tuple(x.shape), (x.dtype,)),
        ("keys", keys, (batch,), (torch.int64,)),
        ("coef", coef, (batch, 3), wide),
    ]
    if shift is not None:
        expected.append(("shift", shift, (batch,), wide))
    for name, value, shape, dtypes in expected:
        if value.dtype not in dtypes:
            raise TypeError(f"{name}: expected one of {dtypes}, got {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def _check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
