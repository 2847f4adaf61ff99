"""Peak memory by liveness over the types, storage by storage, as the interpreter allocates and frees.

Views share the storage of their base; a value is freed after its last use; a loop holds its constants and sequences
until it ends, frees its carries inside the body, and adds its emissions trip by trip (states that are rebuilt count
as the few sets that are kept, and what their replays read stays alive with them).  Of sequences that rest on the
host, the device holds two elements: that of the trip, and one on its way.  O(equations).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.lowered.reuse import shared_with
from mlc.ir.lowered.slots import Slots
from mlc.ir.lowered.stages import Stages
from mlc.ir.opaque.estimates import Solve
from mlc.ir.types import SeqType, TensorType, resident
from mlc.passes.cost.storage import Book, own_bytes, roots_of, workspace

__all__ = [
    "Footprint",
    "LoopMemory",
    "Profile",
    "Replays",
    "freed_carries",
    "held_at",
    "liveness",
    "peak_bytes",
    "rebuilt_of",
    "region_peak",
    "root_of",
    "roots_of",
    "set_bytes",
]  # fmt: skip


def root_of(e: Eqn) -> Var | None:
    """The input whose storage the (first) result of ``e`` shares, if it does."""
    return None if not e.outs else shared_with(e, 0)


@dataclass(frozen=True)
class Profile:
    """Memory of running a region once, beyond the inputs that belong to others.

    Attributes:
        peak: Largest number of bytes.
        where: Position of the equation at which it is reached (0 when nothing is allocated).
        after: Bytes alive after each equation.
        during: Bytes alive while each equation runs.
        book: Storages at the end.
    """

    peak: int
    where: int
    after: tuple[int, ...]
    during: tuple[int, ...]
    book: Book


def region_peak(region: Region, owned: Collection[Var] = ()) -> int:
    """Largest number of bytes that running the region adds to its inputs (``owned`` ones count as its own)."""
    return Footprint().region(region, owned).peak


def liveness(region: Region) -> tuple[int, int]:
    """The peak in bytes, and the position of the equation at which it is reached."""
    found = Footprint().region(region)
    return found.peak, found.where


class Footprint:
    """Predicts memory; remembers which sequences are rebuilt from sparse states, and which rest on the host.

    Args:
        exact: Count the sets of states that a loop of so many trips leaves.  Else as many as it may keep: that holds
            for other numbers of trips as well, and is what the sweep back over them fills again.

    Attributes:
        sparse: Sequences whose elements are rebuilt when they are read, with what that needs.
        sizes: Bytes of the results of loops met so far, where they are not those of their types.
        hosted: Sequences whose elements rest on the host.
        same: Inputs of a stage that share a storage with another one of them, and with which.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.sparse: dict[Var, Replays] = {}
        self.sizes: dict[Var, int] = {}
        self.hosted: set[Var] = set()
        self.same: dict[Var, Var] = {}

    def region(self, region: Region, owned: Collection[Var] = ()) -> Profile:
        """Profile of a region; ``owned`` inputs die inside, at their last use."""
        book = Book(region, {v: self.sizes.get(v, resident(v.type)) for v in owned}, self.same)
        peak, where = book.live, 0
        after, during = [], []
        for i, e in enumerate(region.eqns):
            now = self._enter(book, e, i)
            if now > peak:
                peak, where = now, i
            book.leave(e, i)
            during.append(now)
            after.append(book.live)
        return Profile(peak, where, tuple(after), tuple(during), book)

    def _enter(self, book: Book, e: Eqn, i: int) -> int:
        """Enter the results of an equation; returns the bytes alive while it runs."""
        if not isinstance(e.op, Loop):
            book.enter(e, i, own_bytes(e))
            return book.live + workspace(e)
        loop = self.loop(e)
        during = book.live - sum(size for _, size in freed_carries(book, e, i, loop)) + loop.peak
        book.enter_loop(e, i, loop.results, loop.keeps)
        return max(during, book.live)

    def hand_over(self, book: Book, stages: Stages) -> tuple[list[Var], int]:
        """What the call holds once the forward stage has run.

        Args:
            book: Storages at the end of the forward stage.
            stages: The stage graphs (:class:`mlc.ir.lowered.stages.Stages`).

        Returns:
            Inputs of the backward stage that die in it, and bytes of results beside them.
        """
        assert stages.backward is not None
        first: dict[Var, Var] = {}
        own, counted = [], set[Var]()
        outputs = stages.forward.outputs
        for v, (kind, at) in zip(stages.backward.inputs, stages.saved, strict=False):
            root = book.owner[outputs[at]] if kind == "out" else v
            if kind != "out" or root not in book.holders:
                continue
            own.append(v)
            self.same[v] = first.setdefault(root, v)
            held = book.held_by(root) - counted
            self.sizes[v] = sum(book.size[r] for r in held)
            counted |= held
            if outputs[at] in self.sparse:
                self.sparse[v] = self.sparse[outputs[at]]
            if outputs[at] in self.hosted:
                self.hosted.add(v)
        results = {book.owner[outputs[at]] for at in stages.handed if at < stages.n_results} - counted
        return own, sum(book.size[r] for r in results if r in book.holders)

    def loop(self, e: Eqn) -> LoopMemory:
        """What a loop needs; notes which of its emissions are rebuilt or on the host, and what the others take."""
        op = e.op
        assert isinstance(op, Loop)
        given = tuple([(v in self.sparse, v in self.hosted) for v in e.args])
        known, key = _known.setdefault(op, {}), (op.count, self.exact, given)
        found = known.get(key)
        if found is None:
            found = known[key] = _measured(op, self.exact, given)
        self.sizes.update(zip(e.outs[op.n_carry :], found.sizes, strict=True))
        if found.replays is not None:
            self.sparse.update((e.outs[i], found.replays) for i in found.sparse)
        self.hosted.update([e.outs[i] for i in found.hosted])
        sources = {id(s): s for v in e.args if (s := self.sparse.get(v)) is not None}.values()
        if not sources:
            return found
        more, replay = sum(s.more for s in sources), max(s.peak for s in sources)
        return replace(found, peak=more + found.before + max(found.body, _bytes(found.owned) + replay))


