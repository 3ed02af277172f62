"""Inputs of the ops of a probability flow, their formulas in float64, and the comparisons."""

from dataclasses import dataclass, replace

import torch
from op_backends import call
from torch import Tensor

from sbm_fast import noise

NAN = float("nan")
DRAW = 3


@dataclass
class Flow:
    """Everything that one call of `hutchinson_` reads."""

    x: Tensor
    network: Tensor
    product: Tensor | None
    keys: Tensor
    coef: Tensor
    sums: torch.dtype = torch.float64
    gaussian: bool = False
    draw: int = DRAW
    stream: int = noise.PROBE


def flow(
    shape: tuple[int, ...],
    probes: int | None = 1,
    *,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype = torch.float32,
    sums: torch.dtype = torch.float64,
    gaussian: bool = False,
    seed: int = 0,
) -> Flow:
    """Random inputs; probes=None: the drift alone."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    return Flow(
        x=normal(*shape).to(dtype),
        network=normal(*shape).to(net_dtype),
        product=None if probes is None else normal(probes, *shape).to(net_dtype),
        keys=noise.keys(seed, shape[0]),
        coef=normal(shape[0], 3),
        sums=sums,
        gaussian=gaussian,
    )


def slope(case: Flow, backend: str) -> tuple[Tensor, Tensor | None]:
    """drift and divergence, which begin as NaN."""
    drift = torch.full_like(case.x, NAN)
    divergence = None
    if case.product is not None:
        divergence = torch.full((len(case.product), len(case.x)), NAN, dtype=case.sums)
    call(
        backend, "hutchinson_", drift, divergence, case.x, case.network, case.product, case.keys,
        case.coef, case.draw, case.stream, case.gaussian,
    )  # fmt: skip
    return drift, divergence


def probes(case: Flow) -> Tensor:
    """v [K, B, d] in float32, of the eager noise ops."""
    assert case.product is not None
    batch, d = len(case.x), case.x[0].numel() if len(case.x) else 0
    kind = noise.normal if case.gaussian else noise.rademacher
    made = [
        kind(None, (batch, d), keys=case.keys, draw=case.draw + k, stream=case.stream,
             backend="eager")
        for k in range(len(case.product))
    ]  # fmt: skip
    return torch.stack(made) if made else torch.zeros(0, batch, d)


def per_sample(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (like.dim() - 1))


def drift_formula(case: Flow, dtype: torch.dtype) -> Tensor:
    p, q = (per_sample(case.coef[:, i].to(dtype), case.x) for i in (0, 1))
    return p * case.x.to(dtype) + q * case.network.to(dtype)


def divergence_formula(case: Flow, dtype: torch.dtype) -> Tensor:
    assert case.product is not None
    p, r = case.coef[:, 0].to(dtype), case.coef[:, 2].to(dtype)
    v = probes(case).to(dtype)
    trace = (v * case.product.to(dtype).reshape(v.shape)).sum(2)
    return p * v.shape[2] + r * trace


def off(name: str, got: Tensor, exact: Tensor, plain: Tensor, slack: float = 0.0) -> str:
    """ "" when `got` is `exact` to twice the error of torch at its dtype, a rounding of the result
    and `slack`; a float64 result, which has no wider truth beside it, to 64 roundings."""
    if exact.numel() == 0:
        return ""
    ulp = torch.finfo(got.dtype).eps * (64 if got.dtype == torch.float64 else 1)
    bound = 2 * float((plain.double() - exact).abs().max()) + ulp * float(exact.abs().max())
    worst = float((got.double() - exact).abs().max())
    return "" if worst <= bound + slack else f"{name}: off by {worst:.3g}, allowed {bound:.3g}"


def violation(case: Flow, got: tuple[Tensor, Tensor | None]) -> str:
    """ "" when `got` is the float64 formula to twice torch's error; normals to their own bound."""
    drift, divergence = got
    wide = torch.float64
    bad = off("drift", drift, drift_formula(case, wide), drift_formula(case, case.x.dtype))
    if bad or case.product is None or divergence is None:
        return bad
    slack = 0.0
    if case.gaussian and case.product.numel():
        weight = case.coef[:, 2].abs() * case.product.double().reshape(
            probes(case).shape
        ).abs().sum(2)
        slack = 2e-6 * float(weight.max())
    exact, plain = divergence_formula(case, wide), divergence_formula(case, case.sums)
    return off("divergence", divergence, exact, plain, slack)


