"""Tableaus: the order conditions, tree by tree (Hairer, Nørsett & Wanner, II.2, theorem 2.13)."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import pytest

from sbm_fast.runge_kutta import (
    DOPRI5,
    EULER,
    FIXED,
    HEUN,
    RK4,
    TABLEAUS,
    Tableau,
    is_adaptive,
)

Tree = tuple["Tree", ...]  # the trees that hang on its root
COUNTS = (1, 1, 2, 4, 9, 20)
every = pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=lambda tableau: tableau.name)


def trees(order: int) -> list[Tree]:
    """All rooted trees of that many nodes."""
    smaller = [(n, tree) for n in range(1, order) for tree in trees(n)]
    found: list[Tree] = []
    for children in range(order):
        for chosen in combinations_with_replacement(smaller, children):
            if sum(n for n, _ in chosen) == order - 1:
                found.append(tuple(tree for _, tree in chosen))
    return found


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


def density(tree: Tree) -> int:
    """γ(t), the product of the sizes of all subtrees."""
    return size(tree) * math.prod(map(density, tree))


def inner(tableau: Tableau, tree: Tree) -> list[float]:
    """Φ_j(t) of every stage j: the product over its branches of Σ_k a_jk Φ_k(branch)."""
    branches = [inner(tableau, branch) for branch in tree]
    rows = ((), *tableau.a)
    return [
        math.prod(sum(a * phi[k] for k, a in enumerate(row)) for phi in branches) for row in rows
    ]


def defect(tableau: Tableau, weights: tuple[float, ...], order: int) -> float:
    """The largest error of Σ_j w_j Φ_j(t) = 1/γ(t) over the trees of that order."""
    return max(
        abs(
            sum(w * phi for w, phi in zip(weights, inner(tableau, tree), strict=True))
            - 1 / density(tree)
        )
        for tree in trees(order)
    )


def test_the_trees() -> None:
    assert [len(trees(order)) for order in range(1, 7)] == list(COUNTS)
    assert sorted(map(density, trees(4))) == [4, 8, 12, 24]


@every
def test_the_order_is_what_it_says_and_no_more(tableau: Tableau) -> None:
    assert all(defect(tableau, tableau.b, p) < 1e-14 for p in range(1, tableau.order + 1))
    assert defect(tableau, tableau.b, tableau.order + 1) > 1e-4


@every
def test_shapes_and_row_sums(tableau: Tableau) -> None:
    assert [len(row) for row in tableau.a] == list(range(1, tableau.stages))
    assert len(tableau.b) == len(tableau.c) == tableau.stages and tableau.c[0] == 0
    for row, c in zip(tableau.a, tableau.c[1:], strict=True):
        assert sum(row) == pytest.approx(c, rel=1e-14, abs=0)
    assert sum(tableau.b) == pytest.approx(1, rel=1e-14, abs=0)


def test_the_embedded_method_is_of_one_order_less() -> None:
    assert DOPRI5.error is not None
    assert abs(sum(DOPRI5.error)) < 1e-16
    embedded = tuple(b - e for b, e in zip(DOPRI5.b, DOPRI5.error, strict=True))
    assert all(defect(DOPRI5, embedded, p) < 1e-14 for p in range(1, 5))
    assert defect(DOPRI5, embedded, 5) > 1e-4
    # table 2 of the paper, the other line of weights
    theirs = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
    assert embedded == pytest.approx(theirs, rel=1e-14, abs=1e-16)


def test_which_methods_hand_their_last_slope_on() -> None:
    assert DOPRI5.first_same_as_last
    assert not any(tableau.first_same_as_last for tableau in (EULER, HEUN, RK4))


@every
def test_combinations_are_the_stages_after_the_first_and_the_end(tableau: Tableau) -> None:
    rows, nodes = tableau.combinations, tableau.nodes
    assert len(rows) == len(nodes) and all(len(row) == tableau.stages for row in rows)
    assert rows[-1] == tableau.b and nodes[-1] == 1
    assert len(rows) == tableau.stages - int(tableau.first_same_as_last)
    for row, node, a in zip(rows, nodes, tableau.a, strict=False):
        assert row[: len(a)] == a and not any(row[len(a) :])
        assert sum(row) == pytest.approx(node, rel=1e-14, abs=0)


def test_names() -> None:
    assert FIXED == ("euler", "heun", "rk4") and list(TABLEAUS) == [*FIXED, "dopri5"]
    assert is_adaptive("dopri5") and is_adaptive("torchdiffeq:dopri8")
    for other in (*FIXED, "dopri6", "", "torchdiffeq", None, 5, ["dopri5"]):
        assert not is_adaptive(other)
