"""What is alive while a plan runs: predicted bytes after every equation, by what holds them.

The books are those of :class:`mlc.passes.memory.Footprint`, from which the peak of a plan comes; here they are kept
for every equation instead of their maximum, with loops unrolled: what a loop keeps grows trip by trip, and states that
are held sparsely come and go as the runtime's schedule says.  Long loops are thinned; every point that stands for
others is the highest of them, so that no peak is lost.  O(equations + points).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.slots import Slots
from mlc.ir.types import SeqType, nbytes
from mlc.passes.facts import Stage
from mlc.passes.memory import Book, Footprint, LoopMemory, freed_carries, held_at, own_bytes, roots, workspace

__all__ = ["HOLDERS", "Point", "predicted"]

HOLDERS = ("kept for backward", "loop states", "values", "derivatives", "recomputed", "results")
SAVED, STATES, VALUES, DERIVATIVES, RECOMPUTED, RESULTS = range(len(HOLDERS))
POINTS = 6000
_DERIVED = {"tangent", "backward", "adjoint", "sum"}
_Live = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """Bytes alive once ``eqn`` has its results and before it frees anything, one number per holder.

    ``depth``: the point stands behind a whole trip of the loop ``eqn`` (nesting depth from 1) or, 0, behind the stage.
    """

    eqn: Eqn | None
    live: _Live
    depth: int | None = None

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.live)


def predicted(stages: Sequence[Stage], stage_graphs: Any, handed: Collection[int] = ()) -> list[list[Point]]:
    """Points of every stage, in the order in which they run; inputs of the call are not counted.

    Args:
        stages: From :func:`mlc.passes.facts.stages_of`.
        stage_graphs: What they come from; tells which inputs of the backward stage the call keeps.
        handed: Results that the user holds from then on (:attr:`mlc.ir.program.Program.handed`).
    """
    footprint, forward = Footprint(), stages[0].region
    walk = _Walk(footprint, {}, stages[0].saved, POINTS)
    out = [walk.region(forward, {})]
    for stage in stages[1:]:
        own, results = footprint.hand_over(footprint.region(forward).book, stage_graphs, handed)
        walk.hand_over(forward.outputs, stage_graphs.saved, stage.region.inputs)
        points = replace(walk, saved=stage.saved).region(stage.region, dict.fromkeys(own, SAVED))
        out.append(_above([results if k == RESULTS else 0 for k in range(len(HOLDERS))], points))
    return out


@dataclass(frozen=True)
class _Sparse:
    """States of one run of a loop, of which few sets are held.

    Attributes:
        op: The loop.
        slots: Which sets are held now.
        size: Bytes of a set that is made again.
        own: Bytes of a set that the loop made: less what it emits besides.
        end: Sets that were held when the loop ended: those that the book counts.
    """

    op: Loop
    slots: Slots
    size: int
    own: int
    end: frozenset[int]

    def more(self) -> int:
        """Bytes of the sets held now beyond those at the end of the loop; the first set is an argument of it."""
        now = [self.own if t in self.end else self.size for t in self.slots.held if t]
        return sum(now) - self.own * (len(self.end) - 1)


@dataclass(frozen=True)
class _Walk:
    """Memory over one region, equation by equation.

    Attributes:
        footprint: The books of loops.
        sparse: Where rebuilt sequences come from.
        saved: Values that are kept for the next stage.
        points: About how many to give.
        depth: How many loops are around.
    """

    footprint: Footprint
    sparse: dict[Var, _Sparse]
    saved: Iterable[Var]
    points: int
    depth: int = 0

    def region(self, r: Region, own: Mapping[Var, int]) -> list[Point]:
        """Points of a region; ``own`` are inputs that die inside, with their holders."""
        book = _Held(r)
        for v, book.holder in own.items():
            book.own(v, self.footprint.sizes.get(v, nbytes(v.type)), self.footprint.same.get(v, v))
        out: list[Point] = []
        for i, e in enumerate(r.eqns):
            book.holder = self.holder(e)
            if isinstance(e.op, Loop):
                out += self.loop(e, e.op, i, book)
                self.results(e, book, i)
                out.append(Point(e, tuple(book.bytes)))
            else:
                book.enter(e, i, own_bytes(e))
                live = list(book.bytes)
                live[book.holder] += workspace(e)
                out.append(Point(e, tuple(live)))
            book.leave(e, i)
        return [*out, Point(None, tuple(book.bytes), self.depth)]

    def hand_over(self, outputs: Sequence[Var], saved: Sequence[tuple[str, int]], inputs: Sequence[Var]) -> None:
        """Where rebuilt sequences come from, as the inputs of the next stage."""
        for v, (kind, at) in zip(inputs, saved, strict=False):
            if kind == "out" and outputs[at] in self.sparse:
                self.sparse[v] = self.sparse[outputs[at]]

    def holder(self, e: Eqn) -> int:
        if any(v in self.saved for v in e.outs):
            return SAVED
        if isinstance(e.op, Loop):
            return STATES
        if e.tag.startswith("recomputed"):
            return RECOMPUTED
        return DERIVATIVES if e.tag in _DERIVED else VALUES

    def results(self, e: Eqn, book: _Held, i: int) -> None:
        """Enter the results of a loop; of its sequences only those that the next stage reads are kept for it."""
        book.enter_loop(e, i, self.footprint.loop(e))
        for v in e.outs:
            if v in book.held and isinstance(v.type, SeqType):
                book.move(v, self.keeper(v))

    def keeper(self, v: Var) -> int:
        return SAVED if v in self.saved else STATES

    # ---- loops

    def loop(self, e: Eqn, op: Loop, i: int, book: _Held) -> list[Point]:
        """The body, trip after trip, above what is alive around the loop."""
        memory, ins, n = self.footprint.loop(e), op.body.inputs, op.count
        base = list(book.bytes)
        freed = dict(freed_carries(book, e, i, memory))
        for a, size in freed.items():
            base[book.held[book.owner[a]]] -= size
        shared: set[Var] = set()
        first: dict[Var, int] = {}
        for v, a in zip(ins[: op.n_carry], e.args, strict=False):
            if a in freed and a not in shared:
                first[v] = book.held[book.owner[a]]
                shared.add(a)  # another carry that begins with it has nothing of its own yet
        carries = zip(ins, memory.results[: op.n_carry], strict=False)
        later = {v: STATES for v, own in carries if own and v not in memory.states}
        kept = self.begun(e, op, memory)
        shown = min(n, max(2, self.points // 6))
        body = _Body(replace(self, saved=(), points=max(3, self.points // shown - 2), depth=self.depth + 1), op.body)
        wanted = {0, *(k * n // shown - 1 for k in range(1, shown + 1))}  # the last one, where most is kept
        out: list[Point] = []
        for t in range(n):
            if kept is not None:
                kept.slots.offer(t)
            live, fresh, replayed = self.replayed(e, op, t, list(base), book)
            if t not in wanted:
                continue
            out += replayed
            own = (later if t else first) | fresh
            if kept is not None:
                live[self.keeper_of(e, op, memory)] += (len(kept.slots.held) - 1) * kept.own
                own = {v: h for v, h in own.items() if not (v in memory.rebuilt and t in kept.slots.held)}
            for holder, size in self.grown(e, op, memory):
                live[holder] += t * size
            out += _above(live, body.points(own))
        return out

    def begun(self, e: Eqn, op: Loop, memory: LoopMemory) -> _Sparse | None:
        """The states of a loop that holds them sparsely, before its first trip."""
        if op.replay is None:
            return None
        root, body = roots(op.replay.body), op.replay.body
        read = body.inputs[len(op.replay.carries) :]  # what a replay hands on of these is held already
        sets = sum(nbytes(v.type) for v in {root.get(v, v) for v in body.outputs} if v not in read)
        end = frozenset(held_at(op.count, op.replay.slots))
        made = _Sparse(op, Slots(op.replay.slots), sets, memory.sets, end)
        self.sparse.update((out, made) for out, v in _emissions(e, op) if v in memory.rebuilt)
        return made

    def keeper_of(self, e: Eqn, op: Loop, memory: LoopMemory) -> int:
        """What the states of a loop are held for."""
        return next((self.keeper(out) for out, v in _emissions(e, op) if v in memory.rebuilt), STATES)

    def grown(self, e: Eqn, op: Loop, memory: LoopMemory) -> list[tuple[int, int]]:
        """What every trip adds: holder and bytes of each emission."""
        first = {v: self.keeper(out) for out, v in reversed(_emissions(e, op))}
        return [(first[v], size) for v, size in memory.emitted.items() if size]

    def replayed(self, e: Eqn, op: Loop, t: int, live: list[int], book: _Held
                 ) -> tuple[list[int], dict[Var, int], list[Point]]:  # fmt: skip
        """What reading rebuilt states at a trip leaves alive, which of them the body owns, and the replay's peak."""
        fresh: dict[Var, int] = {}
        points: list[Point] = []
        done: list[_Sparse] = []
        rebuilt = [(v, a) for v, a in zip(op.body.inputs, e.args, strict=True) if a in self.sparse]
        for v, a in rebuilt:
            sparse = self.sparse[a]
            if sparse not in done:
                done.append(sparse)
                at = op.count - 1 - t if op.reverse else t
                sparse.slots.drop_after(at)
                way = list(sparse.slots.way(at))
                live[book.held.get(book.owner[a], SAVED)] += sparse.more()
                if way:
                    points.append(self.replay(sparse, len(way), live))
            if at not in sparse.slots.held:
                fresh[v] = RECOMPUTED
        return live, fresh, points

    def replay(self, sparse: _Sparse, steps: int, live: Sequence[int]) -> Point:
        """The highest point of a replay; what it begins with is held by others."""
        how = sparse.op.replay
        assert how is not None
        own = {v: RECOMPUTED for v in how.body.inputs[: len(how.carries)]} if steps > 1 else {}
        found = replace(self, saved=(), points=4, depth=self.depth + 1).region(how.body, own)
        return _above(live, [max((replace(p, depth=None) for p in found), key=lambda p: p.total)])[0]


