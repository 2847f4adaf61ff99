"""A plan on one screen: levels, flows with what was chosen for each and why, cost and peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mlc.ir.lowered.decision import Decision
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Flow, Level, Program
from mlc.passes.formulas.comparison import Formulas
from mlc.passes.planning.plan import PlanDocument
from mlc.units import size_text, time_text
from mlc.view.details import details, path_lines, paths_data
from mlc.view.formulatext import formula_lines
from mlc.view.tables import bundle, names_text, printed, table

__all__ = ["choice_of", "explain", "explained"]

_VALUE = {"start": "is where it starts", "trained above": "is trained above"}


_GUARDS = 8  # lines about guards


def explain(
    plan: PlanDocument, program: Program | None, formulas: Formulas | None = None, stages: Stages | None = None
) -> str:
    """What a plan does, for people; without its program only the decisions are known.

    Args:
        plan: The plan.
        program: Its program.
        formulas: Its formulas, when they are to be told.
        stages: Its stage graphs, when more is to be told: what each costs, where its time and memory go, which share
            of the work each level on a path takes.
    """
    parts: list[object] = [_headline(plan, program)]
    if program is not None:
        parts += [_levels(program.levels), _flows(plan, program), *path_lines(plan, program, stages)]
    rest = _remaining(plan, program)
    if rest:
        parts.append(_decisions(rest))
    if formulas is not None:
        parts += formula_lines(formulas, stages is not None)
    if stages is not None and program is not None:
        parts += details(stages, program)
    if program is not None:
        parts += [f"note: {note}" for note in program.notes]
        parts += [f"guard: {g}" for g in program.guards[:_GUARDS]]
        if len(program.guards) > _GUARDS:
            parts.append(
                f"and {len(program.guards) - _GUARDS} more guards (a later call that differs is recorded anew)"
            )
    return printed(*parts)


def explained(plan: PlanDocument, program: Program, formulas: Formulas) -> dict[str, Any]:
    """The same as data, for JSON."""
    flows = []
    for f in program.flows:
        choice, why, _ = choice_of(plan, f)
        d = _decision_for(plan.decisions, f)
        flows.append({
            "source": f.source, "target": f.target, "kind": f.kind, "carries": f.carries, "choice": choice, "why": why,
            "line": None if f.loc is None else f.loc.line, "seconds": d.seconds if d else None,
            "bytes": d.bytes if d else None, "runner_up": d.runner_up if d else "",
        })  # fmt: skip
    levels = [
        {"name": x.name, "declared": x.declared,
         "depth": x.depth, "optimizer": x.optimizer, "trips": x.trips, "trains": list(x.trains),
         "state": x.state, "line": None if x.loc is None else x.loc.line}
        for x in program.levels
    ]  # fmt: skip
    keys = ("mode", "backend", "memory", "peak_bytes", "seconds")
    return {
        "function": program.name, **{k: getattr(plan, k) for k in keys}, "levels": levels, "flows": flows,
        "paths": paths_data(plan, program),
        "decisions": [d.model_dump() for d in plan.decisions], "notes": list(program.notes),
        "guards": list(program.guards), "formulas": formulas.as_dict(),
    }  # fmt: skip


def _headline(plan: PlanDocument, program: Program | None) -> str:
    what = program.name if program is not None else f"a program ({plan.program[:12]})"
    way = "differentiated in forward mode" if plan.mode == "forward" else (
        f"inner gradients differentiated in {plan.mode} mode"
    )  # fmt: skip
    parts = [f"plan for {what}: {way}, backend {plan.backend}"]
    if plan.seconds:
        parts.append(f"predicted {time_text(plan.seconds)}")
    if plan.peak_bytes:
        parts.append(f"peak {size_text(plan.peak_bytes)}")
    if plan.host_bytes:
        parts.append(f"{size_text(plan.host_bytes)} on the host")
    if plan.memory is not None:
        parts.append(f"budget {size_text(plan.memory)}")
    if plan.stop != "all":
        parts.append("stops hold for the gradient they stand in only")
    return ", ".join(parts)


def _levels(levels: Sequence[Level]) -> Table:
    rows = []
    for x in levels:
        trips = "any" if x.trips is None else str(x.trips)
        at = f"line {x.loc.line}" if x.loc is not None else ""
        trains = names_text(x.trains) + (" (outside)" if not x.depth else "")
        state = str(x.state) if x.depth else ""
        rows.append(
            [
                "  " * x.depth + x.name + (f" {x.declared}" if x.declared else ""),
                x.optimizer or "-",
                trips if x.depth else "",
                state,
                trains,
                at,
            ]
        )
    return table(("level", "optimizer", "trips", "state", "trains", "at"), rows)


def _flows(plan: PlanDocument, program: Program) -> Table:
    rows = []
    for sources, f in bundle(program.flows):
        names = f"{names_text(sources)} -> {f.target}"
        d = _decision_for(plan.decisions, f)
        if d is not None:
            rows.append([names, f.kind, d.choice, d.reason, *_cost(d), d.runner_up])
        else:
            rows.append([names, f.kind, *_standard(plan, f), "", "", ""])
    return table(("flow", "kind", "choice", "why", "time", "memory", "runner-up"), rows)


def choice_of(plan: PlanDocument, f: Flow) -> tuple[str, str, str]:
    """What was chosen for a flow, why, and what it costs (empty where nothing is known of that)."""
    d = _decision_for(plan.decisions, f)
    if d is None:
        return (*_standard(plan, f), "")
    return d.choice, d.reason, ", ".join(t for t in _cost(d) if t)


def _decision_for(decisions: Sequence[Decision], f: Flow) -> Decision | None:
    """The decision about a flow; one about a level is about its gradient."""
    wanted = {f"{f.source} -> {f.target}", f"{f.kind} {f.source} -> {f.target}"}
    if f.kind == "gradient":
        wanted.add(f.target)
    return next((d for d in decisions if d.subject in wanted), None)


def _standard(plan: PlanDocument, f: Flow) -> tuple[str, str]:
    """Choice and reason where no decision was needed."""
    if f.kind == "stop":
        return "cut", f.why + (f", line {f.loc.line}" if f.loc is not None else "")
    if not f.carries:
        return (
            "nothing",
            "every path is cut" if f.kind != "gradient" else "it is cut before it trains anything",
        )
    if plan.mode == "forward":
        return "forward", "tangents of the meta-parameters through the loop"
    if f.kind == "gradient":
        if plan.mode == "mixed":
            return "mixed", "one forward sweep over the gradient instead of a second reverse one"
        return "reverse", "reverse over reverse"
    if f.kind == "value":
        return "reverse", _VALUE.get(f.why, f"enters the {f.why}")
    return "reverse", "what was trained enters a loss above"


def _remaining(plan: PlanDocument, program: Program | None) -> list[Decision]:
    flows = program.flows if program is not None else ()
    shown = {id(_decision_for(plan.decisions, f)) for f in flows}
    return [d for d in plan.decisions if id(d) not in shown]


def _decisions(decisions: Sequence[Decision]) -> Table:
    rows = [[d.subject, d.choice, d.reason, *_cost(d), d.runner_up] for d in decisions]
    return table(("decision", "choice", "why", "time", "memory", "runner-up"), rows)


def _cost(d: Decision) -> tuple[str, str]:
    return time_text(d.seconds) if d.seconds is not None else "", size_text(d.bytes) if d.bytes is not None else ""
