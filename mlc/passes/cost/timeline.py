"""What is alive while a plan runs: predicted bytes after every equation, by what holds them.

The books are those of :class:`mlc.passes.cost.memory.Footprint`, from which the peak of a plan comes; here they are
kept for every equation instead of their maximum, with loops unrolled: what a loop keeps grows trip by trip, and states
that are held sparsely come and go as the runtime's schedule says (a peak is that of as many as may be).  Long loops are
thinned; every point that stands for others is the highest of them, so that no peak is lost.  O(equations + points).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.lowered.slots import Slots
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, resident
from mlc.passes.cost.facts import Stage
from mlc.passes.cost.memory import Footprint, freed_carries, held_at, set_bytes
from mlc.passes.cost.storage import Book, own_bytes, roots_of, workspace

__all__ = ["HOLDERS", "Point", "predicted"]

HOLDERS = ("kept for backward", "loop states", "values", "derivatives", "recomputed", "results")
SAVED, STATES, VALUES, DERIVATIVES, RECOMPUTED, RESULTS = range(len(HOLDERS))
POINTS = 6000
_DERIVED = {Origin.TANGENT, Origin.BACKWARD, Origin.ADJOINT, Origin.SUM}
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


def predicted(stages: Sequence[Stage], stage_graphs: Any) -> list[list[Point]]:
    """Points of every stage, in the order in which they run; inputs of the call are not counted.

    Args:
        stages: From :func:`mlc.passes.cost.facts.stages_of`.
        stage_graphs: What they come from; tells which inputs of the backward stage the call keeps,
            and which results the user holds from then on.
    """
    footprint, forward = Footprint(exact=True), stages[0].region
    walk = _Walk(footprint, {}, stages[0].saved, POINTS)
    out = [walk.region(forward, {})]
    for stage in stages[1:]:
        own, results = footprint.hand_over(footprint.region(forward).book, stage_graphs)
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
        ahead: Bytes of a set on its way to the host or back, where sets rest there; nothing else of them counts.
        end: Sets that were held when the loop ended: those that the book counts.
    """

    op: Loop
    slots: Slots
    size: int
    own: int
    ahead: int
    end: frozenset[int]

    def more(self, at: int) -> int:
        """Bytes of the sets held beyond those at the end of the loop, at a trip that reads them.

        The first set is an argument of the loop: it is not counted, nor is it brought from the host.
        """
        if self.ahead:
            return self.ahead if any(0 < t < at for t in self.slots.held) else 0
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
            book.own(v, self.footprint.sizes.get(v, resident(v.type)), self.footprint.same.get(v, v))
        out: list[Point] = []
        for i, e in enumerate(r.eqns):
            book.holder = self.holder(e)
            if isinstance(e.op, Loop):
                out += _Trips(self, e, e.op, i, book).points()
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
        if e.origin is Origin.RECOMPUTED:
            return RECOMPUTED
        return DERIVATIVES if e.origin in _DERIVED else VALUES

    def results(self, e: Eqn, book: _Held, i: int) -> None:
        """Enter the results of a loop; of its sequences only those that the next stage reads are kept for it."""
        memory = self.footprint.loop(e)
        book.enter_loop(e, i, memory.results, memory.keeps)
        for v in e.outs:
            if v in book.held and isinstance(v.type, SeqType):
                book.move(v, self.keeper(v))

    def keeper(self, v: Var) -> int:
        return SAVED if v in self.saved else STATES


