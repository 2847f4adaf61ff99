"""What the page shows of a program or plan, as plain data: scenes, memory timeline, stage bars, the curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlc.errors import VerifyError
from mlc.ir.core import Eqn, Region
from mlc.ir.program import Program
from mlc.ir.types import Loc
from mlc.passes.cost.facts import Stage, facts_of, stages_of
from mlc.passes.cost.timeline import HOLDERS, predicted
from mlc.units import size_text, time_text
from mlc.view.diagram import Box, diagram_of
from mlc.view.page.scene import Scene, Table
from mlc.view.plan import Plan, stages_for

__all__ = ["Measured", "content"]


@dataclass(frozen=True)
class Measured:
    """What a run measured, for the page.

    Attributes:
        seconds: Seconds per stage.
        memory: ``(stage, seconds since its start, bytes alive)``.
    """

    seconds: dict[str, float]
    memory: Sequence[tuple[str, float, int]] = field(default=())


def content(program: Program, plan: Plan | None = None, measured: Measured | None = None,
            sweep: Sequence[Plan] = ()) -> dict[str, Any]:  # fmt: skip
    """Everything that the page shows.

    Args:
        program: The program.
        plan: Its plan, for stages, memory and fates.
        measured: What a run measured, if there was one.
        sweep: Plans of the same program under other budgets, for the time-memory curve.
    """
    tables = {"strings": Table(), "locs": Table(), "fates": Table()}
    scenes = [_levels(program, plan, tables)]
    out: dict[str, Any] = {"title": program.name, "facts": _headline(plan), "holders": HOLDERS}
    if plan is not None:
        graphs = stages_for(program, plan)
        stages = stages_of(graphs)
        made = [_stage(s, program, graphs, tables) for s in stages]
        scenes += made
        out["memory"] = _memory(stages, graphs, made, program)
        out["budget"], out["peak"] = plan.memory, plan.peak_bytes
    if measured is not None:
        out["measured"] = {"seconds": measured.seconds, "memory": list(measured.memory)}
    out["curve"] = _curve(plan, sweep)
    out["scenes"] = [s.data() for s in scenes]
    return out | {k: t.rows for k, t in tables.items()}


def _headline(plan: Plan | None) -> list[tuple[str, str]]:
    if plan is None:
        return []
    out = [("mode", plan.mode), ("backend", plan.backend)]
    if plan.seconds:
        out.append(("predicted time", time_text(plan.seconds)))
    if plan.peak_bytes:
        out.append(("predicted peak", size_text(plan.peak_bytes)))
    if plan.memory is not None:
        out.append(("budget", size_text(plan.memory)))
    return out


def _curve(plan: Plan | None, sweep: Sequence[Plan]) -> list[dict[str, Any]]:
    """Points by their peak; this plan is among them."""
    if not sweep:
        return []
    same = next((p for p in sweep if plan is not None and _decided(p) == _decided(plan)), None)
    every = sweep if plan is None or same is not None else [*sweep, plan]
    return [
        {"seconds": p.seconds, "bytes": p.peak_bytes, "budget": p.memory, "chosen": p is same or p is plan}
        for p in sorted(every, key=lambda p: p.peak_bytes)
    ]


def _decided(p: Plan) -> tuple[object, ...]:
    return p.mode, p.flows, p.backend, p.levers


# ---- stages


def _stage(stage: Stage, program: Program, graphs: Any, tables: dict[str, Table]) -> Scene:
    scene = Scene(stage.name, f"{stage.name} stage", tables, facts_of(stage))
    names = [x.name for x in program.inputs]
    if stage.name == "forward":
        scene.name(zip(stage.region.inputs, names, strict=True))
    else:
        given = [names[i] if kind == "in" else f"kept {i}" for kind, i in graphs.saved]
        scene.name(zip(stage.region.inputs, given, strict=False))
    scene.add(stage.region, scene.group(-1, f"{stage.name} stage", "stage"))
    return scene


def _memory(stages: Sequence[Stage], graphs: Any, scenes: Sequence[Scene], program: Program) -> list[dict[str, Any]]:
    out = []
    for stage, scene, points in zip(stages, scenes, predicted(stages, graphs), strict=True):
        live = [[p.live[k] for p in points] for k in range(len(HOLDERS))]
        nodes = [-1 if p.eqn is None else scene.node_of.get(p.eqn, -1) for p in points]
        out.append({"stage": stage.name, "nodes": nodes, "live": live})
    return out


# ---- levels


def _levels(program: Program, plan: Plan | None, tables: dict[str, Table]) -> Scene:
    """The level graph, every level with the graphs of its loss and its update inside."""
    diagram = diagram_of(program, plan, len(program.levels))
    whole = Stage("forward", program.region, frozenset(), frozenset())
    placed: dict[Eqn, tuple[int, tuple[str, ...]]] = {}
    scene = Scene("levels", "levels", tables, facts_of(whole), placed.get)
    at: dict[str, int] = {}
    _boxes(diagram.top, -1, scene, at)
    for level in program.levels:
        for row, region in _parts(program, level.name):
            for e in region.walk():
                placed.setdefault(e, (at[f"{level.name}_{row}"], _modules(e.loc)))
    _rest(program, scene, at, placed)
    scene.name(zip(program.region.inputs, (x.name for x in program.inputs), strict=True))
    scene.add(program.region, at["L0"])
    scene.flows = [[at[a.source], at[a.target], a.kind, a.label, a.dashed, a.detail] for a in diagram.arrows]
    return scene


def _boxes(box: Box, parent: int, scene: Scene, at: dict[str, int]) -> None:
    at[box.key] = scene.group(parent, box.title, box.kind, box.note)
    for inner in box.inside:
        _boxes(inner, at[box.key], scene, at)


def _parts(program: Program, name: str) -> list[tuple[str, Region]]:
    view = program.level(name)
    if not view.level.at:
        return []
    try:
        return [("loss", view.loss_region), ("params", view.update_region)]
    except VerifyError:
        return []


def _rest(program: Program, scene: Scene, at: dict[str, int], placed: dict[Eqn, Any]) -> None:
    """What belongs to no loss and no update stands in the level whose loop it is in, or with the result."""
    owner = {where[:-1]: x.name for x in reversed(program.levels) for where in x.at}

    def walk(region: Region, path: tuple[int, ...], level: str) -> None:
        group = (
            scene.group(at[level], "around", "part", "in the loop beside loss and update") if path else at["L0_loss"]
        )
        for i, e in enumerate(region.eqns):
            if hasattr(e.op, "body"):
                inner = owner.get((*path, i), level)
                placed[e] = (at[inner], ())
                walk(e.op.body, (*path, i), inner)
            elif e not in placed:
                placed[e] = (group, _modules(e.loc))

    walk(program.region, (), "L0")


def _modules(loc: Loc | None) -> tuple[str, ...]:
    return tuple(loc.module.split(".")) if loc is not None and loc.module else ()
