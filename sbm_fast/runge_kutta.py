"""Explicit Runge–Kutta methods as tables (Hairer, Nørsett & Wanner, Solving ODEs I, ch. II).

k_j = f(t + c_j h, u_j),   u_j = u_0 + h Σ_{i<j} a_ji k_i,   u' = u_0 + h Σ_i b_i k_i
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """A method of s stages.

    Attributes:
        name: as users ask for it.
        order: of u'.
        a: rows 2 … s, c: [s], b: [s].
        error: [s] weights of the embedded error estimate u' − û = h Σ e_i k_i; None without one.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]
    b: tuple[float, ...]
    error: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        """s."""
        return len(self.c)

    @property
    def first_same_as_last(self) -> bool:
        """Whether u_s is u', so that k_s is the next step's k_1."""
        return self.stages > 1 and self.c[-1] == 1 and (*self.a[-1], 0.0) == self.b

    @property
    def combinations(self) -> tuple[tuple[float, ...], ...]:
        """The weights of k_1 … k_s in u_2, u_3, …, u'."""
        rows = self.a if self.first_same_as_last else (*self.a, self.b)
        return tuple((*row, *[0.0] * (self.stages - len(row))) for row in rows)

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where in the step the states of `combinations` lie."""
        return self.c[1:] if self.first_same_as_last else (*self.c[1:], 1.0)


EULER = Tableau("euler", 1, (), (0.0,), (1.0,))
HEUN = Tableau("heun", 2, ((1.0,),), (0.0, 1.0), (0.5, 0.5))
RK4 = Tableau(
    "rk4",
    4,
    ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    (0.0, 0.5, 0.5, 1.0),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
DOPRI5 = Tableau(
    "dopri5",  # Dormand & Prince 1980, table 2: RK5(4)7M
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (
        71 / 57600,
        0.0,
        -71 / 16695,
        71 / 1920,
        -17253 / 339200,
        22 / 525,
        -1 / 40,
    ),
)

TABLEAUS = {tableau.name: tableau for tableau in (EULER, HEUN, RK4, DOPRI5)}
FIXED = tuple(name for name, tableau in TABLEAUS.items() if tableau.error is None)
"""Methods without an error estimate: they need a grid."""
ADAPTIVE = tuple(name for name in TABLEAUS if name not in FIXED)
"""Methods that make their own steps."""
PEER = "torchdiffeq:"
"""What the name of a method of torchdiffeq begins with."""


def is_adaptive(name: object) -> bool:
    """Whether a solver of that name makes its own steps."""
    if not isinstance(name, str):
        return False
    return name.startswith(PEER) or name in ADAPTIVE
