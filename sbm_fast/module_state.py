"""What a run changes in a network for as long as it goes on, and puts back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

_in_use = WeakIdKeyDictionary()
"""Modules and parameters -> [how many runs hold them, what their attribute was before]."""
_lock = threading.Lock()


@contextmanager
def eval_mode(net: object) -> Iterator[None]:
    """Every submodule in eval mode."""
    modules = net.modules() if isinstance(net, torch.nn.Module) else ()
    with _held(modules, "training"):
        yield


@contextmanager
def frozen(net: object) -> Iterator[None]:
    """No parameter wants a gradient: derivatives by the input alone cost less."""
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else ()
    with _held(parameters, "requires_grad"):
        yield


@contextmanager
def _held(things: Iterable[Any], attribute: str) -> Iterator[None]:
    """The attribute of all of them False.

    Runs in several threads may share a thing: the last one out puts it back.
    """
    held: list[Any] = []
    try:
        with _lock:
            for thing in things:
                users = _in_use.setdefault(thing, [0, getattr(thing, attribute)])
                users[0] += 1
                held.append(thing)
                setattr(thing, attribute, False)
        yield
    finally:
        with _lock:
            for thing in held:
                users = _in_use[thing]
                users[0] -= 1
                if users[0] == 0:
                    setattr(thing, attribute, users[1])
                    del _in_use[thing]
