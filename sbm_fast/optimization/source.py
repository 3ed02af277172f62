"""The source of a live function, proven to be what runs, and functions made of changed sources."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import tokenize
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


class Unreadable(Exception):
    """Why a function's source is not to be had; `str()` of it is the reason."""


@functools.cache
def read(function: Any, text: str | None = None) -> tuple[types.FunctionType, ast.FunctionDef]:
    """The function under its decorators, and its definition.

    Args:
        text: the source of its module, for a function that did not come from a file.

    Raises:
        Unreadable: not a Python function, no source, or a source that does not compile to what
            runs (a file changed since its import, asserts rewritten by a test runner).
    """
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        raise Unreadable("its forward is not a Python function")
    try:
        if text is None:
            lines, start = inspect.getsourcelines(inner)
            text = "".join(inspect.findsource(inner)[0])
        else:
            start = inner.__code__.co_firstlineno
            lines = inspect.getblock(text.splitlines(keepends=True)[start - 1 :])
        # The "if" takes the indentation: nothing in strings over several lines moves.
        indented = lines[0][:1].isspace()
        tree = ast.parse(("if True:\n" if indented else "") + "".join(lines))
    except (OSError, TypeError, SyntaxError, IndexError, tokenize.TokenError):
        raise Unreadable("the source of its forward is not to be had") from None
    first: Any = tree.body[0]
    definition = first.body[0] if indented else first
    if not isinstance(definition, ast.FunctionDef):
        raise Unreadable("its forward is not a plain function")
    ast.increment_lineno(definition, start - 1 - indented)
    definition.decorator_list = []
    compiled = _compile_file(text, inner.__code__.co_filename)
    if not any(_same(code, inner.__code__) for code in compiled):
        raise Unreadable("the source of its forward is not what runs")
    return inner, definition


def rebuild(function: Any, definition: ast.FunctionDef, extra: Mapping[str, object]) -> Any:
    """The function with another body, in which the names of ``extra`` are known too.

    Globals, closure, defaults and decorators stay those of the live function.

    Raises:
        Unreadable: a decorator that does not keep the function where it can be found.
    """
    inner = inspect.unwrap(function)
    code = _compile(inner, definition, extra)
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    cells.update({name: types.CellType(thing) for name, thing in extra.items()})
    made: Any = types.FunctionType(
        code,
        inner.__globals__,
        inner.__name__,
        inner.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    _dress(made, inner)
    layers = []
    while function is not inner:
        layers.append(function)
        function = function.__wrapped__
    for layer in reversed(layers):
        made = _redecorate(layer, made)
    return made


def _redecorate(layer: Any, made: Any) -> Any:
    """The wrapper ``layer`` around ``made`` in the place of what it wraps."""
    held = (layer.__closure__ or ()) if isinstance(layer, types.FunctionType) else ()
    places = [i for i, cell in enumerate(held) if _holds(cell, layer.__wrapped__)]
    if len(places) != 1:
        raise Unreadable("its forward is decorated")
    cells = list(held)
    cells[places[0]] = types.CellType(made)
    new = types.FunctionType(
        layer.__code__, layer.__globals__, layer.__name__, layer.__defaults__, tuple(cells)
    )
    _dress(new, layer)
    new.__wrapped__ = made  # type: ignore[attr-defined]
    return new


def _holds(cell: types.CellType, thing: object) -> bool:
    try:
        return cell.cell_contents is thing
    except ValueError:  # empty
        return False


def _dress(new: Any, old: Any) -> None:
    new.__kwdefaults__ = old.__kwdefaults__
    if hasattr(old, "__annotate__"):  # Python 3.14: reading the annotations would evaluate them.
        new.__annotate__ = old.__annotate__
    else:
        new.__annotations__ = old.__annotations__
    new.__qualname__ = old.__qualname__
    new.__module__ = old.__module__
    new.__doc__ = old.__doc__
    new.__dict__.update(old.__dict__)


def _compile(
    function: types.FunctionType, definition: ast.FunctionDef, extra: Iterable[str]
) -> types.CodeType:
    """The code of a definition, in a class of the same name and with the same outer variables, so
    that private names and super() mean the same."""
    names = [*(n for n in function.__code__.co_freevars if n != "__class__"), *extra]
    path = function.__qualname__.split(".")
    body: list[ast.stmt] = [definition]
    if len(path) > 1 and path[-2] != "<locals>":
        body = [ast.ClassDef(name=path[-2], bases=[], keywords=[], body=body, decorator_list=[])]
    no_arguments = ast.parse("def outer(): pass").body[0]
    assert isinstance(no_arguments, ast.FunctionDef)
    no_arguments.args.args = [ast.arg(arg=name) for name in names]
    no_arguments.body = body
    tree = ast.fix_missing_locations(ast.Module(body=[no_arguments], type_ignores=[]))
    flags = function.__code__.co_flags & _FUTURE
    code: types.CodeType = compile(
        tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True
    )
    inside = {"outer", path[-2] if isinstance(body[0], ast.ClassDef) else "outer", definition.name}
    while code.co_name != definition.name:
        held = [c for c in code.co_consts if isinstance(c, types.CodeType)]
        code = next(c for c in reversed(held) if c.co_name in inside)
    return code


@functools.lru_cache(8)
def _compile_file(text: str, name: str) -> list[types.CodeType]:
    """The codes of all functions in a file. What is imported in it decides on how they are
    compiled, so that one alone would not do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            codes = [compile(text, name, "exec", dont_inherit=True)]
        except (SyntaxError, ValueError):
            return []
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return codes


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two codes do the same: all but the name of the file."""
    for name in (
        "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags",
        "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_name", "co_firstlineno",
    ):  # fmt: skip
        if getattr(a, name) != getattr(b, name):
            return False
    if len(a.co_consts) != len(b.co_consts):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, types.CodeType) and isinstance(y, types.CodeType):
            if not _same(x, y):
                return False
        elif type(x) is not type(y) or repr(x) != repr(y):
            return False
    return True
