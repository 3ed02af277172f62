"""Which functions and modules are SiLU, x · sigmoid(x), under whatever name."""

from __future__ import annotations

import ast
import functools
import types
from typing import Any

import torch
from torch import nn

from sbm_fast.optimization.joined import SILU, bare
from sbm_fast.optimization.scope import Scope
from sbm_fast.optimization.source import Unreadable, read

_SIGMOIDS = (torch.sigmoid, nn.functional.sigmoid)


def known_silu(function: Any) -> bool:
    """Whether a callable is SiLU: torch's own, or one whose source says x · sigmoid(x)."""
    if isinstance(function, nn.Module):
        if not bare(function):
            return False
        function = getattr(type(function), "forward", None)
    return isinstance(function, types.FunctionType) and _is_silu(function)


@functools.cache
def _is_silu(function: Any) -> bool:
    if function not in SILU and _reads_as_silu(function):
        SILU.add(function)
    return function in SILU


def _reads_as_silu(function: Any) -> bool:
    try:
        inner, definition = read(function)
    except Unreadable:
        return False
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [a.arg for a in definition.args.args]
    if inner is not function or len(body) != 1 or not isinstance(body[0], ast.Return) or not names:
        return False
    scope = Scope(nn.Identity(), inner, frozenset(names), "")
    result, x = body[0].value, names[-1]
    if isinstance(result, ast.BinOp) and isinstance(result.op, ast.Mult):
        pairs = (result.left, result.right), (result.right, result.left)
        return any(_is_name(one, x) and _is_sigmoid(other, x, scope) for one, other in pairs)
    return _is_call_of_x(result, x) and scope.resolve(result.func) is nn.functional.silu  # type: ignore[union-attr]


def _is_sigmoid(node: ast.expr, x: str, scope: Scope) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if _is_call_of_x(node, x):
        return scope.resolve(node.func) in _SIGMOIDS
    method = isinstance(node.func, ast.Attribute) and node.func.attr == "sigmoid"
    return method and not node.args and _is_name(node.func.value, x)  # type: ignore[attr-defined]


def _is_call_of_x(node: ast.expr | None, x: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and _is_name(node.args[0], x)
    )


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
