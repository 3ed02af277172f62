"""What the names and attributes in a module's forward stand for, without running any of it."""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

UNKNOWN = object()
END = ast.Pass()
_BLOCKS = ("body", "orelse", "finalbody")
_SHAPE = ("shape", "ndim", "dtype", "device")


@dataclass(frozen=True)
class Scope:
    """The forward of one module: its definition, the function and the names it assigns."""

    module: nn.Module
    function: types.FunctionType
    locals: frozenset[str]
    self: str

    @classmethod
    def of(
        cls, module: nn.Module, function: types.FunctionType, definition: ast.FunctionDef
    ) -> Scope:
        code = function.__code__
        return cls(module, function, frozenset(code.co_varnames + code.co_cellvars),
                   definition.args.args[0].arg if definition.args.args else "")  # fmt: skip

    def resolve(self, node: ast.expr) -> Any:
        """The object that the expression is, or UNKNOWN. Only plain look-ups: no property of the
        module, no call."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            held = self.resolve(node.value)
            if isinstance(held, nn.Module):
                return held._modules.get(node.attr, held.__dict__.get(node.attr, UNKNOWN))
            if isinstance(held, types.ModuleType):
                return getattr(held, node.attr, UNKNOWN)
        if isinstance(node, ast.Subscript):
            held, place = self.resolve(node.value), self.resolve(node.slice)
            if isinstance(
                held, nn.Sequential | nn.ModuleList | nn.ModuleDict | list | tuple | dict
            ):
                try:
                    return held[place]
                except (LookupError, TypeError, ValueError):
                    return UNKNOWN
        return UNKNOWN

    def _name(self, name: str) -> Any:
        if name == self.self:
            return self.module
        if name in self.locals:
            return UNKNOWN
        free = self.function.__code__.co_freevars
        if name in free:
            try:
                return (self.function.__closure__ or ())[free.index(name)].cell_contents
            except ValueError:
                return UNKNOWN
        known = self.function.__globals__
        return known.get(name, getattr(builtins, name, UNKNOWN))

    def holds(self, test: ast.expr) -> Any:
        """The value of a condition on the module's own settings, or UNKNOWN."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self.holds(test.operand)
            return value if value is UNKNOWN else not value
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            a, b = self.resolve(test.left), self.resolve(test.comparators[0])
            if a is UNKNOWN or b is UNKNOWN:
                return UNKNOWN
            if isinstance(test.ops[0], ast.Is | ast.IsNot):
                return (a is b) == isinstance(test.ops[0], ast.Is)
            if isinstance(a, int | float | str) and isinstance(test.ops[0], ast.Eq | ast.NotEq):
                return (a == b) == isinstance(test.ops[0], ast.Eq)
            return UNKNOWN
        value = self.resolve(test)
        return value if value is None or isinstance(value, int | float | str) else UNKNOWN


class Flow:
    """The statements of a function and which of them can come next after which."""

    def __init__(self, definition: ast.FunctionDef, scope: Scope) -> None:
        self.statements: list[ast.stmt] = []
        self._place: dict[ast.stmt, tuple[list[ast.stmt], int, ast.stmt | None]] = {}
        self.dead: set[ast.stmt] = set()
        """Statements that the module's settings keep from running."""
        self.guarded: set[ast.stmt] = set()
        """Statements in a "try": an exception must come from the statement that it came from."""
        self._enter(definition.body, None, False, scope)

    def _enter(
        self, block: list[ast.stmt], parent: ast.stmt | None, dead: bool, scope: Scope
    ) -> None:
        for i, statement in enumerate(block):
            self.statements.append(statement)
            self._place[statement] = block, i, parent
            if dead:
                self.dead.add(statement)
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            holds = scope.holds(statement.test) if isinstance(statement, ast.If) else UNKNOWN
            if isinstance(statement, ast.Try):
                self.guarded.update(n for n in ast.walk(statement) if isinstance(n, ast.stmt))
            for name in _BLOCKS:
                inner = getattr(statement, name, [])
                never = holds is not UNKNOWN and bool(holds) == (name == "orelse")
                self._enter(inner, statement, dead or never, scope)
            for part in (*getattr(statement, "handlers", []), *getattr(statement, "cases", [])):
                self._enter(part.body, statement, dead, scope)

    def after(self, statement: ast.stmt) -> ast.stmt | None:
        """What runs next: END behind the function's last; None at the end of a loop, "with", "try"
        or "match", where it is not looked for."""
        block, i, parent = self._place[statement]
        if i + 1 < len(block):
            return block[i + 1]
        if parent is None:
            return END
        return self.after(parent) if isinstance(parent, ast.If) else None

    def before(self, statement: ast.stmt, name: str = "") -> ast.stmt | None:
        """What ran before, stepping out of an "if"; None where that is not clear, or where the
        condition of the "if" reads the variable ``name``."""
        block, i, parent = self._place[statement]
        if i:
            return block[i - 1]
        if not isinstance(parent, ast.If) or loads(parent.test, name):
            return None
        return self.before(parent, name)


def loads(node: ast.AST | None, name: str) -> list[ast.Name]:
    """Where a variable's value is read; its shape, dtype and device do not count."""
    found: list[ast.Name] = []
    if node is None:
        return found
    stack: list[ast.AST] = [node]
    while stack:
        here = stack.pop()
        if isinstance(here, ast.Name) and here.id == name and isinstance(here.ctx, ast.Load):
            found.append(here)
        if not is_shape(here):
            stack.extend(ast.iter_child_nodes(here))
    return found


def is_shape(node: ast.AST) -> bool:
    """Whether the node is name.shape, name.dtype, …"""
    return (
        isinstance(node, ast.Attribute) and node.attr in _SHAPE and isinstance(node.value, ast.Name)
    )


def expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """A statement's own expressions, without those of the statements in it."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.expr):
            yield child
