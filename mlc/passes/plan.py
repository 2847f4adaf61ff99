"""Plans: the decisions of the compiler as data - what was chosen for each flow, why, what it costs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from mlc.errors import BudgetError, PlanError
from mlc.ir.core import Eqn
from mlc.ir.digest import digest
from mlc.ir.program import Program
from mlc.ir.shown import Shown
from mlc.ir.types import nbytes
from mlc.passes.adjoint import Policy
from mlc.passes.explain import explain
from mlc.passes.lower import Stages, lower
from mlc.passes.memory import region_peak

__all__ = ["Decision", "Plan", "check_options", "make_plan", "parse_memory", "stages_for"]

VERSION = 1
USUAL_ROUNDS, MOST_ROUNDS = 2, 4
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


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
        mode: ``"mixed"`` or ``"reverse"``: how inner gradients are differentiated.
        stop: Meaning of stops, ``"all"`` or ``"inner"``.
        backend: ``"interpreter"``.
        checkpoint: Distance of kept states in the outermost loops (1: every state).
        rounds: Cuts of rematerialisation inside products.
        decisions: Every decision with its reason.
        peak_bytes: Predicted peak of what a call allocates beyond its inputs, bytes.
        seconds: Predicted time of forward and backward, seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    program: str
    memory: int | None = None
    mode: str = "mixed"
    stop: str = "all"
    backend: str = "interpreter"
    checkpoint: int = 1
    rounds: int = 2
    decisions: tuple[Decision, ...] = ()
    peak_bytes: int = 0
    seconds: float = 0.0
    _bound: Program | None = PrivateAttr(default=None)
    _stages: Stages | None = PrivateAttr(default=None)

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


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that make no sense.

    Raises:
        PlanError: naming the option.
    """
    if options.get("stop_gradient", "all") not in ("all", "inner"):
        raise PlanError(f"stop_gradient={options['stop_gradient']!r}", advice='use "all" or "inner"')
    if options.get("backend", "auto") not in ("auto", "interpreter"):
        raise PlanError(f"backend={options['backend']!r}", advice='use "auto" or "interpreter"')
    for name in ("flows", "precision", "mesh"):
        if options.get(name) is not None:
            raise PlanError(f"{name}={options[name]!r} is not supported yet", advice=f"leave {name} out")
    parse_memory(options.get("memory"))


def parse_memory(memory: int | str | None) -> int | str | None:
    """Bytes of a budget; ``"min"`` and None are passed on.

    Raises:
        PlanError: when the text is not a size.
    """
    if memory is None or memory == "min":
        return memory
    if isinstance(memory, int) and memory > 0:
        return memory
    m = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(memory))
    if m is None or m.group(2).upper() not in _UNITS:
        raise PlanError(f"memory={memory!r} is not a size", advice='write bytes, "800MiB", "2GiB" or "min"')
    return int(float(m.group(1)) * _UNITS[m.group(2).upper()])


def make_plan(program: Program, *, memory: Any = None, backend: str = "auto", stop_gradient: str = "all",
              flows: Any = None, precision: Any = None, mesh: Any = None) -> Plan:  # fmt: skip
    """Choose how inner gradients are differentiated and how much is recomputed inside products.

    Raises:
        BudgetError: when the smallest peak this compiler can reach is above the budget.
        PlanError: for options that make no sense.
    """
    check_options(
        {"backend": backend, "stop_gradient": stop_gradient, "flows": flows, "precision": precision, "mesh": mesh}
    )
    budget = parse_memory(memory)
    identity = digest(program)
    tried: list[tuple[int, int, Stages, dict[str, str]]] = []
    for rounds in (MOST_ROUNDS,) if budget == "min" else (USUAL_ROUNDS, MOST_ROUNDS):
        fallbacks: dict[str, str] = {}

        def note(e: Eqn, why: str, into: dict[str, str] = fallbacks) -> None:
            into[str(e.loc)] = why

        stages = lower(program, Policy("mixed", stop_gradient, note), rounds)
        tried.append((peak_bytes(stages), rounds, stages, fallbacks))
        if not isinstance(budget, int) or tried[-1][0] <= budget:
            break
    peak, rounds, stages, fallbacks = tried[-1]
    if isinstance(budget, int) and peak > budget:
        smallest = min(t[0] for t in tried)
        raise BudgetError(
            f"no plan fits {budget} bytes: the smallest predicted peak is {smallest} bytes", loc=program.loc,
            advice=f"give at least memory={smallest}, fewer steps or a smaller batch",
        )  # fmt: skip
    plan = Plan(
        program=identity, stop=stop_gradient, memory=budget if isinstance(budget, int) else None, rounds=rounds,
        decisions=_decisions(program, fallbacks, rounds), peak_bytes=peak,
    ).bind(program)  # fmt: skip
    plan._stages = stages
    return plan


def peak_bytes(stages: Stages) -> int:
    """Predicted peak of a call beyond its inputs: the forward stage, or what is kept and the backward stage."""
    forward = region_peak(stages.forward)
    if stages.backward is None:
        return forward
    kept = sum(nbytes(stages.forward.outputs[i].type) for kind, i in stages.saved if kind == "out")
    return max(forward, kept + region_peak(stages.backward))


def _decisions(program: Program, fallbacks: dict[str, str], rounds: int) -> tuple[Decision, ...]:
    out = []
    for level in program.levels[1:]:
        why = fallbacks.get(str(level.loc))
        if why is None:
            out.append(Decision(
                subject=level.name, choice="mixed",
                reason="forward over reverse",
                runner_up="reverse",
            ))  # fmt: skip
        else:
            out.append(Decision(subject=level.name, choice="reverse", reason=why))
    out.append(Decision(
        subject="products", choice=f"recompute, {rounds} cuts",
        reason="minimum cut",
        runner_up="keep all",
    ))  # fmt: skip
    out.append(Decision(subject="states", choice="all kept",
                        reason="no step is redone"))  # fmt: skip
    return tuple(out)


def policy_of(plan: Plan, note: Any = None) -> Policy:
    """What the adjoint may do under a plan."""
    return Policy(plan.mode, plan.stop, note or (lambda e, why: None))


def stages_for(program: Program, plan: Plan) -> Stages:
    """Stage graphs of a program under a plan.

    Raises:
        PlanError: when the plan belongs to another program.
    """
    if plan.program != digest(program):
        raise PlanError("this plan belongs to another program", advice="plan the program again with mlc.plan")
    if plan._stages is not None and plan.bound is program:
        return plan._stages
    return lower(program, policy_of(plan), plan.rounds)
