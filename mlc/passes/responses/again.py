"""A run once more: its equations as a region of their own, to be run at another place, by other rules.

What :class:`Again` holds runs on the items and random numbers that the run drew (sequences are read anew), so two runs
differ by nothing but what is changed on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlc.ir.core import Custom, Eqn, Grad, Loop, Region, Var
from mlc.passes.responses.ending import inside_of, leaving
from mlc.passes.responses.site import Run, Site
from mlc.passes.responses.stationary import refused

__all__ = ["Again", "again"]


@dataclass(frozen=True)
class Again:
    """A run as a region.

    Attributes:
        region: ``given... -> ends..., others...``.
        given: Values of the run's region.
        ends: What was trained.
        others: What else the run leaves.
    """

    region: Region
    given: tuple[Var, ...]
    ends: tuple[Var, ...]
    others: tuple[Var, ...]


def again(region: Region, run: Run, site: Site, what: str, *, from_metas: bool = False,
          change: Callable[[Eqn], list[Eqn]] = lambda e: [e]) -> Again:  # fmt: skip
    """The run's equations, and what they read.

    Args:
        region: The run's region as it is now.
        run: The run.
        site: Its level.
        what: The response, for messages.
        from_metas: Whether equations before the run that lead to it from meta-parameters and from what other levels
            trained belong to it (those from what it trains to its first losses always do).
        change: What stands in the place of each equation.
    """
    ends = tuple(t.end for t in run.trained)
    last = max(i for i, e in enumerate(region.eqns) if set(e.outs) & set(ends))
    inside = inside_of(region, run, last)
    others = tuple(v for v in leaving(region, run, last) if v not in ends)
    needed, kept = {*ends, *others}, list[Eqn]()
    for i in range(last, -1, -1):
        e = region.eqns[i]
        if not any(v in needed for v in e.outs):
            continue
        leads = any(v in site.own or (from_metas and v in site.moving) for v in e.inputs)
        above = leads and not isinstance(e.op, (Loop, Grad, Custom)) and not e.impure
        if i in inside or above:
            if e.impure:
                raise refused(site, what, e, "its training draws numbers between its steps")
            kept.append(e)
            needed.update(e.inputs)
    kept.reverse()
    made = {v for e in kept for v in e.outs}
    given = tuple(dict.fromkeys(v for e in kept for v in e.inputs if v not in made))
    eqns = tuple(x for e in kept for x in change(e))
    return Again(Region(given, eqns, (*ends, *others)), given, ends, others)