def same(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> bool:
    """Equal to the bit."""
    if (a[1] is None) != (b[1] is None) or not torch.equal(a[0], b[0]):
        return False
    return a[1] is None or b[1] is None or torch.equal(a[1], b[1])


def picked(case: Flow, order: Tensor) -> Flow:
    """The same samples in another order, or some of them."""
    return replace(
        case,
        x=case.x[order],
        network=case.network[order],
        product=None if case.product is None else case.product[:, order],
        keys=case.keys[order],
        coef=case.coef[order],
    )


@dataclass
class Error:
    """Everything that one call of `error_norm_` reads."""

    x: Tensor
    registers: Tensor
    weights: Tensor
    atol: float = 1e-3
    rtol: float = 3e-3


def error(
    shape: tuple[int, ...], stages: int = 8, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Error:
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    x, registers = normal(*shape).to(dtype), normal(stages, *shape).to(dtype)
    return Error(x, registers, 1e-3 * normal(shape[0], stages))


def smooth(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Error:
    """dopri5's error of slopes that differ by 1e-3, as those of a step do: they cancel."""
    case = error(shape, 8, dtype=dtype)
    b = torch.tensor(
        [71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40],
        dtype=torch.float64,
    )
    case.registers[2:] = case.registers[1] + 1e-3 * case.registers[2:]
    case.weights[:, 1:] = b * torch.linspace(0.01, 0.3, shape[0], dtype=torch.float64)[:, None]
    return replace(case, atol=1e-5, rtol=1e-5)


def loses_digits(case: Error, got: Tensor) -> str:
    """ "" when every sample's error is the float64 formula of the same registers to 1e-5."""
    exact = norm_formula(case, torch.float64)
    worst = float(((got.double() - exact) / exact).abs().max())
    return "" if worst <= 1e-5 else f"off by {worst:.2g} of itself"


def norm(case: Error, backend: str) -> Tensor:
    out = torch.full((len(case.x),), NAN, dtype=case.x.dtype)
    call(
        backend, "error_norm_", out, case.x, case.registers, case.weights, case.atol, case.rtol
    )  # fmt: skip
    return out


def norm_formula(case: Error, dtype: torch.dtype) -> Tensor:
    u0, u1 = case.registers[0].to(dtype), case.x.to(dtype)
    e = torch.zeros_like(u1)
    for k in range(1, len(case.registers)):
        e = e + per_sample(case.weights[:, k].to(dtype), u1) * case.registers[k].to(dtype)
    ratio = e / (case.atol + case.rtol * torch.maximum(u0.abs(), u1.abs()))
    return ratio.reshape(len(u1), -1).square().mean(1).sqrt()


def norm_violation(case: Error, got: Tensor) -> str:
    wide, own = torch.float64, case.x.dtype
    return off("out", got, norm_formula(case, wide), norm_formula(case, own))


def hides_nan(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> str:
    """ "" when a NaN shows in its sample's error alone: in x, in the old state, or in a slope."""
    case = error(shape, 3, dtype=dtype)
    clean = norm(case, backend)
    poisoned = {1: case.x, 2: case.registers[0], 4: case.registers[2]}
    for b, t in poisoned.items():
        t[b].view(-1)[b] = NAN
    got = norm(case, backend)
    for b in range(len(got)):
        if b in poisoned and not got[b].isnan():
            return f"sample {b} hides a NaN"
        if b not in poisoned and got[b] != clean[b]:
            return f"sample {b} differs"
    return ""


def norm_picked(case: Error, order: Tensor) -> Error:
    return replace(
        case, x=case.x[order], registers=case.registers[:, order], weights=case.weights[order]
    )


def far_apart(tensors: Tensor) -> Tensor:
    """The same two [2, 1, d], more than 2³¹ elements apart. What lies between is never touched, so
    that it takes no memory."""
    count, _, d = tensors.shape
    step = 2**31 + 64
    memory = torch.empty((count - 1) * step + d, dtype=tensors.dtype)
    return memory.as_strided((count, 1, d), (step, d, 1)).copy_(tensors)
