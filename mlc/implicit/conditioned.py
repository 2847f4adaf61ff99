"""A solver with the condition that its answer satisfies, and how linear systems with its derivative are solved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlc.implicit.closed import name_of
from mlc.implicit.log import Log
from mlc.implicit.system import Settings
from mlc.linear.solve import Solve

__all__ = ["Conditioned"]


class Conditioned:
    """A solver and the condition of its answer.

    Attributes:
        solve: The user's solver.
        optimality: The condition.
        settings: How linear systems are solved.
        last: The last linear solve of a gradient (:class:`~mlc.linear.solve.Solve`): iterations, residual,
            curvature.
    """

    def __init__(self, solve: Callable[..., Any], optimality: Callable[..., Any], settings: Settings) -> None:
        self.solve, self.optimality, self.settings = solve, optimality, settings
        self.log = Log()

    @property
    def last(self) -> Solve | None:
        """The last linear solve."""
        return self.log.last

    @property
    def title(self) -> str:
        """The solver's own name."""
        return name_of(self.solve)

    @property
    def solver_name(self) -> str:
        """The solver's name for messages."""
        return f"the solver {self.title}"

    @property
    def what(self) -> str:
        """The condition's name for messages."""
        return f"the optimality condition {name_of(self.optimality)}"
