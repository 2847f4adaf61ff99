"""Plans: the decisions of the compiler as data - what was chosen for each flow, why, what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from mlc.errors import PlanError
from mlc.ir.digest import digest
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.formulas.alternatives import Formulas, Rivals, formulas_of
from mlc.passes.lowering.lower import Levers, finish
from mlc.passes.lowering.modes import Modes, differentiated
from mlc.passes.responses.response import read
from mlc.shown import Shown
from mlc.view.explain import explain

__all__ = ["VERSION", "Decision", "Plan", "joint_of", "stages_for"]

VERSION = 1


class Decision(BaseModel):
    """One choice: for which level or flow, what, why, and the next best alternative."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    choice: str
    reason: str
    seconds: float | None = None
    bytes: int | None = None
    runner_up: str = ""


class Plan(Shown, BaseModel):
    """What the compiler decided for one program.

    Attributes:
        version: Format version.
        program: Digest of the program that it belongs to.
        memory: The budget asked for, bytes; None without one.
        mode: ``"mixed"`` or ``"reverse"``: how inner gradients are differentiated; ``"forward"``: tangents of the
            meta-parameters go through the loops (see :mod:`mlc.passes.lowering.modes`).
        flows: Modes of single levels' gradients, where they differ from it.
        responses: How the derivative of what a level trained is obtained, by name of the level, where not exactly.
        stop: Meaning of stops, ``"all"`` or ``"inner"``.
        backend: ``"interpreter"`` or ``"inductor"``.
        price: Seconds of a call that a byte of its peak was worth (see :class:`mlc.passes.lowering.lower.Levers`).
        slots: Sets of states kept per loop, the others replayed; None: all of them.
        parts: Micro-batches, where examples are independent.
        offload: Bytes of an element from which on what loops keep for their adjoint rests on the host; None: nothing.
        decisions: Every decision with its reason.
        peak_bytes: Predicted peak of what a call allocates beyond its inputs, bytes.
        host_bytes: Predicted bytes that rest on the host beside them.
        seconds: Predicted time of forward and backward, seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    program: str
    memory: int | None = None
    mode: str = "mixed"
    flows: dict[str, str] = Field(default_factory=dict)
    responses: dict[str, dict[str, Any]] = Field(default_factory=dict)
    stop: str = "all"
    backend: str = "interpreter"
    price: float = Field(default=0.0, ge=0)
    slots: int | None = Field(default=None, ge=1)
    parts: int = Field(default=1, ge=1)
    offload: int | None = Field(default=None, ge=1)
    decisions: tuple[Decision, ...] = ()
    peak_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    _bound: Program | None = PrivateAttr(default=None)
    _stages: Stages | None = PrivateAttr(default=None)
    _rivals: Rivals | None = PrivateAttr(default=None)
    _formulas: Formulas | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def bind(self, program: Program) -> Plan:
        """Remember the program that the plan was made for (in memory only); returns the plan.

        Raises:
            PlanError: when it belongs to another program.
        """
        if self.program != digest(program):
            raise PlanError("this plan belongs to another program", advice="plan the program again with mlc.plan")
        self._bound = program
        return self

    @property
    def bound(self) -> Program | None:
        """The program it was made for; None for a plan that was loaded without one."""
        return self._bound

    @property
    def levers(self) -> Levers:
        """What is kept and what is computed again."""
        return Levers(self.price, self.slots, self.parts, offload=self.offload)

    @property
    def modes(self) -> Modes:
        """Which way derivatives go, and how each level responds."""
        return Modes(self.mode, self.flows, {name: read(x) for name, x in self.responses.items()})

    @property
    def formulas(self) -> Formulas:
        """Time (seconds), peak (bytes) and flops as sympy expressions in the trips of the loops; break-even points.

        Computed when asked for. A plan that was loaded knows no other plans to compare with.

        Raises:
            PlanError: for a plan that was loaded without its program.
        """
        if self._formulas is None:
            if self._bound is None:
                raise PlanError("a plan alone has no formulas", advice="Plan.load(path, program)")
            stages = stages_for(self._bound, self)
            self._formulas = formulas_of(
                stages,
                self._bound,
                self._rivals,
                mode=self.mode,
                compiled=self.backend == "inductor",
                budget=self.memory,
            )
            self._rivals = None
        return self._formulas

    def explain(self, verbose: bool = False) -> str:
        """Levels, flows, what was chosen for each and why, on one screen; ``verbose``: and where time and memory go."""
        return explain(self, self._bound, verbose)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, program: Program | None = None) -> Plan:
        """Read a plan.

        Args:
            path: A file that :meth:`save` wrote.
            program: The program to use it with, if it is there already.

        Raises:
            PlanError: when the file is malformed, from a newer version, or belongs to another program.
        """
        plan = _read(Path(path))
        return plan if program is None else plan.bind(program)


def _read(path: Path) -> Plan:
    again = "make it again with mlc.plan(program).save(path)"
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        raise PlanError(f"{path}: {e.strerror}", advice=again) from None
    except ValueError as e:
        raise PlanError(f"{path} is no plan: {e}", advice=again) from None
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise PlanError(f"{path} is no plan: it has no version", advice=again)
    if version > VERSION:
        raise PlanError(
            f"{path} has version {version} of the format; this mlc reads up to {VERSION}",
            advice=f"update mlc, or {again}",
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise PlanError(f"{path} is no plan: {where}: {first['msg']}", advice=again) from None


def stages_for(program: Program, plan: Plan) -> Stages:
    """Stage graphs of a program under a plan.

    Raises:
        PlanError: when the plan belongs to another program.
    """
    if plan.program != digest(program):
        raise PlanError("this plan belongs to another program", advice="plan the program again with mlc.plan")
    if plan._stages is not None and plan.bound is program:
        return plan._stages
    return finish(joint_of(program, plan), plan.levers)


def joint_of(program: Program, plan: Plan) -> Joint | Stages:
    """The program differentiated as a plan says, before anything is decided about memory."""
    return differentiated(program, plan.modes, Policy(plan.mode, plan.stop))[0]
