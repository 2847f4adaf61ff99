"""What is alive while a plan runs: predicted bytes after every equation, by what holds them.

The same liveness as :mod:`mlc.passes.memory`, kept for every equation instead of its maximum, with loops unrolled:
carries are freed at their last use, kept values grow trip by trip.  Long loops are thinned; every point that stands
for others is the highest of them, so that no peak is lost.  O(equations + points).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from mlc.ir.core import Alias, Custom, Eqn, Feed, Loop, Pack, Region, Var
from mlc.ir.reuse import reused
from mlc.ir.types import SeqType
from mlc.passes.facts import Stage, Trips, seq_bytes, trips_of
from mlc.passes.memory import resting, root_of

__all__ = ["HOLDERS", "Point", "predicted"]

HOLDERS = ("kept for backward", "loop states", "values", "derivatives", "recomputed")
SAVED, STATES, VALUES, DERIVATIVES, RECOMPUTED = range(len(HOLDERS))
POINTS = 6000
_DERIVED = {"tangent", "backward", "adjoint", "sum"}


@dataclass(frozen=True, slots=True)
class Point:
    """Bytes alive once ``eqn`` has its results and before it frees anything, one number per holder."""

    eqn: Eqn
    live: tuple[int, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.live)


def predicted(stages: Sequence[Stage], stage_graphs: Any, trips: Trips) -> list[list[Point]]:
    """Points of every stage, in the order in which they run; inputs of the call are not counted.

    Args:
        stages: From :func:`mlc.passes.facts.stages_of`.
        stage_graphs: What they come from; tells which inputs of the backward stage the call keeps.
        trips: Trips of loops of unknown length.
    """
    out = [_Walk(trips, stages[0].saved, POINTS).region(stages[0].region, {})]
    elsewhere = resting(stages[0].region)
    for stage in stages[1:]:
        kept = zip(stage.region.inputs, stage_graphs.saved, strict=False)
        own = {v: SAVED for v, (kind, _) in kept if kind == "out" and v not in elsewhere}
        out.append(_Walk(trips, stage.saved, POINTS).region(stage.region, own))
    return out


class _Walk:
    """Liveness over one region; ``own`` are inputs that die inside."""

    def __init__(self, trips: Trips, saved: Iterable[Var], points: int) -> None:
        self.trips = trips
        self.saved = set(saved)
        self.points = points

    def region(self, r: Region, own: dict[Var, int]) -> list[Point]:
        live = _Live(r, own, self.trips)
        out: list[Point] = []
        for i, e in enumerate(r.eqns):
            if isinstance(e.op, Loop):
                out += self.loop(e, e.op, live)
            live.define(e, i, self.holder(e))
            out.append(Point(e, tuple(live.bytes)))
            live.free(e, i)
        return out

    def holder(self, e: Eqn) -> int:
        if any(v in self.saved for v in e.outs):
            return SAVED
        if isinstance(e.op, Loop):
            return STATES
        if e.tag.startswith("recomputed"):
            return RECOMPUTED
        return DERIVATIVES if e.tag in _DERIVED else VALUES

    def loop(self, e: Eqn, op: Loop, live: _Live) -> list[Point]:
        """The body, trip after trip, above what is alive around the loop."""
        trips = trips_of(op, e.inputs, self.trips)
        shown = min(trips, max(2, self.points // 4))
        inner = _Walk(self.trips, (), max(4, self.points // shown))
        first = _thin(inner.region(op.body, {}), inner.points)
        carries = {v: STATES for v in op.body.inputs[: op.n_carry]}
        later = _thin(inner.region(op.body, carries), inner.points) if trips > 1 else first
        sizes = [(self.holder_of(v), *_emission(op, k, v, trips, self.trips)) for k, v in _emissions(op, e)]
        out: list[Point] = []
        for k in range(shown):
            t = k * trips // shown
            base = list(live.bytes)
            for holder, size, free in sizes:
                base[holder] += size * max(t - free, 0)
            out += [Point(p.eqn, tuple(map(sum, zip(base, p.live, strict=True)))) for p in (later if t else first)]
        return out

    def holder_of(self, v: Var) -> int:
        return SAVED if v in self.saved else STATES


class _Live:
    """Bytes alive while a region runs; views share the storage of their base."""

    def __init__(self, r: Region, own: dict[Var, int], trips: Trips) -> None:
        self.trips = trips
        self.bytes = [0] * len(HOLDERS)
        self.last = {v: i for i, e in enumerate(r.eqns) for v in e.inputs}
        self.last.update((v, len(r.eqns)) for v in r.outputs)
        self.reused = reused(r)
        self.owner = {v: v for v in r.inputs}
        self.users: dict[Var, int] = {}
        self.size: dict[Var, tuple[int, int]] = {}
        for v, holder in own.items():
            if v in self.last:
                self.take(v, holder)

    def take(self, v: Var, holder: int, size: int | None = None) -> None:
        size = seq_bytes(v, self.trips) if size is None else size
        self.size[v] = (holder, size)
        self.users[v] = self.users.get(v, 0) + 1
        self.bytes[holder] += size

    def define(self, e: Eqn, i: int, holder: int) -> None:
        over = self.reused.get(i)
        for k, v in enumerate(e.outs):
            shared = _base(e, k) if over is None else over
            root = v if shared is None else self.owner.get(shared, shared)
            self.owner[v] = root
            if root is not v:
                self.users[root] = self.users.get(root, 0) + 1
                if over is not None and root in self.size:
                    self.move(root, holder)
            elif isinstance(e.op, (Feed, Pack)):
                self.users[v] = 1
            elif isinstance(e.op, Loop) and k >= e.op.n_carry:
                self.take(v, holder, self.emitted(e, e.op, k, v))
            else:
                self.take(v, STATES if isinstance(v.type, SeqType) and holder != SAVED else holder)

    def move(self, root: Var, holder: int) -> None:
        """A storage that is written over holds something else now."""
        before, size = self.size[root]
        self.bytes[before] -= size
        self.bytes[holder] += size
        self.size[root] = (holder, size)

    def emitted(self, e: Eqn, op: Loop, k: int, v: Var) -> int:
        """Bytes of what a loop emitted; the first of its states may be a value that is counted elsewhere."""
        trips = trips_of(op, e.inputs, self.trips)
        size, first = _emission(op, k, v, trips, self.trips)
        if first:
            arg = e.args[op.body.inputs.index(_owner(op.body)[op.body.outputs[k]])]
            first = int(self.owner.get(arg, arg) not in self.size)
        return size * (trips - first)

    def free(self, e: Eqn, i: int) -> None:
        for v in dict.fromkeys([*e.inputs, *e.outs]):
            if self.last.get(v, i) == i and (root := self.owner[v]) in self.users:
                self.users[root] -= 1
                if not self.users[root] and root in self.size:
                    holder, size = self.size.pop(root)
                    self.bytes[holder] -= size


def _emissions(op: Loop, e: Eqn) -> list[tuple[int, Var]]:
    return [(op.n_carry + j, v) for j, v in enumerate(e.outs[op.n_carry :])]


def _emission(op: Loop, k: int, v: Var, trips: int, count: Trips) -> tuple[int, int]:
    """Bytes that each trip adds to an emitted sequence, and how many of the first trips add none.

    A carry that is emitted as it came in was there before the loop; what is no value of the body costs nothing.
    """
    owner, inputs = _owner(op.body), op.body.inputs
    root = owner[op.body.outputs[k]]
    again = any(owner[v] is root for v in op.body.outputs[op.n_carry : k])
    elsewhere = k - op.n_carry in op.host or op.body.outputs[k] in resting(op.body)
    if again or elsewhere or (root in inputs and root not in inputs[: op.n_carry]):
        return 0, 0
    return seq_bytes(v, count) // trips, int(root in inputs)


@lru_cache(maxsize=256)
def _owner(r: Region) -> dict[Var, Var]:
    """The value that owns the storage of each value of a region."""
    owner = {v: v for v in r.inputs}
    for e in r.eqns:
        for k, v in enumerate(e.outs):
            shared = _base(e, k)
            owner[v] = v if shared is None else owner.get(shared, shared)
    return owner


def _base(e: Eqn, k: int) -> Var | None:
    if isinstance(e.op, Custom):
        return e.args[e.op.n_in + k]  # type: ignore[no-any-return]
    if isinstance(e.op, Alias):
        return e.args[k] if k < len(e.args) else None
    return root_of(e)


def _thin(points: list[Point], most: int) -> list[Point]:
    """At most ``most`` points, each the highest of those that it stands for."""
    n = len(points)
    if n <= most:
        return points
    cuts = [k * n // most for k in range(most + 1)]
    return [max(points[a:b], key=lambda p: p.total) for a, b in pairwise(cuts)]
