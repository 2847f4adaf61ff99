"""The paths of a plan: which way each meta-parameter comes to the result, how levels on it answer, what they cost."""

from __future__ import annotations

from mlc.ir.core import Loop, Region
from mlc.ir.levels.paths import paths_of, text_of, tree
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Flow, Program
from mlc.passes.cost.facts import flops_of, work
from mlc.passes.planning.plan import PlanDocument

__all__ = ["path_lines", "paths_data", "shares"]


def path_lines(plan: PlanDocument, program: Program, stages: Stages | None) -> list[object]:
    """Lines for an explanation; none where no path leads to the result."""
    spent = shares(stages) if stages is not None else {}
    responses = {name: str(r) for name, r in plan.modes.responses.items()}
    trips = {x.name: "any number of steps" if x.trips is None else f"{x.trips} steps" for x in program.levels}

    def told(f: Flow) -> str:
        if f.kind != "response":
            return ""
        share = f"{100 * spent[f.source]:.0f}% of the work" if f.source in spent else ""
        return ", ".join(x for x in (responses.get(f.source, "Unroll()"), trips.get(f.source, ""), share) if x)

    off = {p for p in paths_of(program) if text_of(p) in plan.off}
    lines = tree(program, off=off, told=told)
    return ["paths", *(f"  {line}" for line in lines)] if lines else []


def paths_data(plan: PlanDocument, program: Program) -> list[dict[str, object]]:
    """The same as data, for JSON."""
    return [{"path": list(p), "on": text_of(p) not in plan.off} for p in paths_of(program)]


def shares(stages: Stages) -> dict[str, float]:
    """Which share of a call's predicted work is the derivatives of each level's steps: their adjoints or tangents.

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
