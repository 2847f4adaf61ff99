"""Levels and flows of a program: what trains what, what enters where, which edges carry a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlc.ir.core import Eqn, Grad, Loop, Region, Stop, Var
from mlc.ir.program import Flow, Level, Program
from mlc.ir.types import Loc

__all__ = ["find_levels"]


@dataclass
class _Found:
    level: Level
    eqn: Eqn
    region: Region
    inherited: dict[Var, set[str]] = field(default_factory=dict)


def find_levels(program: Program, steps: Sequence[tuple[str, Loc | None]]) -> tuple[tuple[Level, ...], tuple[Flow, ...]]:
    """Levels by nesting of gradients, and the flows between them.

    Args:
        program: A rolled program.
        steps: Class name and place of every optimizer step recorded.
    """
    region = program.region
    names = {v: {x.name} for v, x in zip(region.inputs, program.inputs, strict=True)}
    metas = {program.inputs[i].name for i in program.metas}
    top = Level("L0", 0, "", 1, tuple(sorted(metas)), (), 0, program.loc)
    levels, flows = [top], []
    found: list[tuple[Eqn, Loop | None, int, dict[Var, set[str]]]] = []
    _search(region, None, 1, names, found)
    lines = {str(loc): name for name, loc in steps if loc is not None}
    kind = next(iter(lines.values()), "manual") if len(set(lines.values())) == 1 else ("several" if lines else "manual")
    for e, loop, depth, known in found:
        assert isinstance(e.op, Grad)
        n = e.op.n_loss
        wrt = e.args[n : n + e.op.n_wrt]
        trained = tuple(sorted({x for v in wrt for x in known.get(v, set()) if x not in metas})) or ("fast weights",)
        reads = tuple(sorted({x for v in e.args[:n] for x in known.get(v, set()) if x in metas}))
        state = max(0, (loop.n_carry if loop else 0) - len(wrt))
        name = f"L{len(levels)}"
        levels.append(Level(name, depth, kind, loop.trips if loop else 1, trained, reads, state, e.loc))
        flows.append(Flow("gradient", name, name, loc=e.loc))
        flows += [Flow("value", m, name) for m in reads]
        flows.append(Flow("response", name, "L0"))
    for s in region.walk():
        if isinstance(s.op, Stop):
            flows.append(Flow("stop", "?", "L0", False, s.loc, "detach() or no_grad()"))
    return tuple(levels), tuple(flows)


def _search(region: Region, loop: Loop | None, depth: int, known: dict[Var, set[str]],
            found: list[tuple[Eqn, Loop | None, int, dict[Var, set[str]]]]) -> None:  # fmt: skip
    known = dict(known)
    for e in region.eqns:
        names: set[str] = set()
        for v in e.inputs:
            names |= known.get(v, set())
        if isinstance(e.op, Grad):
            found.append((e, loop, depth, known))
        if isinstance(e.op, Loop):
            inner = {b: known.get(a, set()) for a, b in zip(e.args, e.op.body.inputs, strict=True)}
            _search(e.op.body, e.op, depth + 1 if loop is not None else depth, inner, found)
        for v in e.outs:
            known[v] = names
