"""A forward with its chains handed to `sbm_fast.optimization.joined`."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from sbm_fast.optimization import joined
from sbm_fast.optimization.chains import Chains, Definition, Link
from sbm_fast.optimization.scope import Scope, is_shape
from sbm_fast.optimization.source import Unreadable, read, rebuild

_RUNTIME = "_sbm_fast_joined"
_made: dict[tuple[Any, str], Any] = {}
"""Blocks of one class with the same chains share one forward, and so one class."""
_FRAMES = {"locals", "eval", "exec", "vars", "globals"}


@dataclass
class Site:
    """One call of a norm, and what may be joined to it."""

    text: str
    """The call as it is written."""
    module: nn.Module | None
    """None where only the run tells which module it is."""
    add: bool = False
    film: bool = False
    silu: bool = False


def rewrite(module: nn.Module, live: Any) -> tuple[Any, list[Site]]:
    """The forward ``live`` of the module's class with chains joined, and the calls of norms in
    them; without any, the forward as it is.

    Raises:
        Unreadable: the source is not to be had, or is not what runs.
    """
    # EDM's pickled classes carry their module's source, and have no file.
    text = getattr(type(module), "_orig_module_src", None)
    function, definition = read(live, text if isinstance(text, str) else None)
    if _FRAMES & set(function.__code__.co_names):
        raise Unreadable("its forward looks at its own frame")
    definition = copy.deepcopy(definition)
    chains = Chains(definition, Scope.of(module, function, definition))
    rewriter = _Rewriter(chains)
    definition.body = rewriter.block(definition.body)
    if not rewriter.sites:
        return live, []
    key = live, ast.dump(definition)
    if key not in _made:
        _made[key] = rebuild(live, ast.fix_missing_locations(definition), {_RUNTIME: joined})
    return _made[key], rewriter.sites


class _Rewriter(ast.NodeTransformer):
    def __init__(self, chains: Chains) -> None:
        self.chains = chains
        self.sites: list[Site] = []
        self._of: dict[ast.stmt, list[Site]] = {}
        self._statement: Any = None

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for statement in body:
            new = self.visit(statement)
            made.extend(new if isinstance(new, list) else [new])
        return made

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            return node
        if isinstance(node, ast.stmt):
            outer, self._statement = self._statement, node
            try:
                return self._visit_statement(node)
            finally:
                self._statement = outer
        if isinstance(node, ast.expr):
            return self._visit_expression(node)
        return super().visit(node)

    def _visit_statement(self, node: ast.stmt) -> Any:
        waiting = self.chains.definitions.get(node)
        if waiting is not None:
            link = waiting.link
            made = self._build(link)
            target = ast.Name(id=waiting.name, ctx=ast.Store())
            return ast.copy_location(ast.Assign(targets=[target], value=made), node)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            new = self.generic_visit(node)
            if name not in self.chains.held:
                return new
            value = self._call("value", ast.Name(id=name, ctx=ast.Load()))
            first = ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=value)
            return [ast.copy_location(first, node), new]
        return self.generic_visit(node)

    def _visit_expression(self, node: ast.expr) -> ast.expr:
        if is_shape(node):
            return node
        link = self.chains.match(node, self._statement)
        if link is not None and link.op == "variable":
            return self._call("value", node)
        if link is not None and self.chains.ends(link):
            call = self._build(link)
            return self._call("value", call) if link.kinds else call
        self.generic_visit(node)
        return node

    def _build(self, link: Link) -> ast.expr:
        sites: list[Site] = []
        made = self._link(link, sites)
        live = self._statement not in self.chains.flow.dead
        for site in sites if live else ():
            site.film |= link.has("times", "addcmul")
            site.silu |= link.has("act", "swish")
        self._of[self._statement] = sites
        return made

    def _link(self, link: Link, sites: list[Site]) -> ast.expr:
        node = link.node
        if link.op == "variable":
            for found in self._reaching(node.id):
                sites.extend(self._of.get(found.statement, ()))
            return ast.copy_location(ast.Name(id=node.id, ctx=ast.Load()), node)
        inner = None if link.inner is None else self._link(link.inner, sites)
        others = [self.visit(other) for other in link.others]
        if link.op in ("sum", "add_"):
            return self._call(link.op, *others)
        if link.op == "norm":
            site = Site(ast.unparse(node.func), link.module, add=self._adds(link.inner))
            if self._statement not in self.chains.flow.dead:
                self.sites.append(site)
                sites.append(site)
            return self._call("norm", self.visit(node.func), inner or self.visit(node.args[0]))
        assert inner is not None and link.inner is not None
        if link.op == "addcmul":
            return self._call("addcmul", others[0], others[1], inner, others[2])
        if link.op == "act":
            call = self._call("act", self.visit(node.func), inner)
            call.keywords = node.keywords
            return call
        return self._call(link.op, inner, *others)

    def _adds(self, link: Link | None) -> bool:
        """Whether a norm's argument is a sum that waits, in some of the ways that lead to it."""
        if link is None or link.op != "variable":
            return link is not None
        return any("sum" in found.link.kinds for found in self._reaching(link.node.id))

    def _reaching(self, name: str) -> list[Definition]:
        """What may wait in a variable when the present statement reads it."""
        return [
            found
            for found in self.chains.definitions.values()
            if found.name == name
            and self._statement in found.ends
            and found.statement not in self.chains.flow.dead
        ]

    def _call(self, name: str, *args: ast.expr) -> ast.Call:
        runtime = ast.Name(id=_RUNTIME, ctx=ast.Load())
        function = ast.Attribute(value=runtime, attr=name, ctx=ast.Load())
        return ast.copy_location(ast.Call(func=function, args=list(args), keywords=[]), args[0])
