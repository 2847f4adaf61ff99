"""The graphs of a program after each pass of its pipeline, for looking at."""

from __future__ import annotations

from mlc.errors import PlanError
from mlc.ir.lowered.contract import Graphs
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.passes.cost.facts import Stage, stages_of
from mlc.passes.lowering.pipeline import PIPELINE, Passes, Step, names, run
from mlc.view.plan import Plan

__all__ = ["TRACED", "after", "graphs_after", "input_names", "known", "shown"]

TRACED = "trace"  # what there is before the first pass: recorded, rolled into loops, gradients still first-class


def known(passes: Passes = PIPELINE) -> tuple[str, ...]:
    """What there is to look at, in order."""
    return (TRACED, *names(passes))


def graphs_after(plan: Plan) -> dict[str, Graphs]:
    """What each pass of the plan's pipeline gave, by its name, in order; a pass that had nothing to take is left out.

    Raises:
        PlanError: for a plan without its program.
    """
    program = plan.bound
    if program is None:
        raise PlanError("this plan has no program to look into", advice="mlc.Plan.load(path, program)")
    found: dict[str, Graphs] = {TRACED: program}

    def keep(step: Step) -> None:
        found[step.of.name] = step.after

    run(plan.pipeline, program, plan.context, [keep])
    return found


def after(plan: Plan, name: str | None = None) -> tuple[Stage, ...]:
    """The graphs after a pass, or after all of them.

    Raises:
        PlanError: for a plan without its program, or another name.
    """
    found = graphs_after(plan)
    if name is None:
        name = list(found)[-1]
    if name not in found:
        all_of_it = known(plan.pipeline)
        if name in all_of_it:
            raise PlanError(
                f"pass {name!r} has nothing to take in {plan.mode} mode", advice=f"one of: {', '.join(found)}"
            )
        raise PlanError(f"there is no pass {name!r}", advice=f"one of: {', '.join(all_of_it)}")
    return shown(found[name])


def shown(graphs: Graphs) -> tuple[Stage, ...]:
    """A form of graphs as stages to list."""
    if isinstance(graphs, Stages):
        return stages_of(graphs)
    name = "joint" if isinstance(graphs, Joint) else "program"
    return (Stage(name, graphs.region, frozenset(), frozenset(graphs.region.outputs)),)


def input_names(plan: Plan, stage: Stage) -> list[str]:
    """Names of a stage's inputs: those of the program, ``kept`` values, cotangents."""
    program = plan.bound
    assert isinstance(program, Program)
    own = [x.name for x in program.inputs]
    if stage.name != "backward":
        return own + [f"cotangent_{i}" for i in range(len(stage.region.inputs) - len(own))]
    saved = plan.stages.saved
    found = [own[i] if kind == "in" else f"kept_{i}" for kind, i in saved]
    rest = len(stage.region.inputs) - len(found)
    return found + [f"cotangent_{i}" for i in range(rest)]
