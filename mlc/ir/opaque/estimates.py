"""Primitives of responses: linear systems, random directions, particles that live on, numbers for the report."""

from __future__ import annotations

from dataclasses import dataclass

from mlc.ir.core import Loop, Primitive

__all__ = ["Keep", "Noise", "Recall", "Solve", "Tell"]


@dataclass(frozen=True)
class Solve(Loop):
    """``solve(b..., consts...)``: the x with (A + damping) x = b, where the body is the product p -> A p.

    It is a loop for whatever looks at equations and counts them (``trips`` products at most); the runtime runs it as
    a solver of linear systems does (:mod:`mlc.linear.solvers`), which stops at the relative residual ``tol``.

    Attributes:
        solver: Name of the solver.
        level: Name of the level that it is solved for.
        told: How many of the consts, the last ones, the body does not read: norms of the level's first and last
            gradient, for the report.
    """

    solver: str = "cg"
    tol: float = 0.0
    damping: float = 0.0
    level: str = ""
    told: int = 0

    @property
    def vectors(self) -> int:
        """How many vectors like b the solver holds beside those of a product."""
        return {"gmres": 2 * self.count + 6, "nystrom": 3 * self.count + 4}.get(self.solver, 7)


@dataclass(frozen=True)
class Noise(Primitive):
    """``noise(like)``: standard normal numbers of the type of the result, from torch's default generator; impure.

    What it reads says only when it is drawn (with the cotangent of a result: at ``backward()``).
    """

    @property
    def impure(self) -> bool:
        """Advances a generator."""
        return True


@dataclass(frozen=True)
class Tell(Primitive):
    """``tell(x, numbers...)``: x; the numbers go to the report of the call, for a level."""

    level: str
    what: str


@dataclass(frozen=True)
class Recall(Primitive):
    """``recall(state..., meta...)``: where the particles of an unroll stand at the start of a call; impure.

    Gives sequences of one element per antithetic pair: every state of the particle above, then of the one below; then
    for every meta-parameter its new direction, then the sum of all directions since the unroll began, this one
    included (standard normal numbers, to be scaled).  Where the caller knows of no earlier window, the states are those
    of the arguments.

    Attributes:
        level: Name of the level.
        states: Positions among the program's inputs.
        metas: The same.
        samples: Number of pairs.
    """

    level: str
    states: tuple[int, ...]
    metas: tuple[int, ...]
    samples: int

    @property
    def impure(self) -> bool:
        """Draws directions."""
        return True


@dataclass(frozen=True)
class Keep(Primitive):
    """``keep(x..., sum..., up..., down...)``: the x; the rest is where particles stand at the end of a call; impure.

    Attributes:
        level: Name of the level.
        n: Number of the x.
        metas: Positions among the program's inputs of what the sums are of.
        states: Positions among the program's results that these particles have values of their own for.
    """

    level: str
    n: int
    metas: tuple[int, ...]
    states: tuple[int, ...]

    @property
    def impure(self) -> bool:
        """Tells the caller."""
        return True
