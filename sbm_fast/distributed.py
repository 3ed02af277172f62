"""Likelihoods and encodings over the ranks of `torch.distributed`: each takes its share.

Every rank is given all samples and gets all results. A rank solves its own share without talking
to the others, so they may need different numbers of evaluations; they meet once, at the end, also
when one of them fails. Sample b has the key of its global index, so the split leaves no trace but
the network's rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sbm_fast import bits, encoding, likelihood, noise
from sbm_fast.process import count

Result = TypeVar("Result")


def share(n: int, group: Any = None) -> slice:
    """Which of n samples are this rank's: consecutive ones, as many as the others' to within one.

    Raises: RuntimeError when `torch.distributed` is not initialised.
    """
    _check_initialised()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return slice(n * rank // ranks, n * (rank + 1) // ranks)


def log_likelihood(
    model: object, sde: object, x: Tensor, *, group: Any = None, **options: Any
) -> likelihood.LikelihoodResult:
    """`sbm_fast.log_likelihood` of x [N, …], which every rank has, shared among the ranks.

    Args:
        group: a process group; None: all ranks.
        options: those of `sbm_fast.log_likelihood`. With seed=None rank 0 draws it for all.

    Raises: what `sbm_fast.log_likelihood` raises, on the rank where it does; RuntimeError naming
    that rank on the others.
    """
    return _over_ranks(likelihood.log_likelihood, model, sde, x, group, options)


def bits_per_dim(
    model: object, sde: object, x: Tensor, *, group: Any = None, **options: Any
) -> bits.BitsResult:
    """`sbm_fast.bits_per_dim` shared among the ranks, as `log_likelihood`."""
    whole = _over_ranks(bits.bits_per_dim, model, sde, x, group, options)
    mean, error = bits.mean_and_error(whole.bits_per_dim)
    return dataclasses.replace(whole, mean=mean, mean_stderr=error)


def encode(model: object, sde: object, x: Tensor, *, group: Any = None, **options: Any) -> Tensor:
    """`sbm_fast.encode` shared among the ranks, as `log_likelihood`; nothing is drawn.

    Raises: TypeError for return_info, which is each rank's own.
    """
    if options.get("return_info"):
        raise TypeError("return_info: is each rank's own; expected none, or sbm_fast.encode")
    return _over_ranks(encoding.encode, model, sde, x, group, options, draws=False)


def _over_ranks(
    function: Callable[..., Result],
    model: object,
    sde: object,
    x: Tensor,
    group: Any,
    options: dict[str, Any],
    *,
    draws: bool = True,
) -> Result:
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(f"x: expected a tensor (samples, …), got {type(x).__name__}")
    mine, keys = share(len(x), group), options.get("keys")
    own = _own_options(options, len(x), mine, group)
    if keys is not None:
        noise.check_keys(keys, len(x), options.get("seed"), options.get("first_sample", 0))
        own["keys"] = keys[mine]
    elif draws:
        own |= _seed_of_rank_0(options.get("seed"), group)
        first = count("first_sample", options.get("first_sample", 0), least=0)
        own["first_sample"] = first + mine.start
    failure: Exception | None = None
    result: Any = None
    try:
        result = function(model, sde, x[mine], **own)
    except Exception as error:  # the others wait for this rank: it must come to the meeting
        failure = error
    parts: list[Any] = [None] * dist.get_world_size(group)
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    dist.all_gather_object(parts, (said, _on_cpu(result)), group=group)
    if failure is not None:
        raise failure
    for rank, (words, _) in enumerate(parts):
        if words is not None:
            raise RuntimeError(f"rank {rank} of {len(parts)} failed: {words}")
    return _joined([part for _, part in parts], x.device)


def _check_initialised() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised; expected a process group (torchrun and "
            "torch.distributed.init_process_group)"
        )


def _own_options(options: dict[str, Any], n: int, mine: slice, group: Any) -> dict[str, Any]:
    """The options with this rank's part of what belongs to the samples.

    Raises: ValueError naming `cond` where a tensor that the samples share is as long as a rank's
    share of them, so that it would be taken for the samples' own there.
    """
    own, ranks = dict(options), dist.get_world_size(group)
    shares = {n * (rank + 1) // ranks - n * rank // ranks for rank in range(ranks)} - {n}
    if isinstance(own.get("cond"), Mapping):
        own["cond"] = dict(own["cond"])
        for name, v in own["cond"].items():
            length = len(v) if isinstance(v, Tensor) and v.dim() > 0 else -1
            if length in shares:
                raise ValueError(
                    f"cond: {name!r} has the first dimension {length}, as many as a rank's share "
                    f"of the {n} samples; give it another leading dimension, [1, …]"
                    if length != 1
                    else f"cond: {name!r} has the first dimension 1, and so does a rank's share of "
                    f"the {n} samples; use fewer ranks"
                )
            own["cond"][name] = v[mine] if length == n else v
    if own.get("progress"):
        own["progress"] = mine.start == 0
    return own


def _seed_of_rank_0(seed: int | None, group: Any) -> dict[str, int]:
    agreed = [noise.fresh_seed() if seed is None else seed]
    dist.broadcast_object_list(agreed, group=group, group_src=0)
    return {"seed": agreed[0]}


def _on_cpu(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.cpu()
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        return result
    values = {f.name: _on_cpu(getattr(result, f.name)) for f in dataclasses.fields(result)}
    return dataclasses.replace(result, **values)


def _joined(parts: list[Any], device: torch.device) -> Any:
    """The parts side by side: samples are the last axis of a table, else the first."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts).to(device)
    values: dict[str, Any] = {}
    # What is no tensor is taken from a rank that had samples: the others never asked the network.
    some = next((part for part in parts if _samples(part)), parts[0])
    for field in dataclasses.fields(some):
        mine = getattr(some, field.name)
        all_of_it = [getattr(part, field.name) for part in parts]
        if isinstance(mine, Tensor):
            axis = -1 if field.name in ("columns", "log_prob") else 0
            values[field.name] = torch.cat(all_of_it, dim=axis).to(device)
        elif dataclasses.is_dataclass(mine):
            values[field.name] = _joined(all_of_it, device)
        elif field.name == "seconds":
            values[field.name] = max(all_of_it)
    return dataclasses.replace(some, **values)


def _samples(part: Any) -> int:
    return next(v.shape[-1] for v in vars(part).values() if isinstance(v, Tensor))
