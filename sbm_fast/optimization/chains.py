"""Chains in a forward's source: sum -> norm -> (1 + scale), shift -> SiLU, over several statements.

    h = h + emb                      # a sum: waits when a norm is next
    h = self.norm2(h)                # a norm: waits when its factor or its activation is next
    h = h * (1 + scale) + shift
    h = self.act(h)                  # the end: one call of the op

A variable may hold a waiting sum or norm only if every way on from its assignment leads to the next
link of the chain, over conditions and assignments that change no tensor, and nothing reads it then.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sbm_fast.optimization.aliases import Aliases, captured, makes_new, names_in, quiet
from sbm_fast.optimization.joined import FusedNorm, torchs_own
from sbm_fast.optimization.scope import END, UNKNOWN, Flow, Scope, expressions, loads
from sbm_fast.optimization.silu import known_silu


@dataclass(eq=False)
class Link:
    """An expression that is a link of a chain."""

    op: str
    """variable, sum, add_, norm, times, plus, addcmul, swish or act."""
    node: Any
    inner: Link | None = None
    others: tuple[ast.expr, ...] = ()
    kinds: frozenset[str] = frozenset()
    """What the value may be: a waiting "sum", a waiting "norm"; a tensor, if none of these."""
    sure: bool = True
    """Whether the norm (or the activation) is known to be one before the run."""
    module: nn.Module | None = None

    def chain(self) -> Iterator[Link]:
        """This link, the one in it, and so on."""
        link: Link | None = self
        while link is not None:
            yield link
            link = link.inner

    def has(self, *ops: str) -> bool:
        return any(link.op in ops for link in self.chain())

    def known(self) -> bool:
        """Whether it is surely about a norm: one that is known, or one that gets 1 + scale."""
        return self.has("times", "addcmul") or any(
            link.sure for link in self.chain() if link.op in ("norm", "variable")
        )


@dataclass(eq=False)
class Definition:
    """An assignment after which the variable holds a waiting sum or norm."""

    statement: ast.stmt
    name: str
    link: Link
    ends: list[ast.stmt] = field(default_factory=list)
    """The statements with the next link."""


class Chains:
    """All chains in one forward."""

    def __init__(self, definition: ast.FunctionDef, scope: Scope) -> None:
        self.scope = scope
        self.flow = Flow(definition, scope)
        self._never = captured(definition)
        self.aliases = Aliases(self.flow.statements, scope, self._never)
        self.definitions: dict[ast.stmt, Definition] = {}
        self._held: dict[str, frozenset[str]] = {}
        while self._grow():
            pass
        while self._prune():
            pass

    @property
    def held(self) -> frozenset[str]:
        """The variables that may hold something that waits."""
        return frozenset(self._held)

    def match(self, node: ast.AST, statement: ast.stmt) -> Link | None:
        """The expression as the last link of a chain; None if it is none."""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            kinds = self._held.get(node.id)
            known = any(d.name == node.id and d.link.known() for d in self.definitions.values())
            return Link("variable", node, kinds=kinds, sure=known) if kinds else None
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node, statement)
        if isinstance(node, ast.Call) and not any(isinstance(a, ast.Starred) for a in node.args):
            return self._call(node, statement)
        return None

    def ends(self, link: Link) -> bool:
        """Whether a chain is worth another call: it joins something to a norm."""
        if link.op == "variable":
            return False
        norms = [x for x in link.chain() if x.op == "norm"]
        joined = link.has("times", "addcmul", "act", "swish")
        if norms and not norms[0].sure:
            return joined
        return joined or link.has("plus") or (bool(norms) and norms[0].inner is not None)

    def _call(self, node: ast.Call, statement: ast.stmt) -> Link | None:
        function = self.scope.resolve(node.func)
        if len(node.args) == 3 and not node.keywords and function is torch.addcmul:
            for place in (1, 2):
                inner = self.match(node.args[place], statement)
                shift, scale = node.args[0], _plus_one(node.args[3 - place])
                if not inner or "norm" not in inner.kinds or scale is None:
                    continue
                if self._calm(inner, scale, place == 2) and self.aliases.lasting(shift):
                    others = node.func, shift, scale
                    return Link("addcmul", node, inner, others, frozenset({"norm"}))
        if len(node.args) != 1 or any(k.arg != "inplace" for k in node.keywords):
            return None
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_":
            return self._in_place(node, node.func.value, node.args[0], statement)
        inner = self.match(node.args[0], statement)
        unknown = function is UNKNOWN and isinstance(node.func, ast.Name | ast.Subscript)
        normed = inner is not None and "norm" in inner.kinds
        if normed and inner and (known_silu(function) or (unknown and inner.known())):
            return Link("act", node, inner, sure=not unknown)
        if node.keywords or not (unknown or isinstance(function, FusedNorm)):
            return None
        summed = inner if inner and "sum" in inner.kinds else None
        module = function if isinstance(function, nn.Module) else None
        return Link("norm", node, summed, (), frozenset({"norm"}), not unknown, module)

    def _arithmetic(self, node: ast.BinOp, statement: ast.stmt) -> Link | None:
        pairs = (node.left, node.right), (node.right, node.left)
        if isinstance(node.op, ast.Mult):
            for one, other in pairs:
                first = other is node.left
                inner, scale = self.match(one, statement), _plus_one(other)
                if inner and "norm" in inner.kinds:
                    if scale is not None and self._calm(inner, scale, first):
                        return Link("times", node, inner, (scale,), frozenset({"norm"}))
                    if self._is_sigmoid(other, one):
                        assert isinstance(other, ast.Call)
                        return Link("swish", node, inner, (other.func,))
        if isinstance(node.op, ast.Add):
            for one, other in pairs:
                inner = self.match(one, statement)
                scaled = inner and "norm" in inner.kinds and self._scaled(inner, statement)
                if inner and scaled and self._calm(inner, other, other is node.left):
                    return Link("plus", node, inner, (other,), frozenset({"norm"}))
            if all(self._kept(part, statement) for part in (node.left, node.right)):
                return Link("sum", node, None, (node.left, node.right), frozenset({"sum"}))
        return None

    def _calm(self, link: Link, between: ast.expr, first: bool) -> bool:
        """Whether what runs before a waiting norm is made leaves the norm's tensors alone, and
        whether what runs ``first`` may run behind the link (calls may draw random numbers)."""
        if first and link.op != "variable" and not quiet(between):
            return False
        behind = self.aliases.of(names_in(link.node))
        return quiet(between, behind, self.aliases) and self.aliases.lasting(between)

    def _kept(self, part: ast.expr, statement: ast.stmt) -> bool:
        """Whether a part of a sum stays as it is until a backward: nothing writes into it, or it
        has just been made and the statement forgets it."""
        if isinstance(part, ast.Name) and part.id == _target(statement):
            maker = self._maker(part.id, statement)
            if maker is not None and makes_new(self.scope.resolve(maker)):
                return True
        return self.aliases.lasting(part)

    def _scaled(self, link: Link, statement: ast.stmt) -> bool:
        """Whether a chain already has its factor, here or in the statement before."""
        if link.op != "variable":
            return link.has("times")
        before = self.flow.before(statement)
        found = None if before is None else self.definitions.get(before)
        return found is not None and found.name == link.node.id and found.link.has("times")

    def _is_sigmoid(self, node: ast.expr, of: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call)
            and isinstance(of, ast.Name)
            and len(node.args) == 1
            and ast.dump(node.args[0]) == ast.dump(of)
            and self.scope.resolve(node.func) in (torch.sigmoid, nn.functional.sigmoid)
        )

    def _in_place(
        self, node: ast.AST, x: ast.expr, add: ast.expr, statement: ast.stmt
    ) -> Link | None:
        """x.add_(add), if x has just been made and is not read again."""
        if not isinstance(x, ast.Name) or loads(add, x.id) or not self.aliases.lasting(add):
            return None
        maker = self._maker(x.id, statement)
        forgets = isinstance(statement, ast.AugAssign) or x.id == _target(statement)
        if maker is None or not forgets or not torchs_own(self.scope.resolve(maker)):
            return None
        return Link("add_", node, None, (x, add, maker), frozenset({"sum"}))

    def _maker(self, name: str, statement: ast.stmt) -> ast.expr | None:
        """self.conv of ``name = self.conv(…)``, if nothing has read the variable since."""
        before = self.flow.before(statement, name)
        while before is not None:
            if _target(before) == name:
                assert isinstance(before, ast.Assign)
                made = before.value
                if not isinstance(made, ast.Call):
                    return None
                return made.func if isinstance(self.scope.resolve(made.func), nn.Module) else None
            if not isinstance(before, ast.Assign) or loads(before, name) or _stores(before, name):
                return None
            before = self.flow.before(before, name)
        return None

    def waiting(self, statement: ast.stmt) -> Definition | None:
        """The statement as one that leaves something waiting in a variable."""
        if statement in self.flow.guarded:
            return None
        name = _target(statement)
        link = None
        if name is not None:
            assert isinstance(statement, ast.Assign)
            link = self.match(statement.value, statement)
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            target = statement.target
            if isinstance(target, ast.Name):
                name = target.id
                read = ast.copy_location(ast.Name(id=name, ctx=ast.Load()), target)
                link = self._in_place(statement, read, statement.value, statement)
        if name is None or name in self._never or link is None or link.op == "variable":
            return None
        return Definition(statement, name, link) if link.kinds else None

    def _grow(self) -> bool:
        """One round of looking for assignments that might wait, whatever follows them."""
        before = dict(self._held)
        for statement in self.flow.statements:
            found = self.waiting(statement)
            if found is not None:
                self.definitions[statement] = found
                held = self._held.get(found.name, frozenset())
                self._held[found.name] = held | found.link.kinds
        return before != self._held

    def _prune(self) -> bool:
        """One round of dropping those after which not every way leads to a next link."""
        kept = {}
        for statement in self.definitions:
            found = self.waiting(statement)
            if found is not None and self._leads(found, self.flow.after(statement)):
                kept[statement] = found
        done = kept.keys() == self.definitions.keys()
        self.definitions = kept
        self._held = {}
        for found in kept.values():
            held = self._held.get(found.name, frozenset())
            self._held[found.name] = held | found.link.kinds
        return not done

    def _behind(self, found: Definition) -> set[str]:
        """The variables whose tensors are read only when what waits is made."""
        names = names_in(found.link.node) | {found.name}
        before = 0
        while len(names) > before:
            before = len(names)
            for other in self.definitions.values():
                if other.name in names:
                    names |= names_in(other.link.node)
        return names

    def _leads(self, found: Definition, statement: ast.stmt | None) -> bool:
        if isinstance(statement, ast.Raise):
            return True
        if isinstance(statement, ast.If):
            if loads(statement.test, found.name) or not quiet(statement.test):
                return False
            other = statement.orelse[0] if statement.orelse else self.flow.after(statement)
            return self._leads(found, statement.body[0]) and self._leads(found, other)
        if not isinstance(statement, ast.Assign | ast.Return | ast.Expr):
            return False
        if loads(statement, found.name):
            return self._continues(found, statement)
        plain = not isinstance(statement, ast.Return) and not _stores(statement, found.name)
        plain = plain and all(map(_only_names, getattr(statement, "targets", [])))
        if plain and all(quiet(e) for e in expressions(statement)):
            return self._leads(found, self.flow.after(statement))
        return False

    def _continues(self, found: Definition, statement: ast.stmt) -> bool:
        """Whether the statement's only use of the variable is as the chain's next link."""
        if found.link.op == "add_" and _target(statement) != found.name:
            return False
        read = loads(statement, found.name)
        for node in ast.walk(statement):
            link = self.match(node, statement) if isinstance(node, ast.expr) else None
            if link is None or link.op == "variable":
                continue
            *rest, next_one, leaf = link.chain() if link.inner else (link, link)
            if leaf.op != "variable" or leaf.node.id != found.name:
                continue
            fits = next_one.op == "norm" if "sum" in found.link.kinds else next_one.op != "norm"
            unsure = any(not x.sure for x in (*rest, next_one) if x.op == "norm")
            if len(read) != (2 if next_one.op == "swish" else 1) or not fits:
                continue
            if unsure and not link.has("act", "times", "addcmul"):
                continue
            if not self._forgotten(statement, found.name):
                return False
            behind = self.aliases.of(self._behind(found))
            if all(quiet(other, behind, self.aliases) for other in _beside(statement, link)):
                found.ends.append(statement)
                return True
        return False

    def _forgotten(self, statement: ast.stmt, name: str) -> bool:
        """Whether nothing reads the variable behind a statement before it is assigned again."""
        if isinstance(statement, ast.Return) or _target(statement) == name:
            return True
        return self._unread(self.flow.after(statement), name)

    def _unread(self, statement: ast.stmt | None, name: str) -> bool:
        if statement is None or statement is END:
            return statement is END
        if isinstance(statement, ast.If):
            if loads(statement.test, name):
                return False
            other = statement.orelse[0] if statement.orelse else self.flow.after(statement)
            return self._unread(statement.body[0], name) and self._unread(other, name)
        changed = isinstance(statement, ast.AugAssign) and _stores(statement, name)
        if changed or loads(statement, name):
            return False
        if isinstance(statement, ast.Return | ast.Raise) or _target(statement) == name:
            return True
        return self._unread(self.flow.after(statement), name)


def _beside(statement: ast.stmt, link: Link) -> Iterator[ast.expr]:
    """The statement's expressions that are not around the link: some may run before it does."""
    stack: list[ast.AST] = list(expressions(statement))
    while stack:
        node = stack.pop()
        if node is link.node:
            for one in link.chain():
                yield from one.others
        elif any(inside is link.node for inside in ast.walk(node)):
            stack.extend(ast.iter_child_nodes(node))
        elif isinstance(node, ast.expr):
            yield node


def _plus_one(node: ast.expr) -> ast.expr | None:
    """s of 1 + s or s + 1."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for one, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(one, ast.Constant) and type(one.value) in (int, float) and one.value == 1:
                return other
    return None


def _target(statement: ast.stmt) -> str | None:
    """The one variable that a plain assignment sets."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _only_names(target: ast.expr) -> bool:
    """Whether an assignment to it changes variables only: no object's attribute or element."""
    return not any(isinstance(n, ast.Attribute | ast.Subscript) for n in ast.walk(target))


def _stores(statement: ast.AST, name: str) -> bool:
    return any(
        isinstance(n, ast.Name) and n.id == name and not isinstance(n.ctx, ast.Load)
        for n in ast.walk(statement)
    )
