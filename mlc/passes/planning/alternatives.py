"""Alternatives to a plan: the other candidates of its search.

Kept with a plan in memory until somebody asks for :attr:`mlc.Plan.formulas`, because making them again would mean
planning again.  Where planning evaluated too few, the next ones of the search's ladder are lowered then, if the
program is small enough for that to be quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlc.ir.core import Region
from mlc.ir.lowered.stages import Stages
from mlc.passes.planning.search import Candidate, Search

__all__ = ["Alternatives"]

_QUICK = 1500  # equations of a program whose further candidates are lowered when formulas are asked for


class Alternatives:
    """The other candidates of a plan's searches.

    Args:
        chosen: The plan's own.
        searches: Where it was found.
        left: Share of the time of fusible operators that is left when they are compiled.
    """

    def __init__(self, chosen: Candidate, searches: Sequence[Search], left: float) -> None:
        self.chosen = chosen
        self.left = left
        small = sum(len(list(_region(s).walk())) for s in searches) <= _QUICK
        self.searches = tuple(searches) if small else ()
        self.found = [c for s in searches for c in s.found.values() if c is not chosen]

    def named(self, budget: int | None) -> dict[str, tuple[Stages, str]]:
        """Up to five of them, by name, with their mode."""
        own = self.chosen
        if budget is not None and not any(c.peak < own.peak for c in self.found):
            self.found += self._smaller()
        self.searches = ()
        here = [c for c in self.found if c.mode == own.mode]
        more = [c for c in here if c.peak > own.peak and c.seconds < own.seconds]
        less = [c for c in here if c.peak < own.peak]
        other = [c for c in self.found if c.mode != own.mode]
        picks = [min(more, key=lambda c: c.peak)] if more else []
        picks += [min(more, key=lambda c: c.seconds)] if more else []
        picks += [max(less, key=lambda c: c.peak), min(less, key=lambda c: c.peak)] if less else []
        picks += [min(other, key=lambda c: c.seconds)] if other else []
        return {self.name(c): (c.stages, c.mode) for c in dict.fromkeys(picks)}

    def _smaller(self) -> list[Candidate]:
        """A candidate of the ladder with a smaller peak, where the program is small."""
        own = self.chosen
        search = next((s for s in self.searches if s.mode == own.mode), None)
        if search is None:
            return []
        ladder = [x for x in search.ladder() if x.price > own.levers.price]
        other = [x for x in ladder if replace(x, price=0.0) != replace(own.levers, price=0.0)]
        for levers in dict.fromkeys([*other[:1], *ladder[-1:]]):
            c = search.at(levers)
            if c.peak < own.peak:
                return [c]
        return []

    def name(self, c: Candidate) -> str:
        """What a reader may call a candidate: ``keeping less (3 sets of states, 4 parts)``."""
        if c.mode != self.chosen.mode:
            return f"{c.mode} mode"
        sets, parts = c.levers.slots, c.levers.parts
        how = [f"{sets} set{'s' * (sets != 1)} of states" if sets is not None else "all states"]
        how += [f"{parts} parts"] if parts > 1 else []
        if not c.levers.price:
            return f"keeping everything ({', '.join(how)})" if len(how) > 1 or sets else "keeping everything"
        return f"keeping {'more' if c.peak > self.chosen.peak else 'less'} ({', '.join(how)})"


def _region(s: Search) -> Region:
    return s.joint.forward if isinstance(s.joint, Stages) else s.joint.region
