"""Running what responses add: linear solves, random directions, and numbers for the report.

A solve is a product that was compiled like any body of a loop, in the hands of a linear solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mlc.ir.core import Eqn
from mlc.ir.opaque.estimates import Solve as SolveOp
from mlc.ir.opaque.estimates import Tell
from mlc.ir.types import TensorType
from mlc.linear.solve import Packing, Solve
from mlc.linear.solvers import SOLVERS, SYMMETRIC
from mlc.runtime.interpreter.interpreter import Executable
from mlc.runtime.interpreter.meter import Swept
from mlc.runtime.interpreter.recording import each_trip

__all__ = ["Sampled", "SolveRunner", "Solved", "Told", "Windowed", "noise_runner", "tell_runner"]


@dataclass(frozen=True)
class Solved:
    """One linear system that was solved for a level.

    Attributes:
        level: Its name.
        iterations: Of the solver.
        residual: Relative, ``|b - (A + damping) x| / |b|``.
        curvature: Smallest Rayleigh quotient of A that the solver saw; None where it saw none.
        converged: Whether the residual is at most the tolerance.
        products: With the Hessian.
        tol: The tolerance.
        solver: Its name.
        gradients: Norms of the level's first and last gradient; empty where nobody measured them.
    """

    level: str
    iterations: int
    residual: float
    curvature: float | None
    converged: bool
    products: int
    tol: float
    solver: str
    gradients: tuple[float, ...]

    @property
    def definite(self) -> bool:
        """Whether its solver takes the matrix for that of a minimum."""
        return self.solver in SYMMETRIC or self.solver == "neumann"

    @property
    def stationarity(self) -> float | None:
        """Norm of the last gradient over that of the first: 0 where the level has come to a stationary point."""
        if len(self.gradients) != 2 or not self.gradients[0]:
            return None
        return self.gradients[1] / self.gradients[0]


@dataclass(frozen=True)
class Sampled:
    """An estimate from random directions.

    Attributes:
        level: Name of the level.
        slopes: Directional derivative along each of them.
        size: Number of elements that each has.
    """

    level: str
    slopes: tuple[float, ...]
    size: int

    @property
    def variance(self) -> float:
        """Estimated expectation of the squared distance from the mean: (n + 1) |g|^2 / samples for n elements.

        With |g|^2 estimated as the mean square of the slopes (Gaussian directions).
        """
        return (self.size + 1) * sum(s * s for s in self.slopes) / len(self.slopes) ** 2


@dataclass(frozen=True)
class Windowed:
    """One call of an unroll with particles that live on.

    Attributes:
        level: Name of the level.
        count: Which window of the unroll it is, from 1.
    """

    level: str
    count: int


Told: TypeAlias = "Solved | Sampled | Windowed | Swept"


def noise_runner(e: Eqn) -> Callable[[list[Any]], list[Any]]:
    """Callable for a ``noise`` equation."""
    t = e.outs[0].type
    assert isinstance(t, TensorType)

    def run(args: list[Any]) -> list[Any]:
        args.clear()
        return [torch.randn(t.shape, dtype=t.dtype, device=t.device)]

    return run


def tell_runner(op: Tell, tell: Callable[[Told], None]) -> Callable[[list[Any]], list[Any]]:
    """Callable for a ``tell`` equation: slopes, and the number of elements of each direction."""

    def run(args: list[Any]) -> list[Any]:
        x, slopes, size = args
        args.clear()
        if op.what == "norms":  # of what each sample adds, instead of its slope
            slopes = torch.stack(slopes) / (int(size) + 1) ** 0.5
        tell(Sampled(op.level, tuple(slopes.reshape(-1).tolist()), int(size)))
        return [x]

    return run


class SolveRunner:
    """A compiled solve equation; called with its arguments in a list, returns the solution in a list."""

    def __init__(self, op: SolveOp, body: Executable, tell: Callable[[Told], None]) -> None:
        self.op = op
        self.body = each_trip(body, f"product of {op.level}")
        self.tell = tell

    def __call__(self, args: list[Any]) -> list[Any]:
        """Solve; ``args`` is emptied."""
        op, n = self.op, self.op.n_carry
        b, consts = args[:n], args[n:]
        args.clear()
        packing = Packing.of(b)
        flat = packing.flat(b)
        b.clear()

        def product(x: Tensor) -> Tensor:
            return packing.flat(self.body([*packing.parts(x), *consts]))

        found = self._solve(product, flat)
        numbers = tuple(float(x) for x in consts[len(consts) - op.told :])
        self.tell(Solved(op.level, found.iterations, found.residual, found.curvature, found.converged, found.products,
                         op.tol, op.solver, numbers))  # fmt: skip
        return list(packing.parts(found.x))

    def _solve(self, product: Callable[[Tensor], Tensor], b: Tensor) -> Solve:
        op = self.op
        how: dict[str, Any] = {"tol": op.tol, "damping": op.damping}
        how["rank" if op.solver == "nystrom" else "steps"] = op.count
        return SOLVERS[op.solver](product, b, **how)
