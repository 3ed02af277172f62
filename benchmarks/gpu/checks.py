"""Is it right? Asked of every implementation before it is timed.

Those that draw their own noise are held to the law of their result: after some steps the state is
A·x + B·F + √V·z with a standard normal z, whose mean, variance and products with x and F must lie
within `SIGMAS` standard errors. Ours are held to the eager reference on the same keys besides.
"""

import torch
from torch import Tensor, nn

from benchmarks.baselines import corrector_coefficients, euler_maruyama_coefficients
from benchmarks.gpu.context import Context, Shape
from benchmarks.gpu.subjects import Op, make_sampler
from sbm_fast.sampler import Sampler

SIGMAS = 8.0
UNITS = 16
"""Units of float32 that a row may be off, relative to the largest value."""

Errors = dict[str, float]


def em_law(steps: int) -> tuple[float, float, float]:
    """A, B, V after the first `steps` steps of Euler–Maruyama with a fixed network output F."""
    a_all, b_all, variance = 1.0, 0.0, 0.0
    for a, b, d in euler_maruyama_coefficients(torch.float64)[:steps].tolist():
        a_all, b_all, variance = a * a_all, a * b_all + b, a * a * variance + d * d
    return a_all, b_all, variance


def pc_law(steps: int, square: float) -> tuple[float, float, float]:
    """A, 0, V after `steps` iterations with the score −x, from a state of mean square `square`.

    ε = c ‖z‖²/‖s‖² is taken as c over the state's mean square, which is within a standard error.
    """
    a_all, variance = 1.0, 0.0
    for c, kx, ks, d in corrector_coefficients(torch.float64)[:steps].tolist():
        epsilon = c / square
        a = (kx - ks) * (1 - epsilon)
        added = (kx - ks) ** 2 * 2 * epsilon + d * d
        a_all, variance = a * a_all, a * a * variance + added
        square = a * a * square + added
    return a_all, 0.0, variance


def hold_to_law(
    law: tuple[float, float, float], before: Tensor, after: Tensor, out: Tensor | None
) -> Errors:
    """Standard errors by which `after` misses the law; AssertionError above `SIGMAS`."""
    a, b, variance = law
    z = after.double() - a * before.double()
    if out is not None:
        z -= b * out.double()
    z /= variance**0.5
    root = z.numel() ** 0.5
    missed = [z.mean().abs() * root, (z.square().mean() - 1).abs() * root / 2**0.5]
    for factor in (before, out):
        if factor is not None:
            factor = factor.double()
            missed.append((z * factor).mean().abs() * root / factor.square().mean().sqrt())
    worst = float(torch.stack(missed).max())
    assert worst <= SIGMAS, f"misses the law of its result by {worst:.3g} standard errors"
    return {"standard errors off": worst}


def hold_op_to_reference(op: Op, backend: str, samples: int = 4) -> Errors:
    """One row at the op's full size: all elements by the law, first and last samples by `eager`."""
    x, out = op.sets[0]
    before = x.clone()
    op.i = op.first
    op.advance(1)
    errors = hold_to_law(em_law(1), before, x, out)
    batch = len(x)
    for first in (0, batch - samples):
        part = slice(first, first + samples)
        reference = Op("eager", before[part].clone(), out[part].clone(), first)
        reference.advance(1)
        errors["relative to eager"] = max(
            errors.get("relative to eager", 0.0), close(x[part], reference.sets[0][0], 1)
        )
    unchanged = float((x == before).float().mean())
    assert unchanged < 1e-3, f"{unchanged:.2%} of the elements were not written"
    x.copy_(before)
    op.i = op.first
    return errors


def hold_sampler_to_reference(
    context: Context, backend: str, network: nn.Module, shape: Shape, graph: bool, **options: object
) -> Errors:
    """Two seeds, one prepared sampler, a few rows: a graph that kept the first seed is found."""
    # score_sde's table of β(t)/N needs N > 20.
    chosen: dict[str, object] = {"steps": context.size(40, 21), **options}
    sampler = make_sampler(context, backend, network, shape, graph=graph, **chosen)  # type: ignore[arg-type]
    reference: Sampler = make_sampler(context, "eager", network, shape, **chosen)  # type: ignore[arg-type]
    worst, results = 0.0, []
    for seed in (3, 4):
        result = sampler(seed=seed).clone()
        worst = max(worst, close(result, reference(seed=seed), reference.plan.rows))
        results.append(result)
    assert not torch.equal(*results), "two seeds gave the same samples"
    return {"relative to eager": worst}


def close(value: Tensor, reference: Tensor, rows: int) -> float:
    """The largest difference over the largest value; AssertionError beyond rounding."""
    error = float((value - reference).abs().max() / reference.abs().max())
    bound = UNITS * rows * torch.finfo(torch.float32).eps
    assert error <= bound, f"is off from eager by {error:.3g}, more than {bound:.3g}"
    return error
