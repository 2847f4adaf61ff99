"""Plans: the decisions of the compiler as data - what was chosen for each flow, why, what it costs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from mlc.errors import BudgetError, PlanError
from mlc.ir.core import Eqn
from mlc.ir.digest import digest
from mlc.ir.program import Program
from mlc.passes.adjoint import Policy
from mlc.passes.lower import Stages, lower

__all__ = ["Decision", "Plan", "check_options", "make_plan", "parse_memory", "stages_for"]

VERSION = 1
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Decision(BaseModel):
    """One choice: for which level or flow, what, why, and the next best alternative."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    choice: str
    reason: str
    seconds: float | None = None
    bytes: int | None = None
    runner_up: str = ""


class Plan(BaseModel):
    """What the compiler decided for one program.

    Attributes:
        version: Format version.
        program: Digest of the program that it belongs to.
        memory: The budget asked for, bytes; None without one.
        mode: ``"mixed"`` or ``"reverse"``: how inner gradients are differentiated.
        stop: Meaning of stops, ``"all"`` or ``"inner"``.
        backend: ``"interpreter"``.
        checkpoint: Distance of kept states in the outermost loops (1: every state).
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
    decisions: tuple[Decision, ...] = ()
    peak_bytes: int = 0
    seconds: float = 0.0


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that make no sense.

    Raises:
        PlanError: naming the option.
    """
    if options.get("stop_gradient", "all") not in ("all", "inner"):
        raise PlanError(f"stop_gradient={options['stop_gradient']!r}", advice='use "all" or "inner"')
    if options.get("backend", "auto") not in ("auto", "interpreter"):
        raise PlanError(f"backend={options['backend']!r}", advice='use "auto" or "interpreter"')
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
    """Choose modes and checkpoints for a program."""
    return Plan(program=digest(program), stop=stop_gradient)


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
    return lower(program, policy_of(plan))


_ = (json, Path, torch, ValidationError, BudgetError, Eqn)
