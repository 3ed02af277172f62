"""Checks and defaults of the arguments that `Sampler` and `sample` take."""

import operator
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sbm_fast.backend import Kernels
from sbm_fast.model import ScoreModel
from sbm_fast.plan import NORMS, Plan
from sbm_fast.row_step import FLOATS


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
        sizes = tuple(shape)
    except TypeError:
        raise TypeError(f"shape: expected integers (batch, …), got {shape!r}") from None
    if any(isinstance(size, str) for size in sizes):
        raise TypeError(f"shape: expected integers (batch, …), got {shape!r}")
    whole = all(hasattr(size, "__index__") and not isinstance(size, bool) for size in sizes)
    if not sizes or not whole or min(sizes) < 0:
        raise ValueError(f"shape: expected (batch, …), integers ≥ 0, got {shape!r}")
    sizes = tuple(operator.index(size) for size in sizes)
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
    if net_dtype not in FLOATS:
        raise TypeError(f"net_dtype: expected one of {FLOATS}, got {net_dtype!r}")
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} is not to be had here ({error})") from None
    if place.type == "meta":
        raise ValueError("device: nothing can be sampled on meta")
    return place, net_dtype


def check_cuda_graph(cuda_graph: bool | str, device: torch.device, kernels: Kernels) -> bool:
    """Whether to record graphs; ValueError for a value that is unknown or can't be had here.

    "auto" does not until graphs have been measured on a GPU.
    """
    if cuda_graph not in ("auto", True, False):
        raise ValueError(f'cuda_graph: expected "auto", True or False, got {cuda_graph!r}')
    if cuda_graph is not True:
        return False
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a run on a CUDA device, this one is on {device}")
    if kernels.name == "eager":
        raise ValueError(
            "cuda_graph: the eager step looks at its table on the host, which no graph can hold; "
            'expected backend="cuda" or "triton", got "eager" (see sbm_fast.doctor())'
        )
    return True


def guidance_weights(guidance: float | Tensor, x: Tensor, model: ScoreModel) -> Tensor:
    """One weight for every sample of x; ValueError or TypeError naming `guidance`."""
    if model.null_cond is None:
        raise ValueError(
            "guidance: the model has no null_cond (the conditioning that stands for none); "
            "give it to ScoreModel(..., null_cond={...})"
        )
    try:
        weight = torch.as_tensor(guidance, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"guidance: expected a number or weights, got {guidance!r}") from None
    if weight.dim() > 1 or (weight.dim() == 1 and len(weight) != len(x)):
        raise ValueError(
            f"guidance: expected a number or [{len(x)}] weights, got shape {tuple(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"guidance: expected finite weights, got {guidance!r}")
    return weight.expand(len(x)).contiguous()


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
