"""Loops that grow: a call with more inner steps than its plan was made for is planned again when it would not fit.

Only loops over whole iterables are open, and only iterables that tell their length are known to be longer before
they are drawn from.  Nothing runs before this is decided, so nothing of the user's has changed when it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlc.errors import BudgetError
from mlc.ir.core import Draw, EffectCall, Feed, Loop
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Program
from mlc.passes.cost.memory import peak_bytes
from mlc.passes.formulas.tripcounts import Group, Trips, planned_for
from mlc.passes.planning.planner import budget_of
from mlc.view.plan import Plan, make_plan, stages_for

__all__ = ["Counts", "longer", "open_loops", "peak_at", "planned_again"]

# Trips of the open loops, by the line and the depth that they stand at.
Counts = dict[tuple[str, int], int]


def _place(g: Group) -> tuple[str, int]:
    return str(g.loc), g.depth


def open_loops(program: Program) -> dict[int, Group]:
    """The loop that runs over each iterable of open length, by the iterable's number."""
    if not any(isinstance(e.op, Feed) and e.op.trips is None for e in program.region.eqns):
        return {}
    trips = Trips([program.region])
    drawn = {v: e.op.effects[0] for e in program.region.eqns if isinstance(e.op, Feed) for v in e.outs}
    out = {}
    for e in program.region.eqns:
        key = trips.group(e) if isinstance(e.op, Loop) and e.op.trips is None else None
        effects = [drawn[v] for v in e.inputs if v in drawn] if key is not None else []
        for x in effects:
            if isinstance(x, EffectCall) and isinstance(x.op, Draw) and key is not None:
                out[x.op.source] = trips.groups[key]
    return out


def longer(loops: Mapping[int, Group], length: Callable[[int], Any], known: Counts) -> Counts:
    """Open loops that will run more often than they are known to fit; empty when none does.

    Args:
        loops: From :func:`open_loops`.
        length: The iterable of a number as this call has it.
        known: Counts that are known to fit.
    """
    found: Counts = {}
    for source, g in loops.items():
        try:
            n = len(length(source))
        except TypeError:  # a generator, or a loader that does not know
            continue
        if n > known.get(_place(g), g.count):
            found[_place(g)] = n
    return found


def peak_at(stages: Stages, counts: Counts) -> int:
    """Predicted peak of these stages at other numbers of trips, bytes."""
    trips = Trips.of(stages)
    there = {k: counts[_place(g)] for k, g in trips.groups.items() if g.open and _place(g) in counts}
    regions = trips.at(there)
    return peak_bytes(replace(stages, forward=regions[0], backward=regions[1] if len(regions) > 1 else None))


def planned_again(
    program: Program, plan: Plan, counts: Counts, options: Mapping[str, Any], anyway: bool
) -> tuple[Program, Plan, int] | None:
    """Plan for longer loops, where the plan would not fit the budget at these counts.

    Args:
        program: The program.
        plan: Its plan, made for fewer trips.
        counts: Trips of loops that grew.
        options: Those of :func:`mlc.compile`.
        anyway: Whether to take the smallest plan where none fits.

    Returns:
        The program for so many trips, its plan, and the bytes that the old one would have needed; None when it fits.

    Raises:
        BudgetError: with the smallest possible peak at these counts.
    """
    stages = stages_for(program, plan)
    needed = peak_at(stages, counts)
    if needed <= budget_of(plan.memory, stages.forward):
        return None
    region = planned_for(program.region, lambda g: counts.get(_place(g), g.count))
    grown = replace(program, region=region)
    wanted = options.get("memory") if plan.memory is None else plan.memory
    try:
        return grown, make_plan(grown, **{**options, "memory": wanted}), needed
    except BudgetError as why:
        if not anyway:
            raise
        return grown, make_plan(grown, **{**options, "memory": why.least}), needed
