"""Primitives of responses: linear systems, random directions, and numbers for the report of a call."""

from __future__ import annotations

from dataclasses import dataclass

from mlc.ir.core import Loop, Primitive

__all__ = ["Noise", "Solve", "Tell"]


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
