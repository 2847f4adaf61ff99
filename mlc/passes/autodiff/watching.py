"""What is measured of levels: marks on the loops that train them, and where their derivatives then stand.

The runtime measures how large the derivatives of what a level trains are from step to step
(:class:`mlc.ir.watch.Watch`); the loop that runs the adjoint, or pushes tangents, carries them at other positions.
A level's steps stand in the innermost loop that carries what it trains.  Loops around it that carry it on (epochs)
belong to the same run, unless a level above steps in them: then each of their trips trains anew.  Linear in the
equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mlc.ir.core import Eqn, Loop, Region
from mlc.ir.levels.steps import Origins, Step, find_steps
from mlc.ir.levels.valuegraph import ValueGraph
from mlc.ir.program import Program
from mlc.ir.watch import Watch

__all__ = ["marked", "watched"]


def marked(program: Program) -> Program:
    """The program with marks on the loops of its levels."""
    if len(program.levels) < 2:
        return program
    marks = _Marks(program).found
    return replace(program, region=_put(program.region, marks)) if marks else program


def watched(op: Loop, carried: Sequence[int], kind: str, first: int = 0) -> tuple[Watch, ...]:
    """What is measured of a loop that carries derivatives of another one's carries.

    Args:
        op: That other loop.
        carried: Which of its carries have a derivative.
        kind: Of these derivatives.
        first: Position of the first of them among the carries of the derived loop.
    """
    where = {i: first + k for k, i in enumerate(carried)}
    marks = [w for w in op.watch if w.kind == "state"]
    found = [Watch(w.level, kind, tuple(where[i] for i in w.carries if i in where), w.begins) for w in marks]
    return tuple(w for w in found if w.carries or w.begins)


def _put(region: Region, marks: dict[Eqn, tuple[Watch, ...]]) -> Region:
    eqns = []
    for e in region.eqns:
        if isinstance(e.op, Loop):
            op = replace(e.op, body=_put(e.op.body, marks), watch=marks.get(e, ()))
            e = e if op.body is e.op.body and not op.watch else e.with_(op=op)
        eqns.append(e)
    if all(a is b for a, b in zip(eqns, region.eqns, strict=True)):
        return region
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


@dataclass
class _Trained:
    """What one level trains in one loop, and the loop that its run begins with, going backward."""

    loop: Eqn
    whole: Eqn
    carries: dict[int, None] = field(default_factory=dict)  # of ``loop``
    ends: dict[int, None] = field(default_factory=dict)  # the same, of ``whole``


class _Marks:
    def __init__(self, program: Program) -> None:
        self.graph = ValueGraph(program.region)
        self.origins = Origins(self.graph)
        steps = find_steps(self.graph)
        self.found: dict[Eqn, tuple[Watch, ...]] = {}
        titles = [x.title for x in program.levels]
        for level in program.levels[1:]:
            own = [s for s in steps if s.site.at in level.at]
            above = self._above(own, [s for s in steps if s not in own])
            self._mark(level.title if titles.count(level.title) == 1 else level.name, self._trained(own, above))

    def _above(self, own: Sequence[Step], others: Sequence[Step]) -> set[Eqn]:
        """Loops in which a level above steps: its gradient is taken of what this level trained."""
        seeds = {after: 1 for s in own for _, after, _, _ in s.trained}
        reached = self.graph.spread(seeds, without=("back", "grad")) if others else {}
        stepping = [s for s in others if any(reached.get(v, 0) for v in s.site.losses)]
        return {loop for s in stepping for loop in s.site.loops}

    def _trained(self, own: Sequence[Step], above: set[Eqn]) -> list[_Trained]:
        found: dict[Eqn, _Trained] = {}
        for s in own:
            for _, _, loop, i in s.trained:
                if loop is None:
                    continue
                whole, end = self._whole(loop, i, s.site.loops, above)
                here = found.setdefault(loop, _Trained(loop, whole))
                here.carries[i] = None
                here.ends[end] = None
        return list(found.values())

    def _whole(self, loop: Eqn, i: int, loops: Sequence[Eqn], above: set[Eqn]) -> tuple[Eqn, int]:
        """The outermost loop that carries the same value on, and its position there."""
        around = list(loops[: loops.index(loop)]) if loop in loops else []
        while around and around[-1] not in above:
            entry = self.graph.entry.get(self.origins.kept(loop.args[i]))
            op = around[-1].op
            if entry is None or not isinstance(op, Loop) or entry[0] is not around[-1] or entry[1] >= op.n_carry:
                break
            loop, i = around.pop(), entry[1]
        return loop, i

    def _mark(self, level: str, trained: Sequence[_Trained]) -> None:
        starts = {self.origins.kept(t.whole.args[i]) for t in trained for i in t.ends}
        begins = {t.whole for t in trained if not any(t.whole.outs[i] in starts for i in t.ends)}
        for t in trained:
            self._add(t.loop, Watch(level, "state", tuple(t.carries), t.loop in begins))
        inner = {t.loop for t in trained}
        for whole in begins - inner:
            self._add(whole, Watch(level, "state", (), True))

    def _add(self, loop: Eqn, w: Watch) -> None:
        self.found[loop] = (*self.found.get(loop, ()), w)