class _Body:
    """Points of a loop's body, for each set of inputs that it owns."""

    def __init__(self, walk: _Walk, region: Region) -> None:
        self.walk, self.region = walk, region
        self.known: dict[frozenset[tuple[Var, int]], list[Point]] = {}

    def points(self, own: Mapping[Var, int]) -> list[Point]:
        key = frozenset(own.items())
        found = self.known.get(key)
        if found is None:
            every = self.walk.region(self.region, own)
            found = self.known[key] = [*_thin(every[:-1], self.walk.points), every[-1]]
        return found


class _Held(Book):
    """A book that knows for each storage what it holds."""

    def __init__(self, region: Region) -> None:
        self.bytes = [0] * len(HOLDERS)
        self.held: dict[Var, int] = {}
        self.holder = VALUES
        super().__init__(region, {}, {})

    def add(self, v: Var, size: int) -> None:
        super().add(v, size)
        self.held[v] = self.holder
        self.bytes[self.holder] += size

    def drop(self, root: Var) -> None:
        super().drop(root)
        self.bytes[self.held.pop(root)] -= self.size[root]

    def enter(self, e: Eqn, i: int, sizes: Sequence[int | None]) -> None:
        super().enter(e, i, sizes)
        if i in self.reused:  # a storage that is written over holds something else now
            self.move(self.owner[e.outs[0]], self.holder)

    def move(self, root: Var, holder: int) -> None:
        """Count a storage with what ``holder`` holds."""
        if root in self.held:
            self.bytes[self.held[root]] -= self.size[root]
            self.bytes[holder] += self.size[root]
            self.held[root] = holder


def _emissions(e: Eqn, op: Loop) -> list[tuple[Var, Var]]:
    """Each sequence that a loop emits, and the value of its body whose storage that is."""
    root = roots(op.body)
    return [(out, root.get(v, v)) for out, v in zip(e.outs[op.n_carry :], op.body.outputs[op.n_carry :], strict=True)]


def _above(live: Sequence[int], points: Sequence[Point]) -> list[Point]:
    """Points with what is alive around them."""
    return [replace(p, live=tuple(map(sum, zip(live, p.live, strict=True)))) for p in points]


def _thin(points: list[Point], most: int) -> list[Point]:
    """At most ``most`` points, each the highest of those that it stands for."""
    n = len(points)
    if n <= most:
        return points
    cuts = [k * n // most for k in range(most + 1)]
    return [max(points[a:b], key=lambda p: p.total) for a, b in pairwise(cuts)]
