"""Other classes for live modules: each a subclass of the module's own, with another forward."""

from __future__ import annotations

import copy
import copyreg
import dis
import functools
import types
from typing import Any

from torch import nn

_NEW: Any = copyreg.__newobj__  # type: ignore[attr-defined]


class Exchanged:
    """First base of every class that `exchange` makes.

    Parameters, buffers, children and hooks are the module's own; only its class is another one.
    A deepcopy has the exchanged class too. A pickle names the original class: it can be read
    where there is no sbm_fast.
    """

    _sbm_fast_original: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Classes that register their subclasses do not see those made here."""
        if "_sbm_fast_original" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        exchanged, original = type(self), type(self)._sbm_fast_original
        set_class(self, original)
        try:
            twin = copy.deepcopy(self, memo)
        finally:
            set_class(self, exchanged)
        if type(twin) is original:
            set_class(twin, exchanged)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        exchanged = type(self)
        if "_sbm_fast_original" not in vars(exchanged):
            return super().__reduce_ex__(protocol)  # A class on top of ours has a say of its own.
        set_class(self, exchanged._sbm_fast_original)
        try:
            reduced = self.__reduce_ex__(protocol)
        finally:
            set_class(self, exchanged)
        if isinstance(reduced, tuple) and reduced[0] is _NEW:
            # pickle wants the class of __newobj__ to be the object's; this one may be any.
            return copyreg._reconstructor, (reduced[1][0], object, None), *reduced[2:]  # type: ignore[attr-defined]
        return reduced


def exchange(module: nn.Module, *, mixin: type | None = None, forward: Any = None) -> None:
    """Gives a module another class: with the mixin, or with another forward.

    Raises:
        TypeError: Python cannot make or assign such a class, or it is parametrized by torch.
    """
    own: Any = type(module)
    if "parametrizations" in module._modules and not isinstance(module, Exchanged):
        raise TypeError(
            "torch.nn.utils.parametrize, which gave it this one, could not take it back"
        )
    if _says_super_of_its_class(own):
        raise TypeError("super(self.__class__, self) would call itself in any subclass")
    set_class(module, _subclass(own, mixin, forward))


def original(module: nn.Module) -> Any:
    """The class that a module had before all exchanges."""
    kind: Any = type(module)
    while "_sbm_fast_original" in vars(kind):
        kind = kind._sbm_fast_original
    return kind


def refuse_foreign(module: nn.Module) -> None:
    """Makes sure that `give_back` can be had.

    Raises:
        TypeError: something else has put a class of its own on top since.
    """
    if isinstance(module, Exchanged) and "_sbm_fast_original" not in vars(type(module)):
        raise TypeError(
            f"cannot restore a {type(module).__name__}: it was given another class after optimize"
        )


def give_back(module: nn.Module) -> None:
    """The module has its original class again."""
    set_class(module, original(module))


def set_class(module: Any, kind: type) -> None:
    """Assigns the class, past a __setattr__ of the module's own."""
    object.__setattr__(module, "__class__", kind)


@functools.cache
def _says_super_of_its_class(kind: type) -> bool:
    """Whether a method, but for the constructor, has super(self.__class__, …) or
    super(type(self), …)."""
    found = []
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            found += [f for name, f in vars(base).items() if name != "__init__"]
    for function in found:
        if (
            not isinstance(function, types.FunctionType)
            or "super" not in function.__code__.co_names
        ):
            continue
        steps = [(i.opname, i.argval) for i in dis.get_instructions(function)]
        steps = [step for step in steps if step[0].startswith("LOAD_")]
        for (_, called), one, two in zip(steps, steps[1:], steps[2:], strict=False):
            of_self = one[0].startswith("LOAD_FAST") and two == ("LOAD_ATTR", "__class__")
            if called == "super" and (of_self or one == ("LOAD_GLOBAL", "type")):
                return True
    return False


@functools.cache
def _subclass(own: Any, mixin: type | None, forward: Any) -> Any:
    bases = (own,) if mixin is None else (mixin, own)
    if not issubclass(own, Exchanged):
        bases = (Exchanged, *bases)
    body = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_sbm_fast_original": own,
    }
    if forward is not None:
        body["forward"] = forward
    return types.new_class(own.__name__, bases, exec_body=lambda namespace: namespace.update(body))
