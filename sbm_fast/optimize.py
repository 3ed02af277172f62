"""`optimize`: the fused op in somebody else's network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sbm_fast.nn.conv import Conv2d
from sbm_fast.optimization.cast import cast, exchange_below, lay_out
from sbm_fast.optimization.compare import Example, outputs, relative_difference, tolerance
from sbm_fast.optimization.exchange import original, set_class
from sbm_fast.optimization.joined import FusedNorm, FusedSequential, bare
from sbm_fast.optimization.norms import looks_like_norm, why_not
from sbm_fast.optimization.report import Left, Replaced, Report
from sbm_fast.optimization.rewrite import Site, rewrite
from sbm_fast.optimization.silu import known_silu
from sbm_fast.optimization.source import Unreadable

__all__ = ["Report", "optimize"]


def optimize(
    net: nn.Module,
    *,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    example: Example | None = None,
) -> Report:
    """Fuses GroupNorm with its neighbours in a live network, in place.

        y = SiLU(GroupNorm(x + vector) · (1 + scale) + shift)

    becomes one call of the op `sbm_fast.nn.functional.group_norm_silu`, as far as the network's
    own code has these parts next to each other: in a module's forward, over several statements
    and branches, or as neighbours in an nn.Sequential. A GroupNorm whose neighbours are something
    else is the op alone. Networks of any source are taken; those of diffusers, score_sde and EDM
    are tested.

    A module's source is read, proven to be what runs (it compiles to the same bytecode), and the
    same code is made with a few expressions handed to functions that look at run time whether the
    op fits and do what the original expression did where it does not. So train and eval mode,
    optional arguments and changed attributes mean what they meant. The module gets a subclass of
    its own class; parameters, state_dict, optimizers, hooks, isinstance, train, to, deepcopy and
    torch.compile are as they were. A pickle of the network names the original classes. Norms and
    activations with hooks are called one by one, for as long as they have hooks.

    The op's output lies in memory as its input does, channels first or last, and has its dtype:
    under autocast too, where torch's GroupNorm on GPUs gives float32: a tensor [B, C, L] that was
    transposed stays so, where torch's GroupNorm makes a contiguous one. For a backward a joined sum
    keeps its parts: a caller, or a buffer's owner, that writes into them before it gets torch's
    error. Restore before `torch.jit.script`.

    Args:
        net: any network, on any device, in train or eval mode. A second call changes what is new.
        channels_last: convolution weights in channels_last layout, which activations then follow.
            Dropout draws other numbers then: torch draws them in the order of the memory.
        dtype: torch.bfloat16 or torch.float16, for inference: weights of torch's convolutions and
            linear layers are cast, the rest (norms, embeddings) stays; the network runs under
            autocast to it and gives the input's dtype back. The old weights are kept for `restore`.
        example: arguments of a call (a tuple, or a mapping of keyword arguments) whose output is
            compared before and after, in eval mode and without gradients.

    Returns:
        What was replaced, what was left and why; `print` it. `Report.restore()` is the way back.

    Raises:
        TypeError: net is not a module, dtype is not one of the two.
        ValueError: the network runs under another dtype of an earlier optimize.
        RuntimeError: the outputs of the example differ by more than rounding, or hold no tensor.
        After any error the network is as it was.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
    before = None if example is None else outputs(net, example)
    report = Report(net)
    classes = {module: type(module) for module in net.modules()}
    try:
        _exchange_all(net, report)
        if channels_last:
            laid_out = lay_out(net)
            report.kept += laid_out
            report.weights.append(f"{len(laid_out)} convolution weights laid out channels_last")
        if dtype is not None:
            cast_ones = cast(net, dtype)
            report.kept += cast_ones
            report.weights.append(f"{len(cast_ones)} parameters cast to {dtype}, under autocast")
        if before is not None and example is not None:
            report.difference = relative_difference(before, outputs(net, example))
            limit = tolerance(before, dtype)
            if not report.difference <= limit:
                raise RuntimeError(
                    f"the outputs differ by {report.difference:.1e}, allowed are {limit:.0e}; "
                    f"all is undone of\n{report}"
                )
    except BaseException:
        for module, kind in classes.items():
            set_class(module, kind)
        report.put_back()
        raise
    return report


