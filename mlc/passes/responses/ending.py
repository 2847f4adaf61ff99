"""The end of a level's run: its results under new names, stopped, and one equation that gives the old names back.

What the run trained goes through that equation; anything else that it leaves (optimizer state, averages, losses that
were kept) is constant for every derivative.  Where such a constant would have reached a result or a loss above, that is
refused: its derivative would be missing without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlc.ir.core import Eqn, Region, Stop, Var
from mlc.ir.program import Program
from mlc.passes.responses.measured import first_and_last
from mlc.passes.responses.rewrite import ALWAYS, renamed_outs
from mlc.passes.responses.site import Run, Site, Trained
from mlc.passes.responses.stationary import Place, Stationary, refused

__all__ = ["Ending", "inside_of", "leaving", "rebuilt"]

Rule = Callable[[Sequence[Var], Sequence[Var], Sequence[Var]], Eqn]


@dataclass
class Ending:
    """A run and the region that it stands in now."""

    program: Program
    run: Run
    site: Site
    places: Sequence[Place]
    what: str

    @property
    def region(self) -> Region:
        """With what was done to runs behind this one."""
        return self.program.region_at(self.run.path)

    @property
    def ends(self) -> list[Var]:
        """The names of what was trained."""
        return [t.end for t in self.run.trained]


def rebuilt(end: Ending, point: Stationary, rule: Rule) -> Region:
    """The region with the run ending in an equation of its own.

    Args:
        end: The run.
        point: What is to be put in the place of its equations and behind them.
        rule: Makes the equation from results, their names, and numbers for the report.
    """
    region, ends = end.region, end.ends
    last = max(i for i, e in enumerate(region.eqns) if set(e.outs) & set(ends))
    items, told, counting = dict(point.items), list[Var](), list[Eqn]()
    if end.places:
        items, told, counting = first_and_last(end.run, end.places, items)
    others = leaving(region, end.run, last) - set(ends)
    raw = {v: Var(v.type, v.mask) for v in (*ends, *others)}
    eqns: list[Eqn] = []
    late: list[Eqn] = []
    behind: set[Var] = set(ends)
    for i, e in enumerate(region.eqns[: last + 1]):
        if any(v in behind for v in e.inputs):
            if set(e.outs) & set(ends):
                raise refused(end.site, end.what, e, "its parameters are updated one after the other")
            late.append(e)
            behind.update(e.outs)
            continue
        eqns += [renamed_outs(x, raw) for x in items.get(i, [e])]
        eqns += [Eqn(ALWAYS, (raw[v],), (v,), (), e.loc, "response") for v in e.outs if v in others]
    results = [Var(v.type, v.mask) for v in ends]
    held = [Eqn(ALWAYS, (raw[v],), (r,), (), None, "response") for v, r in zip(ends, results, strict=True)]
    levels = [_soft(end, t) for t in end.run.trained]
    given = [Var(v.type, v.mask) if level is not None else v for v, level in zip(ends, levels, strict=True)]
    made = rule(results, given, told)
    soft = [Eqn(Stop(level), (g,), (v,), (), None, "update") for g, v, level in zip(given, ends, levels, strict=True)
            if level is not None]  # fmt: skip
    behind_it = [*point.behind, *counting]
    eqns += [*behind_it, *held, made, *soft, *late, *region.eqns[last + 1 :]]
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def inside_of(region: Region, run: Run, last: int) -> set[int]:
    """Positions of equations up to ``last`` that depend on the run's gradients."""
    inside = {i for i in run.items}
    reached = {v for i in run.items for v in region.eqns[i].outs}
    for i, e in enumerate(region.eqns[: last + 1]):
        if any(v in reached for v in e.inputs):
            inside.add(i)
            reached.update(e.outs)
    return inside


def leaving(region: Region, run: Run, last: int) -> set[Var]:
    """Values that depend on the run's gradients and are read by what does not belong to it."""
    inside = inside_of(region, run, last)
    read = set(region.outputs)
    for i, e in enumerate(region.eqns):
        if i not in inside:
            read.update(e.inputs)
    made = {v for i in inside for v in region.eqns[i].outs}
    return {v for v in made if v in read and v.type.is_float}


def _soft(end: Ending, trained: Trained) -> int | None:
    """The depth from which on gradients stop at a step of this parameter; None where they go through."""
    step, k, _ = next(x for x in reversed(end.run.links) if x[2] is trained)
    loop = step.trained[k][2]
    v = step.trained[k][1] if loop is not None else None
    while v is not None:
        e = end.site.graph.producer.get(v)
        if e is None or len(e.inputs) != 1:
            return None
        if isinstance(e.op, Stop):
            return e.op.level
        v = e.inputs[0]
    return None
