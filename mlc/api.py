"""Tracing and planning without running: :func:`trace` and :func:`plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlc.compiled.underlying import underlying
from mlc.ir.lowered.contract import Pass
from mlc.ir.program import Program
from mlc.passes.planning.options import check_options
from mlc.trace.build import build_program
from mlc.trace.capture import record
from mlc.trace.observe import observe
from mlc.view.plan import Plan, make_plan

__all__ = ["plan", "trace"]


def trace(fn: Callable[..., Any], *args: Any, fake: bool = False, **kwargs: Any) -> Program:
    """Trace one call.

    The function runs for real while it is recorded; afterwards everything of the user's is put back, random generators
    included; only a generator given as argument is advanced.

    Args:
        fn: A training loop, compiled or not.
        *args: Its arguments.
        fake: Trace on fake tensors, without running: for models that do not fit here. What needs the value of a tensor
            is refused then.
        **kwargs: Its keyword arguments.

    Returns:
        The program; ``str(program)`` is its text form.

    Raises:
        CaptureError: when something in the loop cannot be represented exactly.
    """
    fn, args, _ = underlying(fn, args)
    if fake:
        return build_program(record(fn, args, kwargs))
    seen = observe(fn, args, kwargs)
    seen.undo()
    program = build_program(seen.recording)
    seen.release()
    return program


def plan(
    program: Program,
    *,
    memory: int | str | None = None,
    backend: str = "auto",
    stop_gradient: str = "all",
    flows: Any = None,
    precision: Any = None,
    mesh: Any = None,
    levers: Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
    paths: Mapping[str, bool] | None = None,
) -> Plan:
    """Plan a program: what is chosen for each flow, why, and what it costs.

    Args:
        program: From :func:`trace`.
        memory: As for :func:`mlc.compile`, like all that follow.
        backend: See there.
        stop_gradient: See there.
        flows: See there.
        precision: See there.
        mesh: See there.
        levers: See there.
        passes: See there.
        paths: See there.

    Raises:
        PlanError: for options that make no sense.
        BudgetError: when no exact plan fits the memory.
    """
    options: dict[str, Any] = {"memory": memory, "backend": backend, "stop_gradient": stop_gradient}
    options |= {
        "flows": flows,
        "precision": precision,
        "mesh": mesh,
        "levers": levers,
        "passes": passes,
        "paths": paths,
    }
    check_options(options)
    return make_plan(program, **options)