def _exchange_all(net: nn.Module, report: Report) -> None:
    modules = dict(_open(net, "", report, set()))
    norms = _take_norms(modules, report)
    calls: dict[nn.Module, list[Site]] = {norm: [] for norm in norms}
    late: list[tuple[Site, nn.Module]] = []
    for path, module in modules.items():
        for site in _join(path, module, norms, report):
            if site.module is None:
                late += [(site, norm) for norm in _near(module) if norm in norms]
            elif site.module in norms:
                calls[site.module].append(site)
    for site, norm in late:
        if all(called.module is None for called in calls[norm]):
            calls[norm].append(site)
    for norm, path in norms.items():
        report.replaced.append(_row(path, calls[norm]))
        if calls[norm] and not bare(norm):
            reason = "has hooks: called alone, without its neighbours, until they are removed"
            report.left.append(Left(path, reason))
    packable = [m for m in modules.values() if type(m) is nn.Conv2d]
    packable = [m for m in packable if not _exchange(m, mixin=Conv2d)]
    if packable:
        report.weights.append(
            f"{len(packable)} convolutions can keep packed weights while sampling"
        )


def _open(
    module: nn.Module, path: str, report: Report, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, each once, but for those in whose code nothing can be changed."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, torch.jit.ScriptModule):
        report.left.append(Left(path, "is a ScriptModule"))
    elif hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        report.left.append(Left(path, "is under torch.compile: optimize first, then compile"))
    else:
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from _open(child, f"{path}.{name}" if path else name, report, seen)


def _take_norms(modules: dict[str, nn.Module], report: Report) -> dict[nn.Module, str]:
    """Makes every GroupNorm the fused op, and tells their paths."""
    norms: dict[nn.Module, str] = {}
    for path, module in modules.items():
        if isinstance(module, FusedNorm):
            norms[module] = path
        elif looks_like_norm(module):
            reason = why_not(module) or _exchange(module, mixin=FusedNorm)
            if reason:
                report.left.append(Left(path, reason))
            else:
                norms[module] = path
    return norms


def _join(path: str, module: nn.Module, norms: dict[nn.Module, str], report: Report) -> list[Site]:
    """Joins the norms that a module calls with their neighbours; the calls."""
    if module in norms:
        return []
    own = original(module)
    if own.forward is nn.Sequential.forward and "forward" not in vars(module):
        return _join_neighbours(module)
    if own.__module__.startswith("torch.") or not any(
        isinstance(m, FusedNorm) for m in module.modules()
    ):
        return []
    reason = "a forward was set on the instance" if "forward" in vars(module) else ""
    sites: list[Site] = []
    if not reason:
        try:
            forward, sites = rewrite(module, own.forward)
            present = [vars(kind).get("forward") for kind in type(module).__mro__]
            if sites and forward not in present:
                reason = _exchange(module, forward=forward)
        except Unreadable as error:
            reason = str(error)
    if not reason:
        return sites
    if any(norm in norms for norm in _near(module)):
        report.left.append(Left(path, f"{reason}: its norms are not joined with neighbours"))
    return []


def _join_neighbours(module: nn.Module) -> list[Site]:
    children = list(module.children())
    sites = [
        Site("neighbours in nn.Sequential", norm, silu=True)
        for norm, act in itertools.pairwise(children)
        if isinstance(norm, FusedNorm) and known_silu(act)
    ]
    if (
        sites
        and not isinstance(module, FusedSequential)
        and _exchange(module, mixin=FusedSequential)
    ):
        return []
    return sites


def _near(module: nn.Module) -> Iterator[nn.Module]:
    """The children, and those in containers."""
    for child in module.children():
        yield child
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _near(child)


def _exchange(module: nn.Module, **how: Any) -> str:
    """Why the module's class cannot be exchanged; empty if it was."""
    try:
        exchange_below(module, **how)
    except TypeError as error:
        return f"its class cannot be exchanged ({error})"
    return ""


def _row(path: str, sites: list[Site]) -> Replaced:
    """What was joined to a norm, over all the calls of it."""
    joined = [site for site in sites if site.add or site.film or site.silu]
    parts = [
        "vector" if any(site.add for site in joined) else "",
        "GroupNorm",
        "FiLM" if any(site.film for site in joined) else "",
        "SiLU" if any(site.silu for site in joined) else "",
    ]
    where = ", ".join(dict.fromkeys(site.text for site in joined))
    return Replaced(path, " + ".join(filter(None, parts)), where)
