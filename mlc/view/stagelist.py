"""The graphs of a program after each pass, for looking at: the one place that knows which passes there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlc.errors import PlanError
from mlc.passes.cost.facts import Stage, stages_of
from mlc.passes.lowering.lower import Levers, finish

if TYPE_CHECKING:
    from mlc.passes.planning.plan import Plan

__all__ = ["PASSES", "after", "input_names"]

PASSES = {
    "trace": "recorded, rolled into loops, gradients still first-class",
    "adjoint": "differentiated and cut into stages, everything kept that saves time",
    "memory": "with what the plan keeps, replays, splits and computes again: what runs",
}


def after(plan: Plan, name: str) -> tuple[Stage, ...]:
    """The stage graphs after a pass of :data:`PASSES`.

    Raises:
        PlanError: for a plan without its program, or another name.
    """
    from mlc.passes.planning.plan import joint_of, stages_for

    program = plan.bound
    if program is None:
        raise PlanError("this plan has no program to look into", advice="mlc.Plan.load(path, program)")
    if name == "trace":
        return (Stage("program", program.region, frozenset(), frozenset(program.region.outputs)),)
    if name == "adjoint":
        return stages_of(finish(joint_of(program, plan), Levers()))
    if name == "memory":
        return stages_of(stages_for(program, plan))
    raise PlanError(f"there is no pass {name!r}", advice=f"one of: {', '.join(PASSES)}")


def input_names(plan: Plan, stage: Stage) -> list[str]:
    """Names of a stage's inputs: those of the program, ``kept`` values, cotangents."""
    from mlc.passes.planning.plan import stages_for

    program = plan.bound
    assert program is not None
    names = [x.name for x in program.inputs]
    if stage.name != "backward":
        return names
    saved = stages_for(program, plan).saved
    found = [names[i] if kind == "in" else f"kept_{i}" for kind, i in saved]
    rest = len(stage.region.inputs) - len(found)
    return found + [f"cotangent_{i}" for i in range(rest)]