class _Trips:
    """The trips of one loop equation, above what is alive around it."""

    def __init__(self, walk: _Walk, e: Eqn, op: Loop, i: int, book: _Held) -> None:
        self.walk, self.e, self.op, self.book = walk, e, op, book
        self.memory = memory = walk.footprint.loop(e)
        self.base = list(book.bytes)
        freed = dict(freed_carries(book, e, i, memory))
        for a, size in freed.items():
            self.base[book.held[book.owner[a]]] -= size
        shared: set[Var] = set()
        self.first: dict[Var, int] = {}
        for v, a in zip(op.body.inputs[: op.n_carry], e.args, strict=False):
            if a in freed and a not in shared:
                self.first[v] = book.held[book.owner[a]]
                shared.add(a)  # another carry that begins with it has nothing of its own yet
        self.later = dict.fromkeys(memory.owned, STATES)
        self.fed = self._fed()
        keepers = {v: walk.keeper(out) for out, v in reversed(_emissions(e, op))}
        self.grown = [(keepers[v], size) for v, size in memory.emitted.items() if size]
        self.keeper = next((keepers[v] for v in keepers if v in memory.rebuilt), STATES)
        self.kept = self._begun()
        self.leaving = memory.leaving - (0 if self.kept is None else self.kept.ahead)
        self._replays: dict[tuple[Slots, bool], Point] = {}

    def points(self) -> list[Point]:
        """All of them; where trips are too many, the highest of those next to each other, and the last one."""
        n, walk = self.op.count, self.walk
        shown = min(n, max(2, walk.points // 6))
        inner = replace(walk, saved=(), points=max(3, walk.points // shown - 2), depth=walk.depth + 1)
        body = _Body(inner, self.op.body)
        trips = [self._trip(t) for t in range(n)]
        out: list[Point] = []
        for k in range(shown):
            some = trips[k * n // shown : (k + 1) * n // shown]
            replays = [x.replay for x in some if x.replay is not None]
            out += [max(replays, key=lambda p: p.total)] if replays else []
            best = max(reversed(some), key=lambda x: x.total) if k < shown - 1 else some[-1]
            out += _above(best.live, body.points(best.own))
        return out

    def _fed(self) -> dict[Var, int]:
        """Inputs of the body that are copies of what rests on the host; its sequences there are noted."""
        footprint, fed = self.walk.footprint, {}
        for v, a in zip(self.op.body.inputs, self.e.args, strict=True):
            if a in footprint.hosted and isinstance(v.type, SeqType):
                footprint.hosted.add(v)
            elif a in footprint.hosted and a not in self.walk.sparse:
                fed[v] = SAVED
        return fed

    def _begun(self) -> _Sparse | None:
        """The states of a loop that holds them sparsely, before its first trip."""
        op, memory = self.op, self.memory
        if op.replay is None or memory.replays is None:
            return None
        hosted = any(i in memory.hosted for i in memory.sparse)
        size, ahead = (0, memory.replays.more) if hosted else (set_bytes(op), 0)
        end = frozenset(held_at(op.count, op.replay.slots))
        made = _Sparse(op, Slots(op.replay.slots), size, memory.sets, ahead, end)
        self.walk.sparse.update((self.e.outs[i], made) for i in memory.sparse)
        return made

    def _trip(self, t: int) -> _Trip:
        """What is alive around the body in a trip, and what the body owns."""
        live, memory = list(self.base), self.memory
        own = dict(self.later if t else self.first)
        if self.kept is not None:
            held = self.kept.slots
            held.offer(t)
            live[self.keeper] += (len(held.held) - 1) * self.kept.own
            if t in held.held:  # kept, or on its way to the host
                own = {v: h for v, h in own.items() if v not in memory.rebuilt}
                live[self.keeper] += self.kept.ahead if t else 0
        for holder, size in self.grown:
            live[holder] += t * size
        live[self.keeper] += self.leaving if t else 0
        ahead = [*live]
        ahead[SAVED] += memory.incoming if t < self.op.count - 1 else 0
        around = [*live]
        for v, holder in (own | self.fed).items():
            around[holder] += resident(v.type)
        fresh, more, replay = self._replayed(self.op.count - 1 - t if self.op.reverse else t, around)
        return _Trip([a + b for a, b in zip(ahead, more, strict=True)], own | self.fed | fresh, replay)

    def _replayed(self, at: int, around: Sequence[int]) -> tuple[dict[Var, int], list[int], Point | None]:
        """What reading rebuilt states at a trip gives to the body, what it leaves alive, and the replay's peak."""
        fresh: dict[Var, int] = {}
        more = [0] * len(HOLDERS)
        points: list[Point] = []
        done: list[_Sparse] = []
        for v, a in zip(self.op.body.inputs, self.e.args, strict=True):
            sparse = self.walk.sparse.get(a)
            if sparse is None:
                continue
            if sparse not in done:
                done.append(sparse)
                sparse.slots.drop_after(at)
                way = list(sparse.slots.way(at))
                more[self.book.held.get(self.book.owner[a], SAVED)] += sparse.more(at)
                if way:
                    now = [x + y for x, y in zip(around, more, strict=True)]
                    points.append(_above(now, [self._replay(sparse, len(way))])[0])
            if sparse.ahead or at not in sparse.slots.held:
                fresh[v] = RECOMPUTED
        return fresh, more, max(points, key=lambda p: p.total, default=None)

    def _replay(self, sparse: _Sparse, steps: int) -> Point:
        """The highest point of a replay; what it begins with is held by others, or a copy of what is on the host."""
        how, owned = sparse.op.replay, steps > 1 or sparse.ahead > 0
        assert how is not None
        found = self._replays.get((sparse.slots, owned))
        if found is None:
            own = dict.fromkeys(how.body.inputs[: len(how.carries)] if owned else (), RECOMPUTED)
            every = replace(self.walk, saved=(), points=4, depth=self.walk.depth + 1).region(how.body, own)
            top = max(every, key=lambda p: p.total)
            found = self._replays[sparse.slots, owned] = replace(top, depth=None)
        return found


@dataclass(frozen=True)
class _Trip:
    """One trip: bytes around its body, inputs that the body owns with their holders, the peak of replays for it."""

    live: list[int]
    own: dict[Var, int]
    replay: Point | None

    @property
    def total(self) -> int:
        return sum(self.live) + sum(resident(v.type) for v in self.own)


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
    root = roots_of(op.body)
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
