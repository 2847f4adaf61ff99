"""Steps: which gradients train something, what they train, and where the update leads.

A gradient is a step when the next value of what it was taken by depends on its result: the next carry of a
loop, or, in straight code, a value made from both by operations that keep the shape (``w - lr * g``). The
gradient of a penalty is not: its result only enters another gradient's loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlc.ir.core import Alias, Eqn, Grad, Index, Loop, Stop, Var, aten
from mlc.ir.levels.valuegraph import GradSite, ValueGraph
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType

__all__ = ["Origins", "Step", "find_steps"]

_SAME = {aten(n) for n in ("clone", "detach", "alias", "view", "_unsafe_view", "_to_copy", "lift_fresh_copy")}
_SUMS = {aten("add", "Tensor"), aten("sub", "Tensor"), aten("addcdiv"), aten("addcmul")}
_NO_GRAD = ("back", "grad")


@dataclass(eq=False)
class Step:
    """A gradient that trains something.

    Attributes:
        site: The gradient.
        bit: Its bit in ``zone`` masks.
        trained: What it trains: ``(value it is taken by, next value, loop that carries it or None,
            position)``.
        zone: Values between the gradient and the next values: the update.
    """

    site: GradSite
    bit: int
    trained: list[tuple[Var, Var, Eqn | None, int]]
    zone: set[Var] = field(default_factory=set)


def find_steps(graph: ValueGraph) -> list[Step]:
    """The steps of a program, in order."""
    reached = graph.spread({v: 1 << k for k, s in enumerate(graph.grads) for v in s.eqn.outs}, without=_NO_GRAD)
    origins = Origins(graph)
    steps: list[Step] = []
    for k, site in enumerate(graph.grads):
        finder = _Next(graph, reached, 1 << k, origins)
        trained = [(v, *found) for v in site.wrt if (found := finder.next_of(v, site)) is not None]
        if trained:
            steps.append(Step(site, 1 << k, trained))
    steps = sorted([*steps, *_peeled(graph, steps, reached, origins)], key=lambda s: s.bit)
    goals: dict[Var, int] = {}
    for s in steps:
        for _, after, _, _ in s.trained:
            goals[after] = goals.get(after, 0) | s.bit
    leading = graph.spread(goals, without=_NO_GRAD, backward=True)
    for v, m in reached.items():
        common = m & leading.get(v, 0)
        if common:
            for s in steps:
                if common & s.bit:
                    s.zone.add(v)
    return steps


def _peeled(graph: ValueGraph, steps: list[Step], reached: dict[Var, int], origins: Origins) -> list[Step]:
    """First steps that stand before their loop and begin at a constant: the same line, and the loop starts there."""
    out = []
    known = {s.bit for s in steps}
    for k, site in enumerate(graph.grads):
        for s in steps if 1 << k not in known else ():
            starts = [(v, origins.kept(loop.args[i])) for v, _, loop, i in s.trained if loop is not None]
            found = [
                (w, before, None, 0) for (v, before), w in zip(starts, site.wrt, strict=False)
                if _shape(w) == _shape(v) and reached.get(before, 0) >> k & 1
            ]  # fmt: skip
            if found and str(s.site.eqn.loc) == str(site.eqn.loc) and s.site.loops[:-1] == site.loops:
                out.append(Step(site, 1 << k, list(found)))
                break
    return out


def _shape(v: Var) -> tuple[int, ...] | None:
    return v.type.shape if isinstance(v.type, TensorType) else None


class _Next:
    """Finds the next value of what one gradient was taken by."""

    def __init__(self, graph: ValueGraph, reached: dict[Var, int], bit: int, origins: Origins) -> None:
        self.graph = graph
        self.reached = reached
        self.bit = bit
        self.origins = origins

    def depends(self, v: Var) -> bool:
        return bool(self.reached.get(v, 0) & self.bit)

    def next_of(self, v: Var, site: GradSite) -> tuple[Var, Eqn | None, int] | None:
        """``(next value, loop that carries it or None, position)``; None when there is none."""
        start = v
        while True:
            at = self.graph.entry.get(v)
            if at is not None:
                loop, i = at
                assert isinstance(loop.op, Loop)
                if i < loop.op.n_carry and self.depends(loop.op.body.outputs[i]):
                    return loop.op.body.outputs[i], loop, i
                v = loop.args[i]
                continue
            met = self.meeting(v)
            if met is not None:
                return self.carried(v, met) or (met, None, 0)
            e = self.graph.producer.get(v)
            if e is None or not _keeps(e):
                break
            v = e.args[0]
        return self.by_name(start, site)

    def carried(self, v: Var, met: Var) -> tuple[Var, Eqn, int] | None:
        """The carry that ``v`` and its next value are, when nothing but stops stands between."""
        at = self.graph.entry.get(self.origins.kept(v))
        if at is None or not isinstance(at[0].op, Loop) or at[1] >= at[0].op.n_carry:
            return None
        after = at[0].op.body.outputs[at[1]]
        return (after, *at) if self.origins.kept(after) is met else None

    def meeting(self, v: Var) -> Var | None:
        """In straight code: the value made from ``v`` and its gradient by operations that keep the shape."""
        chain, todo, met = {v}, [v], list[tuple[Eqn, bool]]()
        while todo:
            x = todo.pop()
            for e in self.graph.users[x]:
                if len(e.outs) != 1 or _shape(e.outs[0]) != _shape(v):
                    continue
                out = e.outs[0]
                if self.depends(out):
                    met.append((e, x is v or _keeps(e)))
                elif out not in chain:
                    chain.add(out)
                    todo.append(out)
        met.sort(key=lambda m: self.graph.position[m[0].outs[0]])
        updates = [e for e, _ in met if e.origin is Origin.UPDATE]
        if updates:
            return updates[-1].outs[0]
        plain = [e for e, own in met if own and e.op in _SUMS and e.args[0] in chain]
        return plain[0].outs[0] if plain else None

    def by_name(self, v: Var, site: GradSite) -> tuple[Var, Eqn | None, int] | None:
        """A carry of the same origin (a parameter that was put back after a step aside)."""
        root = self.origins.root(v)
        for loop in reversed(site.loops):
            op = loop.op
            assert isinstance(op, Loop)
            for i in range(op.n_carry):
                if self.depends(op.body.outputs[i]) and self.origins.root(op.body.inputs[i]) == root:
                    return op.body.outputs[i], loop, i
        return None


def _keeps(e: Eqn) -> bool:
    return isinstance(e.op, (Alias, Stop)) or e.op in _SAME


class Origins:
    """Where a value comes from: the input, or the first value, that it is a later version of.

    A copy made to be trained (``mlc.clone``) has the name of its model with a prime.
    """

    def __init__(self, graph: ValueGraph, names: dict[Var, str] | None = None) -> None:
        self._graph = graph
        self._names = names or {}
        self._known: dict[Var, tuple[Var, int]] = {}

    def root(self, v: Var) -> tuple[Var, int]:
        """The first version of ``v``, and how often it was copied to be trained since."""
        path: list[tuple[Var, int]] = []
        while v not in self._known:
            before, copies = self._before(v)
            if before is None:
                self._known[v] = (v, 0)
                break
            path.append((v, copies))
            v = before
        root, total = self._known[v]
        for x, copies in reversed(path):
            total += copies
            self._known[x] = (root, total)
        return root, total

    def of(self, v: Var) -> str:
        """The name of ``v`` as a reader would say it."""
        root, copies = self.root(v)
        return self._names.get(root, self._made(root)) + "'" * copies

    def kept(self, v: Var) -> Var:
        """The value that ``v`` is without the stops and copies behind it."""
        e = self._graph.producer.get(v)
        while e is not None and _keeps(e):
            v = e.args[e.outs.index(v)] if isinstance(e.op, (Alias, Stop)) else e.args[0]
            e = self._graph.producer.get(v)
        return v

    def _before(self, v: Var) -> tuple[Var | None, int]:
        at = self._graph.entry.get(v)
        if at is not None:
            return at[0].args[at[1]], 0
        e = self._graph.producer.get(v)
        if e is None or not e.inputs or e.impure or isinstance(e.op, Grad):
            return None, 0
        if isinstance(e.op, Loop):
            i = e.outs.index(v)
            return (e.args[i] if i < e.op.n_carry else e.op.body.outputs[i]), 0
        if isinstance(e.op, Index) or _keeps(e):
            return e.inputs[0], int(isinstance(e.op, Alias) and e.origin is Origin.CLONE)
        return next((x for x in e.inputs if _shape(x) == _shape(v)), None), 0

    def _made(self, v: Var) -> str:
        e = self._graph.producer.get(v)
        return "fast weights" if e is None or e.loc is None else f"made at line {e.loc.line}"
