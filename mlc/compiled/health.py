"""The health of a gradient: what linear solves and estimates said of it, and the warnings that follow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlc.compiled.adjoints import Adjoints, say
from mlc.errors import ResponseWarning
from mlc.ir.program import Level
from mlc.runtime.interpreter.meter import Swept
from mlc.runtime.interpreter.solve import Sampled, Solved, Told, Windowed

__all__ = ["Health", "Solves", "heard"]

_FAR = 0.3  # of its first norm: a gradient that is still so large is plainly not zero
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Solves:
    """The linear solves of one level in one call, together.

    Attributes:
        level: Its name.
        each: Every one of them, in order.
    """

    level: str
    each: tuple[Solved, ...]

    @property
    def iterations(self) -> int:
        """Of all of them."""
        return sum(s.iterations for s in self.each)

    @property
    def products(self) -> int:
        """With the Hessian, of all of them."""
        return sum(s.products for s in self.each)

    @property
    def residual(self) -> float:
        """The largest relative residual."""
        return max(s.residual for s in self.each)

    @property
    def curvature(self) -> float | None:
        """The smallest curvature seen; negative: the level is at no minimum."""
        return min((s.curvature for s in self.each if s.curvature is not None), default=None)

    @property
    def converged(self) -> bool:
        """Whether all of them came to their tolerance."""
        return all(s.converged for s in self.each)

    @property
    def stationarity(self) -> float | None:
        """The largest norm of a run's last gradient over that of its first; None where nobody measured it."""
        return max((s.stationarity for s in self.each if s.stationarity is not None), default=None)

    @staticmethod
    def by_level(each: Sequence[Solved]) -> dict[str, Solves]:
        """The solves of a call, by level."""
        names = dict.fromkeys(s.level for s in each)
        return {name: Solves(name, tuple(s for s in each if s.level == name)) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        keys = ("iterations", "products", "residual", "curvature", "converged", "stationarity")
        return {k: getattr(self, k) for k in keys}

    def __str__(self) -> str:
        n = len(self.each)
        solver = self.each[0].solver
        times = f"{n} solves, " if n > 1 else ""
        curvature = "" if self.curvature is None else f", curvature at least {self.curvature:.2e}"
        return f"{self.level}: {times}{solver} {self.iterations} iterations, residual {self.residual:.1e}{curvature}"


def heard(
    told: Sequence[Told],
) -> tuple[dict[str, Solves], dict[str, float], dict[str, int], dict[str, Adjoints]]:
    """Solves, variances, windows and adjoints of a call, by level."""
    solves = [x for x in told if isinstance(x, Solved)]
    variances: dict[str, float] = {}
    for x in dict.fromkeys(told):  # an estimate is told with each of its parts
        if isinstance(x, Sampled):
            variances[x.level] = variances.get(x.level, 0.0) + x.variance
    windows = {x.level: x.count for x in told if isinstance(x, Windowed)}
    adjoints = Adjoints.by_level([x for x in told if isinstance(x, Swept)])
    return Solves.by_level(solves), variances, windows, adjoints


class Health:
    """Warnings about the gradients of one program, each given once."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def look(self, solves: Mapping[str, Solves], adjoints: Mapping[str, Adjoints], levels: Sequence[Level]) -> None:
        """Warn of what a call said.

        Args:
            solves: By level.
            adjoints: By name of the level, or the name that the user gave it.
            levels: Those of the program.
        """
        for s in solves.values():
            self._solves(s)
        for a in adjoints.values():
            level = next((x for x in levels if a.level in (x.name, x.declared)), None)
            if a.trend is not None and level is not None and (a.level, a.trend) not in self._said:
                self._said.add((a.level, a.trend))
                say(a, level.title, level.loc)

    def _solves(self, s: Solves) -> None:
        last = s.each[-1]
        if s.curvature is not None and s.curvature < -_ROUNDING and last.definite:
            self._say(s.level, "curvature", (
                f"level {s.level}: its loss has negative curvature ({s.curvature:.1e}) where its training ended: that"
                " is no minimum, and this is no minimum's response. Try: more steps, damping=, or mlc.Truncated(k)"
            ))  # fmt: skip
        if not s.converged and last.solver != "nystrom":
            worst = max(s.each, key=lambda x: x.residual)
            self._say(s.level, "converged", (
                f"level {s.level}: {worst.solver} left a residual of {worst.residual:.1e} after {worst.iterations}"
                f" iterations (asked for: {worst.tol:.1e}): the gradient is inexact. Try: more steps=, damping=, or a"
                " larger tol="
            ))  # fmt: skip
        if s.stationarity is not None and s.stationarity > _FAR:
            self._say(s.level, "stationary", (
                f"level {s.level} is not at a stationary point: its last gradient is {s.stationarity:.2g} of its first."
                " Implicit assumes that it has converged. Try: train it longer, or mlc.Truncated(steps)"
            ))  # fmt: skip

    def _say(self, level: str, kind: str, what: str) -> None:
        if (level, kind) not in self._said:
            self._said.add((level, kind))
            warnings.warn(ResponseWarning(what), stacklevel=2)
