"""Programs: a region with the meaning of its inputs and outputs, and the levels and flows found in it."""

from __future__ import annotations

from dataclasses import dataclass

from mlc.ir.levels.graph import LevelGraph
from mlc.ir.levels.view import LevelView
from mlc.ir.problem import Flow, Input, Level, Problem
from mlc.ir.text import print_program
from mlc.shown import Shown

__all__ = ["Flow", "Input", "Level", "Program"]


@dataclass(frozen=True, eq=False)
class Program(Shown, Problem):
    """A traced function: its facts (:class:`mlc.ir.problem.Problem`), its text form and its level graph."""

    def __str__(self) -> str:
        """The text form; :func:`mlc.ir.parse.parse` reads it back."""
        return print_program(self)

    def level(self, name: str) -> LevelView:
        """A level with the graphs of its loss and update, ``program.level("L1").loss``.

        Raises:
            KeyError: when there is no level of this name.
        """
        found = {x.name: x for x in self.levels}
        if name not in found:
            raise KeyError(f"no level {name}; there are {', '.join(found)}")
        return LevelView(self, found[name])

    @property
    def graph(self) -> LevelGraph:
        """The level graph: paths, cuts, what can be pruned."""
        return LevelGraph(self)
