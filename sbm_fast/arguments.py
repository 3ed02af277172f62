"""Checks and defaults of the arguments that `Sampler` and `sample` take."""

import operator
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sbm_fast.backend import Kernels
from sbm_fast.model import ScoreModel
from sbm_fast.plan import NORMS, Plan
from sbm_fast.process import real_array
from sbm_fast.row_step import FLOATS


def full_shape(shape: Sequence[int] | None, num_samples: int, model: ScoreModel) -> tuple[int, ...]:
    """The shape of the result; ValueError or TypeError naming `shape` or `num_samples`."""
    if shape is None:
        if not _is_whole(num_samples):
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
    if not sizes or not all(map(_is_whole, sizes)) or min(sizes) < 0:
        raise ValueError(f"shape: expected (batch, …), integers ≥ 0, got {shape!r}")
    sizes = tuple(operator.index(size) for size in sizes)
    if model.sample_shape is not None and sizes[1:] != tuple(model.sample_shape):
        raise ValueError(
            f"shape: the model was made for samples of shape {tuple(model.sample_shape)}, "
            f"got {sizes[1:]}"
        )
    return sizes


def check_dtype(name: str, dtype: object, known: tuple[torch.dtype, ...]) -> None:
    """TypeError naming the argument unless it is one of these."""
    if not isinstance(dtype, torch.dtype) or dtype not in known:
        raise TypeError(f"{name}: expected one of {known}, got {dtype!r}")


def _is_whole(value: object) -> bool:
    """Whether it is one integer; an array of several has ``__index__`` too."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


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
    check_dtype("net_dtype", net_dtype, FLOATS)
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} is not to be had here ({error})") from None
    if place.type == "meta":
        raise ValueError("device: nothing can be sampled on meta")
    return place, net_dtype


def graph_asked_for(cuda_graph: object) -> bool:
    """Whether `cuda_graph` is True; ValueError or TypeError for what is unknown.

    "auto" does not record graphs until they have been measured on a GPU.
    """
    expected = 'cuda_graph: expected "auto", True or False, got'
    if not isinstance(cuda_graph, (bool, str)):  # 1 and np.True_ are equal to True, but not it
        raise TypeError(f"{expected} {type(cuda_graph)}")
    if isinstance(cuda_graph, str) and cuda_graph != "auto":
        raise ValueError(f"{expected} {cuda_graph!r}")
    return cuda_graph is True


def check_cuda_graph(cuda_graph: bool | str, device: torch.device, kernels: Kernels) -> bool:
    """Whether to record graphs; ValueError or TypeError for what is unknown or not to be had."""
    if not graph_asked_for(cuda_graph):
        return False
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a run on a CUDA device, this one is on {device}")
    if kernels.name == "eager":
        raise ValueError(
            "cuda_graph: the eager step looks at its table on the host, which no graph can hold; "
            'expected backend="cuda" or "triton", got "eager" (see sbm_fast.doctor())'
        )
    return True


def initial_state(
    x_init: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
) -> Tensor:
    """scale·x_init, or zeros for a plan that draws its start; errors name `x_init`."""
    x = torch.zeros(shape, dtype=dtype, device=device)
    if x_init is None:
        return x
    if not isinstance(x_init, Tensor) or not x_init.is_floating_point():
        got = x_init.dtype if isinstance(x_init, Tensor) else type(x_init).__name__
        raise TypeError(f"x_init: expected a floating tensor, got {got}")
    if tuple(x_init.shape) != shape:
        raise ValueError(f"x_init: expected shape {shape}, got {tuple(x_init.shape)}")
    x.copy_(x_init).mul_(scale)
    if not torch.isfinite(x).all():
        raise ValueError(f"x_init: holds values that are not finite in {dtype}")
    return x


def warn_caller(message: str) -> None:
    """A UserWarning at the line outside this package that led here."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "sbm_fast":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def guidance_weights(guidance: float | Tensor, x: Tensor, model: ScoreModel) -> Tensor:
    """One weight for every sample of x; ValueError or TypeError naming `guidance`."""
    if model.null_cond is None:
        raise ValueError(
            "guidance: the model has no null_cond (the conditioning that stands for none); "
            "give it to ScoreModel(..., null_cond={...})"
        )
    if isinstance(guidance, Tensor):
        if guidance.dtype == torch.bool or guidance.is_complex():
            raise TypeError(f"guidance: expected real numbers, got a tensor of {guidance.dtype}")
        weight = guidance.to(dtype=x.dtype, device=x.device)
    else:
        weight = torch.as_tensor(real_array("guidance", guidance), dtype=x.dtype, device=x.device)
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
