"""Which variables of a forward may hold the same memory, and what may write into it."""

from __future__ import annotations

import ast
import types
from collections.abc import Collection
from typing import Any

from torch import nn

from sbm_fast.optimization.joined import FusedNorm, torchs_own
from sbm_fast.optimization.scope import UNKNOWN, Scope, expressions, is_shape
from sbm_fast.optimization.silu import known_silu

_HARMLESS = {
    "chunk", "split", "unbind", "unsqueeze", "squeeze", "view", "reshape", "to", "type", "float",
    "flatten", "permute", "transpose", "expand", "type_as", "dim", "size", "is_grad_enabled",
}  # fmt: skip
"""Methods of tensors, and functions of torch."""
_HARMLESS_BUILTINS = {"len", "hasattr", "isinstance"}
_INNER = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    | ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp
)  # fmt: skip


class Aliases:
    """Groups of variables, over the whole function: two are in one group if one may ever have been
    assigned the other's tensor, or a view of it."""

    def __init__(self, statements: list[ast.stmt], scope: Scope, captured: Collection[str]) -> None:
        self._scope = scope
        self._group: dict[str, set[str]] = {}
        self.captured = frozenset(captured)
        """Variables that inner functions may read or write into, whenever they are called."""
        self._written = set(captured)
        for statement in statements:
            if isinstance(statement, ast.Assign):
                self._join(statement.targets, statement.value)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._join([statement.target], statement.value)
            elif isinstance(statement, ast.For):
                self._join([statement.target], statement.iter)
            elif isinstance(statement, ast.With):
                for item in statement.items:
                    if item.optional_vars is not None:
                        self._join([item.optional_vars], item.context_expr)
            for expression in expressions(statement):
                for node in ast.walk(expression):
                    if isinstance(node, ast.NamedExpr):
                        self._join([node.target], node.value)
            self._written |= self._writes(statement)

    def of(self, names: Collection[str]) -> set[str]:
        """The names and all that may share memory with them."""
        mine = set(names) & self._scope.locals
        return mine.union(*(self._group.get(name, ()) for name in mine))

    def lasting(self, *parts: ast.expr) -> bool:
        """Whether nothing in the function writes into what the expressions read: a backward may
        keep it instead of what torch would have kept."""
        return not any(self.of(names_in(part)) & self._written for part in parts)

    def _writes(self, statement: ast.stmt) -> set[str]:
        """Variables whose tensors a statement may write into."""
        found: set[str] = set()
        if isinstance(statement, ast.AugAssign):
            found |= names_in(statement.target)
        for target in getattr(statement, "targets", []):
            if not isinstance(target, ast.Name | ast.Tuple | ast.List):
                found |= names_in(target)
        for expression in expressions(statement):
            for call in ast.walk(expression):
                if isinstance(call, ast.Call):
                    found |= self._written_by(call)
        return found

    def _written_by(self, call: ast.Call) -> set[str]:
        """x of x.add_(y); what is given to a function or module that writes into it."""
        method = isinstance(call.func, ast.Attribute) and (
            self._scope.resolve(call.func.value) is UNKNOWN
        )
        if method and _ends_in_underscore(call):
            return names_in(call.func)
        given = set().union(*(names_in(argument) for argument in call.args))
        return (
            given.union(*(names_in(k) for k in call.keywords)) if self._writes_into(call) else set()
        )

    def _writes_into(self, call: ast.Call) -> bool:
        """By its name, by the argument ``inplace``, by a module's ``inplace``; or the function is a
        local variable, which may be any module, or somebody's own function or method."""
        if _ends_in_underscore(call) or any(k.arg in ("inplace", "out") for k in call.keywords):
            return True
        function = self._scope.resolve(call.func)
        if isinstance(function, nn.Module):
            return any(getattr(module, "inplace", False) for module in function.modules())
        if isinstance(function, types.FunctionType):
            if known_silu(function):
                return False
            positional = function.__code__.co_varnames[: len(call.args)]
            return "inplace" in positional or not function.__module__.startswith("torch.")
        if function is not UNKNOWN:
            return False
        if isinstance(call.func, ast.Attribute):
            return isinstance(self._scope.resolve(call.func.value), nn.Module)
        return isinstance(call.func, ast.Name | ast.Subscript)

    def _join(self, targets: list[ast.expr], value: ast.expr) -> None:
        if isinstance(value, ast.Tuple) and len(targets) == 1:
            parts = getattr(targets[0], "elts", [])
            if len(parts) == len(value.elts):
                for target, part in zip(parts, value.elts, strict=True):
                    self._join([target], part)
                return
        together = self._kept(value).union(*map(names_in, targets))
        together &= self._scope.locals
        for name in tuple(together):
            together |= self._group.get(name, set())
        for name in together:
            self._group[name] = together

    def _kept(self, value: ast.expr) -> set[str]:
        """Variables whose memory the expression's value may be."""
        if isinstance(value, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Constant | ast.JoinedStr):
            return set()  # Arithmetic makes new tensors.
        if isinstance(value, ast.Tuple | ast.List):
            return set().union(*(self._kept(part) for part in value.elts))
        if isinstance(value, ast.Call):
            function = self._scope.resolve(value.func)
            if makes_new(function):
                return set()
        return names_in(value)


def makes_new(function: Any) -> bool:
    """Whether a call's result is never its argument: torch's convolutions and linear layers,
    fused norms, SiLU."""
    if isinstance(function, FusedNorm):
        return True
    if isinstance(function, nn.Module) and torchs_own(function):
        weight = getattr(function, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1:
            return True
    return known_silu(function) and not getattr(function, "inplace", False)


def captured(definition: ast.FunctionDef) -> set[str]:
    """Names that inner functions and comprehensions use, which may run at any time and more than
    once, or that are deleted or not local: they never hold anything that waits."""
    names: set[str] = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Global | ast.Nonlocal):
            names.update(node.names)
        if node is not definition and isinstance(node, _INNER | ast.Delete):
            names.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
    return names


def names_in(node: ast.AST) -> set[str]:
    """The variables whose values an expression has or sets, but for the module itself."""
    if is_shape(node):
        return set()
    if isinstance(node, ast.Name):
        return {node.id} - {"self"}
    return set().union(*(names_in(child) for child in ast.iter_child_nodes(node)))


def _ends_in_underscore(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name.endswith("_") and not name.endswith("__")


def _harmless(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _HARMLESS_BUILTINS
    own = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "self"
    return not own and getattr(function, "attr", "") in _HARMLESS


def quiet(
    node: ast.expr, behind: Collection[str] | None = None, aliases: Aliases | None = None
) -> bool:
    """Whether an expression writes into no tensor that waits: it calls only what is known to write
    nowhere, or, if it is known which variables are ``behind``, nothing that could reach them."""
    for call in ast.walk(node):
        if isinstance(call, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
        if not isinstance(call, ast.Call):
            continue
        if _harmless(call.func):
            continue
        if (
            _ends_in_underscore(call)
            or behind is None
            or aliases is None
            or (names_in(call) | aliases.captured) & set(behind)
        ):
            return False
    return True
