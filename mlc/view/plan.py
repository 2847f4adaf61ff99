"""Plans that can be looked at: a plan's decisions with the program that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from mlc.errors import PlanError
from mlc.ir.digest import digest
from mlc.ir.lowered.contract import Pass
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Program
from mlc.passes.formulas.comparison import Formulas, formulas_of
from mlc.passes.lowering.pipeline import PIPELINE, Passes, check_passes
from mlc.passes.planning.plan import PlanDocument, read_plan
from mlc.passes.planning.planned import PlannedProgram, stages_of_plan
from mlc.passes.planning.planner import plan_program, planned_sweep
from mlc.shown import Shown
from mlc.view.explain import explain

__all__ = ["Plan", "make_plan", "stages_for", "sweep"]


class Plan(Shown, PlanDocument):
    """What the compiler decided for one program, and why.

    The decisions are plain data, which :meth:`save` writes and :meth:`load` reads.  A plan that was made here, or
    loaded with its program, can also tell what it leads to: its stage graphs, formulas, and where its time goes.
    """

    _program: Program | None = PrivateAttr(default=None)
    _planned: PlannedProgram | None = PrivateAttr(default=None)
    _formulas: Formulas | None = PrivateAttr(default=None)
    _passes: Passes = PrivateAttr(default=PIPELINE)

    @classmethod
    def of(cls, planned: PlannedProgram) -> Plan:
        """The plan of a planned program."""
        plan = cls.model_validate(planned.plan.model_dump())
        plan._program, plan._planned, plan._passes = planned.program, planned, planned.passes
        return plan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return super().__hash__()

    def bind(self, program: Program, passes: Sequence[Pass] | None = None) -> Plan:
        """Remember the program that the plan was made for (in memory only); returns the plan.

        Args:
            program: The program.
            passes: The pipeline that it was made with; None: mlc's own.

        Raises:
            PlanError: when it belongs to another program.
        """
        if self.program != digest(program):
            raise PlanError("this plan belongs to another program", advice="plan the program again with mlc.plan")
        self._program = program
        self._passes = check_passes(passes)
        return self

    @property
    def bound(self) -> Program | None:
        """The program it was made for; None for a plan that was loaded without one."""
        return self._program

    @property
    def pipeline(self) -> Passes:
        """The passes that it was made with."""
        return self._passes

    @property
    def fresh(self) -> bool:
        """Whether it was made in this process, so that its graphs and formulas are at hand."""
        return self._planned is not None

    @property
    def stages(self) -> Stages:
        """The stage graphs that it leads to.

        Raises:
            PlanError: for a plan that was loaded without its program.
        """
        if self._program is None:
            raise PlanError("a plan alone has no graphs", advice="Plan.load(path, program)")
        return stages_for(self._program, self)

    @property
    def formulas(self) -> Formulas:
        """Time (seconds), peak (bytes) and flops as sympy expressions in the trips of the loops; break-even points.

        Computed when asked for. A plan that was loaded knows no other plans to compare with.

        Raises:
            PlanError: for a plan that was loaded without its program.
        """
        if self._formulas is None:
            if self._program is None:
                raise PlanError("a plan alone has no formulas", advice="Plan.load(path, program)")
            self._formulas = formulas_of(
                self.stages,
                self._program,
                None if self._planned is None else self._planned.alternatives,
                mode=self.mode,
                compiled=self.backend == "inductor",
                budget=self.memory,
            )
        return self._formulas

    def explain(self, verbose: bool = False) -> str:
        """Levels, flows, what was chosen for each and why, on one screen; ``verbose``: and where time and memory go."""
        program = self._program
        told = program is not None and (verbose or self.fresh)
        stages = self.stages if verbose and program is not None else None
        return explain(self, program, self.formulas if told else None, stages)

    @classmethod
    def load(cls, path: str | Path, program: Program | None = None, passes: Sequence[Pass] | None = None) -> Plan:
        """Read a plan.

        Args:
            path: A file that :meth:`save` wrote.
            program: The program to use it with, if it is there already.
            passes: The pipeline that it was made with; None: mlc's own.

        Raises:
            PlanError: when the file is malformed, from a newer version, or belongs to another program.
        """
        plan = cls.model_validate(read_plan(Path(path)))
        return plan if program is None else plan.bind(program, passes)


def make_plan(program: Program, **options: Any) -> Plan:
    """Choose the fastest exact plan that fits the memory; see :func:`mlc.passes.planning.planner.plan_program`."""
    return Plan.of(plan_program(program, **options))


def sweep(program: Program, *, say: Callable[[str], None] = lambda text: None, **options: Any) -> list[Plan]:
    """The whole curve of time and memory: one plan for each point, fastest first; ``say`` hears where it is."""
    return [Plan.of(x) for x in planned_sweep(program, say=say, **options)]


def stages_for(program: Program, plan: Plan) -> Stages:
    """Stage graphs of a program under a plan.

    Raises:
        PlanError: when the plan belongs to another program.
    """
    if plan._planned is not None and plan.bound is program:
        return plan._planned.stages
    return stages_of_plan(program, plan, plan.pipeline)