# Loops are measured once, however many candidates have them.
_known: WeakKeyDictionary[Loop, dict[tuple[int, bool, tuple[tuple[bool, bool], ...]], LoopMemory]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Replays:
    """What rebuilding states needs while a loop reads them.

    Attributes:
        more: Bytes beside the sets that the loop left: those made again on the way, or on their way from the host.
        peak: Bytes of a replay.
    """

    more: int
    peak: int


@dataclass(frozen=True)
class LoopMemory:
    """What a loop needs beyond its arguments.

    Attributes:
        peak: Bytes at its last trip.
        body: Bytes that the body needs in a trip, its carries among them.
        owned: Carries that the body owns.
        before: Bytes that the trips before the last have left, and those on their way to or from the host.
        results: Bytes of its results; None where one is the loop's argument still.
        sizes: Those of its emissions.
        keeps: Results that hold more than what its trips allocate (the first states, what a replay reads): result,
            and position among arguments and results.
        emitted: For each value of the body whose storage is emitted, the bytes that every trip adds.
        states: Of these, carries as they came in: a trip keeps what the one before allocated.
        rebuilt: Carries that are kept sparsely.
        sets: Bytes of a set of them that nothing else keeps; 0 when it rests on the host.
        sparse: Results that are rebuilt when they are read.
        replays: What that needs.
        hosted: Results that rest on the host.
        leaving: Bytes on their way to the host while a later trip runs.
        incoming: Bytes on their way from the host for the next trip.
    """

    peak: int
    body: int
    owned: list[Var]
    before: int
    results: list[int | None]
    sizes: list[int]
    keeps: list[tuple[int, int]]
    emitted: dict[Var, int]
    states: set[Var]
    rebuilt: set[Var]
    sets: int
    sparse: tuple[int, ...]
    replays: Replays | None
    hosted: tuple[int, ...]
    leaving: int
    incoming: int


def _measured(op: Loop, exact: bool, given: Sequence[tuple[bool, bool]]) -> LoopMemory:
    """Memory of a loop; ``given`` tells which arguments are rebuilt, and which rest on the host."""
    n, ins, outs = op.count, op.body.inputs, op.body.outputs[op.n_carry :]
    carries, roots, rebuilt = ins[: op.n_carry], roots_of(op.body), rebuilt_of(op)
    emitted = [roots.get(v, v) for v in outs]
    inner, far = Footprint(exact), [v for v, (again, far) in zip(ins, given, strict=True) if far and not again]
    inner.hosted = {v for v in far if isinstance(v.type, SeqType)}
    fed = [v for v, how in zip(ins, given, strict=True) if any(how) and not isinstance(v.type, SeqType)]
    kept = {v for j, v in enumerate(emitted) if j not in op.host}
    states = {v for v in kept if v in carries and v not in rebuilt}
    gone = {v for v in emitted if v not in kept and isinstance(v.type, TensorType)}
    last = _next_own(op, roots, {v for v in kept if v not in ins})
    # what a trip has emitted to the host and hands on as well leaves the device behind the next trip
    owned = [v for v, x in zip(carries, op.body.outputs, strict=False)
             if last[v] and v not in states and roots.get(x, x) not in gone - {v}]  # fmt: skip
    body = inner.region(op.body, [*owned, *fed]).peak
    kept -= {emitted[j] for j, v in enumerate(outs) if v in inner.hosted}
    made = {v for v in kept if v not in ins}
    sets = 0 if gone & rebuilt else sum(last[v] or 0 for v in rebuilt)
    each = {v: resident(v.type) if v in made else (last[v] or 0) if v in states else 0 for v in dict.fromkeys(emitted)}
    most = 1 if op.replay is None else min(op.replay.slots, n)
    held = most if op.replay is None or not exact else len(held_at(n, op.replay.slots))
    leaving = _bytes(gone | rebuilt if gone & rebuilt else gone)
    incoming = _bytes(v for v in far if v not in inner.hosted)
    before = (n - 1) * sum(each.values()) + (most - 1) * sets + (n > 1) * (leaving + incoming)
    first = next((j for j, v in enumerate(emitted) if v in rebuilt), -1)
    sizes = [
        (held - 1) * sets * (j == first) if v in rebuilt
        else each[v] * (n if v in made else n - 1) * (v not in emitted[:j])
        for j, v in enumerate(emitted)
    ]  # fmt: skip
    sparse = tuple(op.n_carry + j for j, v in enumerate(emitted) if v in rebuilt)
    hosted = tuple(op.n_carry + j for j, v in enumerate(outs) if j in op.host or v in inner.hosted)
    if isinstance(op, Solve):
        before += op.vectors * _bytes(carries)
    return LoopMemory(
        before + body, body, owned, before, [*[last[v] for v in carries], *sizes], sizes,
        _keeps(op, emitted, states, rebuilt), each, states, rebuilt, sets, sparse,
        _replays(op, bool(gone & rebuilt), most, (held - 1) * sets), hosted, leaving, incoming,
    )  # fmt: skip


def _replays(op: Loop, hosted: bool, most: int, left: int) -> Replays | None:
    """What rebuilding sets of states needs; ``left`` are the bytes of those that the loop leaves on the device.

    A replay begins with a set that others hold and hands its states on from step to step; up to ``most`` sets are
    held meanwhile.  Of the host, one set is on its way, and what steps read there, for two of them.
    """
    if op.replay is None:
        return None
    r, outs = op.replay, op.body.outputs[op.n_carry :]
    read = _bytes(outs[j] for j in r.dense if j in op.host)
    size = set_bytes(op)
    more = _bytes(rebuilt_of(op)) if hosted else max((most - 1) * size - left, 0)
    peak = region_peak(r.body, r.body.inputs[: len(r.carries)])
    return Replays(more, 2 * read + peak)


def set_bytes(op: Loop) -> int:
    """Bytes of a set of states that is made again; what a replay hands on of what it reads is held already."""
    assert op.replay is not None
    body, root = op.replay.body, roots_of(op.replay.body)
    read = body.inputs[len(op.replay.carries) :]
    return _bytes(v for v in {root.get(v, v) for v in body.outputs} if v not in read)


def _keeps(op: Loop, emitted: list[Var], states: set[Var], rebuilt: set[Var]) -> list[tuple[int, int]]:
    """Results of a loop that keep arguments or other results alive: the first states, what a replay reads."""
    at = {v: i for i, v in enumerate(op.body.inputs)}
    out = [(op.n_carry + j, at[v]) for j, v in enumerate(emitted) if v in states]
    first = next((op.n_carry + j for j, v in enumerate(emitted) if v in rebuilt), None)
    if first is not None and op.replay is not None:
        r, consts = op.replay, op.n_carry
        read = [*[at[v] for v in rebuilt], *[consts + k for k in r.consts], *[consts + op.n_const + k for k in r.seqs]]
        out += [(first, i) for i in (*read, *[len(at) + op.n_carry + j for j in r.dense])]
    return out


def _next_own(op: Loop, owner: dict[Var, Var], made: set[Var]) -> dict[Var, int | None]:
    """Bytes that each carry has of its own after a trip: 0 where they are emitted too, None where it stays the same."""
    out: dict[Var, int | None] = {}
    seen: set[Var] = set()
    for v, after in zip(op.body.inputs[: op.n_carry], op.body.outputs, strict=False):
        root = owner.get(after, after)
        given = root in op.body.inputs[op.n_carry :]
        fresh = root not in made and root not in seen and not given
        out[v] = None if root is v else resident(v.type) if fresh else 0
        seen.add(root)
    return out


def freed_carries(book: Book, e: Eqn, i: int, loop: LoopMemory) -> list[tuple[Var, int]]:
    """Arguments that the first trip of a loop frees, with their bytes: carries that nobody else holds or keeps."""
    assert isinstance(e.op, Loop)
    held = loop.states | loop.rebuilt
    carries = zip(e.args, e.op.body.inputs, loop.results[: e.op.n_carry], strict=False)
    freed = {a: book.freed_with(a, i) for a, v, own in carries if v not in held and own is not None}
    return [(a, size) for a, size in freed.items() if size]


@lru_cache(maxsize=1024)
def held_at(trips: int, slots: int) -> tuple[int, ...]:
    """The trips whose states are held after so many trips, the first one included."""
    kept = Slots(slots)
    for t in range(trips):
        kept.offer(t)
    return tuple(kept.held)


def rebuilt_of(op: Loop) -> set[Var]:
    """Carries of a loop's body that are kept sparsely."""
    return set() if op.replay is None else {op.body.inputs[i] for i in op.replay.carries}


def _bytes(values: Iterable[Var]) -> int:
    return sum(resident(v.type) for v in values)


def peak_bytes(stages: Stages, footprint: Footprint | None = None) -> int:
    """Predicted peak of a call beyond its inputs: the forward stage, or what is kept and the backward stage."""
    footprint = Footprint() if footprint is None else footprint
    forward = footprint.region(stages.forward)
    if stages.backward is None:
        return forward.peak
    owned, results = footprint.hand_over(forward.book, stages)
    return max(forward.peak, results + footprint.region(stages.backward, owned).peak)
