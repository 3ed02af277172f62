"""Checks and defaults of the arguments that `Sampler` and `sample` take."""

import warnings
from collections.abc import Sequence

import torch

from sbm_fast.model import ScoreModel
from sbm_fast.plan import NORMS, Plan


def full_shape(shape: Sequence[int] | None, num_samples: int, model: ScoreModel) -> tuple[int, ...]:
    """The shape of the result; ValueError or TypeError naming `shape` or `num_samples`."""
    if shape is None:
        if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__"):
            raise TypeError(f"num_samples: expected an integer ≥ 0, got {num_samples!r}")
        if num_samples < 0:
            raise ValueError(f"num_samples: expected an integer ≥ 0, got {num_samples!r}")
        if model.sample_shape is None:
            raise ValueError(
                "shape: the model does not know the shape of a sample; pass shape=(batch, …)"
            )
        shape = (num_samples, *model.sample_shape)
    try:
        sizes = tuple(int(s) for s in shape)
        whole = all(s == t for s, t in zip(sizes, shape, strict=True))
    except (TypeError, ValueError):
        raise TypeError(f"shape: expected integers (batch, …), got {shape!r}") from None
    if not sizes or not whole or min(sizes) < 0:
        raise ValueError(f"shape: expected (batch, …) with sizes ≥ 0, got {shape!r}")
    if model.sample_shape is not None and sizes[1:] != tuple(model.sample_shape):
        raise ValueError(
            f"shape: the model was made for samples of shape {tuple(model.sample_shape)}, "
            f"got {sizes[1:]}"
        )
    return sizes


def placement(
    model: ScoreModel,
    device: torch.device | str | None,
    net_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> tuple[torch.device, torch.dtype]:
    """Device of the run and dtype of the network's input."""
    net = model.net
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else iter(())
    first = next((p for p in parameters if p.is_floating_point()), None)
    if device is None:
        device = torch.get_default_device() if first is None else first.device
    if net_dtype is None:
        net_dtype = dtype if first is None else first.dtype
    if not isinstance(net_dtype, torch.dtype) or not net_dtype.is_floating_point:
        raise TypeError(f"net_dtype: expected a floating dtype, got {net_dtype!r}")
    try:
        return torch.device(device), net_dtype
    except (RuntimeError, TypeError):
        raise ValueError(f"device: torch knows no device {device!r}") from None


def check_cuda_graph(cuda_graph: bool | str, device: torch.device) -> None:
    """ValueError for a value that is unknown, or that this version can't do."""
    if cuda_graph not in ("auto", True, False):
        raise ValueError(f'cuda_graph: expected "auto", True or False, got {cuda_graph!r}')
    if cuda_graph is True:
        raise ValueError(
            f"cuda_graph: graph capture is not part of this version (device {device}); "
            'use "auto" or False'
        )


def warn_about(plan: Plan, net_dtype: torch.dtype, numel: int) -> None:
    """Warns of plans that sample another law, or that cancel the network's digits."""
    noisy = {"per_sample", "sqrt_d"} & {NORMS[int(n)] for n in set(plan.norm.tolist())}
    if noisy and numel < 100:
        warnings.warn(
            f"norm={sorted(noisy)[0]!r} changes the law in low dimension (about +1.4/d of the "
            f'standard deviation; here d = {numel}); norm="sigma" is exact',
            stacklevel=4,
        )
    if plan.evaluates.any():
        loss = float(plan.kappa.max()) * torch.finfo(net_dtype).eps
        if loss > 1e-2:
            warnings.warn(
                f"the plan cancels digits: a {net_dtype} network output leaves a relative error "
                f"of about {loss:.1g} in the state (κ = {plan.kappa.max():.3g}); use a float32 "
                "network or a grid that ends earlier",
                stacklevel=4,
            )
