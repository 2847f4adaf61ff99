"""A plan with the program that it was made for, the graphs that it leads to, and what else the search saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlc.errors import PlanError
from mlc.ir.digest import digest
from mlc.ir.lowered.contract import Pass
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.passes.lowering.pipeline import PIPELINE, Passes, differentiated, lowered, names
from mlc.passes.planning.alternatives import Alternatives
from mlc.passes.planning.plan import PlanDocument

__all__ = ["PlannedProgram", "joint_of", "stages_of_plan"]


@dataclass(frozen=True)
class PlannedProgram:
    """What planning gives.

    Attributes:
        program: The program.
        plan: The decisions.
        stages: What they lead to.
        alternatives: The other candidates of the search.
        passes: What made the stages.
    """

    program: Program
    plan: PlanDocument
    stages: Stages
    alternatives: Alternatives = field(repr=False)
    passes: Passes = PIPELINE


def stages_of_plan(program: Program, plan: PlanDocument, passes: Sequence[Pass] = PIPELINE) -> Stages:
    """Stage graphs of a program under a plan.

    Raises:
        PlanError: when the plan belongs to another program, or was made with other passes.
    """
    if plan.program != digest(program):
        raise PlanError("this plan belongs to another program", advice="plan the program again with mlc.plan")
    made_with = plan.passes or names(PIPELINE)
    if made_with != names(passes):
        raise PlanError(
            f"this plan was made with the passes {', '.join(made_with)}",
            advice="plan the program again with mlc.plan(program, passes=...)",
        )
    return lowered(joint_of(program, plan, passes), plan.context, passes)


def joint_of(program: Program, plan: PlanDocument, passes: Sequence[Pass] = PIPELINE) -> Joint | Stages:
    """The program differentiated as a plan says, before anything is decided about memory."""
    return differentiated(program, plan.context, passes)
