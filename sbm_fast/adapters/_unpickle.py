"""Reads the data out of a pickle without running it.

A pickle is a program for a stack machine, and the usual machine calls any function that the program
names. This one knows the opcodes that hold data and a closed table of names. Behind each name is a
function of this file that makes a number, a container, a tensor, or a `Record` in place of an
object. Nothing is imported, looked up or called that stands in the file; whatever it asks for
beyond that is an error that says what it was.

The table has what `pickle.dump` writes for networks of NVIDIA's ``torch_utils.persistence`` (EDM,
EDM2): those carry the source of their classes, which stays unread text here.
"""

from __future__ import annotations

import io
import mmap
import os
import pickletools
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbm_fast.files import require_file, unreadable


@dataclass
class Record:
    """Stands for an object whose class is not loaded.

    Attributes:
        class_name: the name of its class.
        state: its attributes.
    """

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What the pickle at ``path`` holds: Python's own values, tensors on the CPU, and `Record`s.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no pickle, is cut off, or asks for something that holds no data; the
            message names the file, and what it asked for.
    """
    require_file(path)
    problems = (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Machine().run(data)
    except _Asked as error:
        raise unreadable(path, f"it asks for {error}, which is not data of a network") from None
    except (*problems, RuntimeError, struct.error) as error:
        raise unreadable(path, f"it is no pickle of a network, or cut off ({error})") from error


class _Asked(Exception):
    """The file asks for something outside the table."""


@dataclass(frozen=True)
class _Name:
    """A name in the file: ``module.attribute``. It stands on the stack and is never looked up."""

    path: str


class _Mark:
    """Where the elements of a container begin on the stack."""


class _Machine:
    """The stack, the memo, and one method for each kind of opcode."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, source: Any) -> Any:
        """The value that the program in ``source`` (with ``read`` and ``readline``) leaves."""
        for opcode, argument, _ in pickletools.genops(source):
            name = opcode.name
            if name == "STOP":
                return self.pop()
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _NEW:
                self.stack.append(_NEW[name]())
            elif name in _TUPLES:
                self.push_tuple(_TUPLES[name])
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise _Asked(f"opcode {name}")
        raise ValueError("its end is missing")

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise ValueError("its stack runs empty")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"expected a {kind.__name__} on its stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[at], _Mark):
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise ValueError("its stack has no mark")

    def push_tuple(self, size: int | None) -> None:
        items = self.pop_to_mark() if size is None else [self.pop() for _ in range(size)][::-1]
        self.stack.append(tuple(items))

    def mark(self, _: object) -> None:
        self.stack.append(_Mark())

    def drop(self, _: object) -> None:
        self.pop()

    def drop_to_mark(self, _: object) -> None:
        self.pop_to_mark()

    def memoize(self, _: object) -> None:
        self.put(len(self.memo))

    def put(self, key: int) -> None:
        self.memo[key] = self.top(object)

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def append(self, _: object) -> None:
        item = self.pop()
        self.top(list).append(item)

    def extend(self, _: object) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self.top(dict)[_key(key)] = value

    def set_items(self, _: object) -> None:
        items = self.pop_to_mark()
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def add(self, _: object) -> None:
        items = self.pop_to_mark()
        self.top(set).update(map(_key, items))

    def name(self, argument: str) -> None:
        self.push_name(*argument.split(" ", 1))

    def name_from_stack(self, _: object) -> None:
        attribute, module = self.pop(), self.pop()
        self.push_name(module, attribute)

    def push_name(self, module: str, attribute: str) -> None:
        path = f"{module}.{attribute}"
        if path not in _FUNCTIONS and path not in _CLASSES and path not in _CONSTANTS:
            raise _Asked(path)
        self.stack.append(_CONSTANTS[path] if path in _CONSTANTS else _Name(path))

    def call(self, _: object) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or name.path not in _FUNCTIONS:
            raise _Asked(f"a call of {_called(name)}")
        self.stack.append(_FUNCTIONS[name.path](*arguments))

    def make(self, _: object) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or name.path not in _CLASSES or arguments != ():
            raise _Asked(f"an object of {_called(name)}")
        self.stack.append(_CLASSES[name.path]())

    def set_state(self, _: object) -> None:
        state, target = self.pop(), self.top(object)
        if isinstance(target, Record):
            target.state.update(state if isinstance(state, dict) else {"state": state})
        elif isinstance(target, np.dtype):
            if state[1] == ">":
                raise ValueError("numbers in big-endian order")
        elif not isinstance(target, dict):  # a mapping's attributes are no part of its items
            raise _Asked(f"the attributes of a {type(target).__name__}")


def _key(key: Any) -> Any:
    # Others could be nested so deep that hashing them ends the process.
    if not isinstance(key, (str, bytes, int, float, type(None))):
        raise TypeError(f"a {type(key).__name__} as a key")
    return key


def _called(name: Any) -> str:
    # No repr of anything else: a few bytes can nest a tuple so that it takes forever.
    return name.path if isinstance(name, _Name) else f"a {type(name).__name__}"


def _persistent(meta: Any) -> Record:
    name, state = meta["class_name"], meta["state"]
    if meta["type"] != "class" or not isinstance(name, str) or not isinstance(state, dict):
        raise ValueError("a persistent object that is not of a class")
    return Record(name, dict(state))


def _storage(data: bytes) -> torch.TypedStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TypedStorage is deprecated, but is in files
        try:
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # it raises of all kinds for what is no memory of a tensor
            raise ValueError(f"in a tensor's memory: {error}") from error
    if not isinstance(storage, torch.TypedStorage):
        raise ValueError(f"a {type(storage).__name__} where a tensor's memory should be")
    return storage


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise ValueError(f"a tensor over a {type(storage).__name__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    # as_strided refuses what lies outside of the memory, but not elements that are given twice.
    tensor = flat.as_strided(size, stride, offset)
    if tensor.numel() > flat.numel():
        raise ValueError(f"a tensor {list(tensor.shape)} over {flat.numel()} numbers")
    return tensor


def _parameter(data: Tensor, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError(f"a parameter that is a {type(data).__name__}")
    return data


def _dtype(code: str, *_: object) -> np.dtype[Any]:
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise _Asked("a numpy.dtype of another kind than numbers")
    return np.dtype(code)


def _number(dtype: np.dtype[Any], data: bytes) -> Any:
    return np.frombuffer(data, dtype, count=1)[0].item()


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in items}


def _set(items: Any = ()) -> set[Any]:
    return set(map(_key, items))


def _array(*_: object) -> Record:
    # No network has any; what they hold is not made.
    return Record("ndarray")


def _size(sizes: Any) -> tuple[int, ...]:
    return tuple(sizes)


def _device(kind: Any, *_: object) -> Any:
    return kind


def _module(name: str) -> Callable[[], Record]:
    return lambda: Record(name)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "builtins.set": _set,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.numeric._frombuffer": _array,
    "numpy._core.numeric._frombuffer": _array,
}
_CLASSES: dict[str, Callable[[], Any]] = {
    "dnnlib.util.EasyDict": dict,
    "collections.OrderedDict": dict,
    "torch.nn.modules.container.ModuleDict": _module("ModuleDict"),
    "torch.nn.modules.container.ModuleList": _module("ModuleList"),
    "torch.nn.modules.container.Sequential": _module("Sequential"),
}
_CONSTANTS: dict[str, Any] = {
    **{f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "float32")},
    **{f"torch.{name}": getattr(torch, name) for name in ("float64", "int32", "int64", "uint8")},
    "numpy.ndarray": "numpy.ndarray",
}

_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_to_mark,
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.make,
    "BUILD": _Machine.set_state,
}
