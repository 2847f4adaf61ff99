"""The longer half of an explanation: what each stage costs, where its time and memory go; and paths.

Paths are shown in every explanation: which way each meta-parameter comes to the result, how the levels on it answer,
and, where stages are known, what share of the work they take.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.levels.paths import paths_of, text_of, tree
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Flow, Program
from mlc.ir.types import Loc
from mlc.passes.cost.facts import Stage, facts_of, flops_of, stages_of, traffic_of, work
from mlc.passes.cost.timeline import HOLDERS, predicted
from mlc.passes.planning.plan import PlanDocument
from mlc.units import size_text
from mlc.view.tables import table

__all__ = ["count_text", "details", "executions", "path_lines", "paths_data", "shares"]

LINES = 8  # of the user's code, the most expensive ones


def details(graphs: Stages, program: Program) -> list[object]:
    """Tables and lines to print after the explanation."""
    stages = stages_of(graphs)
    runs = [list(executions(s.region)) for s in stages]
    live = predicted(stages, graphs)
    costs = [_stage(*x) for x in zip(stages, runs, live, strict=True)]
    out: list[object] = [table(("stage", "ops", "runs", "flops", "moved", "peak", "at the peak"), costs)]
    out.append(table(("line", "code", "share", "flops"), _lines(runs)))
    fates = [_fates(s) for s in stages]
    out.append(table(("stage", "freed", "kept", "for backward", "recomputed", "shared"), fates))
    return [*out, *_cuts(program)]


def executions(r: Region, times: int = 1, locs: dict[Var, Loc] | None = None) -> Any:
    """Every equation with how often it runs and its place: ``(equation, times, place)``; bodies inside their loops."""
    locs = {} if locs is None else locs
    for e in r.eqns:
        loc = e.loc or next((locs[v] for v in reversed(e.inputs) if v in locs), None)
        if loc is not None:
            locs.update((v, loc) for v in e.outs)
        if isinstance(e.op, Loop):
            yield from executions(e.op.body, times * e.op.count, locs)
        else:
            yield e, times, loc


def _stage(stage: Stage, runs: list[tuple[Eqn, int, Loc | None]], points: Any) -> list[str]:
    peak = max(points, key=lambda p: p.total, default=None)
    held = sorted(zip(peak.live, HOLDERS, strict=True), reverse=True) if peak is not None else []
    flops = sum(flops_of(e) * n for e, n, _ in runs)
    moved = sum(traffic_of(e) * n for e, n, _ in runs)
    return [
        stage.name, str(len(runs)), str(sum(n for _, n, _ in runs)), count_text(flops), size_text(moved),
        size_text(peak.total) if peak is not None else "",
        ", ".join(f"{name} {size_text(b)}" for b, name in held if b),
    ]  # fmt: skip


def _lines(runs: list[list[tuple[Eqn, int, Loc | None]]]) -> list[list[str]]:
    """The lines of the user's code that most work comes from, derivatives included."""
    spent: dict[Loc, float] = defaultdict(float)
    flops: dict[Loc, int] = defaultdict(int)
    whole = 0.0
    for e, n, loc in (x for stage in runs for x in stage):
        own = flops_of(e)
        cost = work(e, own) * n
        whole += cost
        if loc is not None:
            spent[loc] += cost
            flops[loc] += own * n
    most = sorted(spent, key=lambda x: -spent[x])[:LINES]
    return [[str(x.line), x.source()[:60], f"{100 * spent[x] / (whole or 1):.1f}%", count_text(flops[x])] for x in most]


def _fates(stage: Stage) -> list[str]:
    """How many operators have which fate."""
    kinds: dict[str, int] = defaultdict(int)
    for fact in facts_of(stage).values():
        kinds[fact.fate.kind] += 1
    return [stage.name, *[str(kinds[k]) for k in ("freed", "kept", "saved", "recomputed", "view")]]


def _cuts(program: Program) -> list[object]:
    return list(dict.fromkeys(f"cut: {c}" for c in program.graph.cuts()))


def count_text(n: float) -> str:
    """A number with a unit of thousands: ``33.6 M``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


# ---- paths


def path_lines(plan: PlanDocument, program: Program, stages: Stages | None) -> list[object]:
    """Lines for an explanation; none where no path leads to the result."""
    spent = shares(stages) if stages is not None else {}
    responses = {name: str(r) for name, r in plan.modes.responses.items()}
    titles = {x.name: x.title for x in program.levels}
    trips = {x.name: "any number of steps" if x.trips is None else f"{x.trips} steps" for x in program.levels}

    def told(f: Flow) -> str:
        if f.kind != "response":
            return ""
        title = titles[f.source]
        share = f"{100 * spent[title]:.0f}% of the work" if title in spent else ""
        return ", ".join(x for x in (responses.get(f.source, "Unroll()"), trips.get(f.source, ""), share) if x)

    off = {p for p in paths_of(program) if text_of(p) in plan.off}
    lines = tree(program, off=off, told=told)
    return ["paths", *(f"  {line}" for line in lines)] if lines else []


def paths_data(plan: PlanDocument, program: Program) -> list[dict[str, object]]:
    """The same as data, for JSON."""
    return [{"path": list(p), "on": text_of(p) not in plan.off} for p in paths_of(program)]


def shares(stages: Stages) -> dict[str, float]:
    """Which share of a call's predicted work is the derivatives of each level's steps, by title: adjoints or tangents.

    Forward mode runs values and tangents in one loop, which is counted whole.
    """
    regions = [stages.forward, *([stages.backward] if stages.backward is not None else [])]
    found: dict[str, float] = {}
    whole = sum(_work(r, 1, found) for r in regions)
    return {name: x / whole for name, x in found.items()} if whole else {}


def _work(region: Region, times: int, found: dict[str, float]) -> float:
    total = 0.0
    for e in region.eqns:
        if not isinstance(e.op, Loop):
            total += times * work(e, flops_of(e))
            continue
        own = _work(e.op.body, times * e.op.count, found)
        for w in e.op.watch:
            if w.kind in ("adjoint", "tangent") and w.carries:
                found[w.level] = found.get(w.level, 0.0) + own
        total += own
    return total
