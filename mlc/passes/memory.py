"""Peak memory by liveness over the types, storage by storage, as the interpreter allocates and frees.

Views share the storage of their base; a value is freed after its last use; a loop holds its constants and sequences
until it ends, frees its carries inside the body, and adds its emissions trip by trip (states that are rebuilt count
as the few sets that are kept).  O(equations).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlc.ir.core import Eqn, Feed, Loop, Pack, Region, Var
from mlc.ir.reuse import reused, shared_with
from mlc.ir.slots import Slots
from mlc.ir.types import nbytes

__all__ = ["Footprint", "Profile", "liveness", "region_peak", "root_of"]


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
    """Predicts memory; remembers loop bodies and which sequences are rebuilt from sparse states.

    Attributes:
        sparse: Sequences whose elements are rebuilt when they are read, with the bytes that a replay needs.
        sizes: Bytes of the results of loops met so far, where they are not those of their types.
        same: Inputs of a stage that share a storage with another one of them, and with which.
    """

    def __init__(self) -> None:
        self.sparse: dict[Var, int] = {}
        self.sizes: dict[Var, int] = {}
        self.same: dict[Var, Var] = {}
        self._loops: dict[tuple[int, tuple[bool, ...]], tuple[Loop, LoopMemory]] = {}

    def region(self, region: Region, owned: Collection[Var] = ()) -> Profile:
        """Profile of a region; ``owned`` inputs die inside, at their last use."""
        book = Book(region, {v: self.sizes.get(v, nbytes(v.type)) for v in owned}, self.same)
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
        book.enter_loop(e, i, loop)
        return max(during, book.live)

    def hand_over(self, book: Book, stages: Any, handed: Collection[int] = ()) -> tuple[list[Var], int]:
        """What the call holds once the forward stage has run.

        Args:
            book: Storages at the end of the forward stage.
            stages: The stage graphs (:class:`mlc.passes.lower.Stages`).
            handed: Positions of results that become the user's and live on.

        Returns:
            Inputs of the backward stage that die in it, and bytes of results beside them.
        """
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
        results = {book.owner[outputs[at]] for at in handed if at < stages.n_results} - counted
        return own, sum(book.size[r] for r in results if r in book.holders)

    def loop(self, e: Eqn) -> LoopMemory:
        """What a loop needs, measured once for each body."""
        assert isinstance(e.op, Loop)
        key = (id(e.op), tuple([v in self.sparse for v in e.args]))
        entry = self._loops.get(key)
        if entry is None or e.op.replay is not None:
            entry = self._loops[key] = (e.op, self._measure(e))
        return entry[1]

    def _measure(self, e: Eqn) -> LoopMemory:
        op = e.op
        assert isinstance(op, Loop)
        n, ins = op.count, op.body.inputs
        carries = ins[: op.n_carry]
        root = roots(op.body)
        emitted = [root.get(v, v) for v in op.body.outputs[op.n_carry :]]
        replay = op.replay
        rebuilt = {carries[i] for i in replay.carries} if replay is not None else set()
        states = {v for v in emitted if v in carries and v not in rebuilt}
        made = {v for v in emitted if v not in ins}
        next_own = _next_own(op, root, made)
        sets = sum(next_own[v] or 0 for v in rebuilt)
        held = len(held_at(n, replay.slots)) if replay is not None else 1
        fed = self._rebuilt_inputs(e)
        body = self.region(op.body, [v for v in carries if next_own[v] and v not in states] + fed)
        each = {v: nbytes(v.type) if v in made else (next_own[v] or 0) if v in states else 0 for v in emitted}
        before = (n - 1) * sum(each.values()) + (held - 1) * sets
        replayed = max((self.sparse[v] for v in e.args if v in self.sparse), default=0)
        results: list[int | None] = [next_own[v] for v in carries]
        for j, (v, out) in enumerate(zip(emitted, e.outs[op.n_carry :], strict=True)):
            again = v in emitted[:j]
            if v in rebuilt:
                assert replay is not None
                share = (held - 1) * sets if not rebuilt.intersection(emitted[:j]) else 0
                self.sparse[out] = _bytes(rebuilt) + self.region(replay.body, replay.body.inputs[: len(rebuilt)]).peak
            else:
                share = 0 if again else each[v] * (n if v in made else n - 1)
            results.append(share)
            self.sizes[out] = share
        return LoopMemory(before + max(body.peak, replayed), results, each, states, rebuilt, sets)

    def _rebuilt_inputs(self, e: Eqn) -> list[Var]:
        """Body inputs that are elements of rebuilt sequences: the body owns them."""
        op = e.op
        assert isinstance(op, Loop)
        return [v for v, a in zip(op.body.inputs, e.args, strict=True) if a in self.sparse]


@dataclass(frozen=True)
class LoopMemory:
    """What a loop needs beyond its arguments.

    Attributes:
        peak: Bytes at its last trip.
        results: Bytes of its results; None where one is the loop's argument still.
        emitted: For each value of the body whose storage is emitted, the bytes that every trip adds.
        states: Of these, carries as they came in: a trip keeps what the one before allocated.
        rebuilt: Carries that are kept sparsely.
        sets: Bytes of a set of them that nothing else keeps.
    """

    peak: int
    results: list[int | None]
    emitted: dict[Var, int]
    states: set[Var]
    rebuilt: set[Var]
    sets: int

    def keeps(self, e: Eqn) -> Iterator[tuple[Var, Var]]:
        """Results of the loop that hold more than what its trips allocate: the first states, what a replay reads."""
        op = e.op
        assert isinstance(op, Loop)
        root = roots(op.body)
        given = dict(zip(op.body.inputs, e.args, strict=True))
        emitted = [(out, root.get(v, v)) for out, v in zip(e.outs, op.body.outputs, strict=True)][op.n_carry :]
        yield from ((out, given[v]) for out, v in emitted if v in self.states)
        first = next((out for out, v in emitted if v in self.rebuilt), None)
        if first is not None and op.replay is not None:
            consts, seqs = e.args[op.n_carry :], e.args[op.n_carry + op.n_const :]
            yield from ((first, given[v]) for v in self.rebuilt)
            yield from ((first, consts[k]) for k in op.replay.consts)
            yield from ((first, seqs[k]) for k in op.replay.seqs)
            yield from ((first, emitted[k][0]) for k in op.replay.dense)


def _next_own(op: Loop, owner: dict[Var, Var], made: set[Var]) -> dict[Var, int | None]:
    """Bytes that each carry has of its own after a trip: 0 where they are emitted too, None where it stays the same."""
    out: dict[Var, int | None] = {}
    seen: set[Var] = set()
    for v, after in zip(op.body.inputs[: op.n_carry], op.body.outputs, strict=False):
        root = owner.get(after, after)
        given = root in op.body.inputs[op.n_carry :]
        fresh = root not in made and root not in seen and not given
        out[v] = None if root is v else nbytes(v.type) if fresh else 0
        seen.add(root)
    return out


def freed_carries(book: Book, e: Eqn, i: int, loop: LoopMemory) -> list[tuple[Var, int]]:
    """Arguments that the first trip of a loop frees, with their bytes: carries that nobody else holds or keeps."""
    assert isinstance(e.op, Loop)
    held = loop.states | loop.rebuilt
    carries = zip(e.args, e.op.body.inputs, loop.results[: e.op.n_carry], strict=False)
    freed = {a: book.freed_with(a, i) for a, v, own in carries if v not in held and own is not None}
    return [(a, size) for a, size in freed.items() if size]


def held_at(trips: int, slots: int) -> list[int]:
    """The trips whose states are held after so many trips, the first one included."""
    kept = Slots(slots)
    for t in range(trips):
        kept.offer(t)
    return kept.held


class Book:
    """Storages alive at a point of a region."""

    def __init__(self, region: Region, owned: Mapping[Var, int], same: Mapping[Var, Var]) -> None:
        self.last: dict[Var, int] = {}
        for i, e in enumerate(region.eqns):
            for v in e.inputs:
                self.last[v] = i
        for v in region.outputs:
            self.last[v] = len(region.eqns)
        self.reused = reused(region)
        self.owner: dict[Var, Var] = {v: v for v in region.inputs}
        self.holders: dict[Var, int] = {}
        self.size: dict[Var, int] = {}
        self.keeps: dict[Var, list[Var]] = {}
        self.live = 0
        for v, size in owned.items():
            self.own(v, size, same.get(v, v))

    def own(self, v: Var, size: int, root: Var) -> None:
        """An input that dies here; ``root`` is the one whose storage it shares."""
        if v not in self.last:
            return
        self.owner[v] = root
        if root in self.holders:
            self.holders[root] += 1
        else:
            self.add(root, size)

    def add(self, v: Var, size: int) -> None:
        """A storage of its own."""
        self.holders[v], self.size[v] = 1, size
        self.live += size

    def drop(self, root: Var) -> None:
        """A storage that nobody holds any more."""
        self.live -= self.size[root]
        del self.holders[root]
        for r in self.keeps.pop(root, ()):
            self.let_go(r)

    def let_go(self, root: Var) -> None:
        """One holder less."""
        self.holders[root] -= 1
        if self.holders[root] == 0:
            self.drop(root)

    def enter_loop(self, e: Eqn, i: int, loop: LoopMemory) -> None:
        """Results of a loop."""
        self.enter(e, i, loop.results)
        for v, kept in loop.keeps(e):
            root, held = self.owner[v], self.owner.get(kept)
            if root in self.holders and held in self.holders and held is not root:
                self.holders[held] += 1
                self.keeps.setdefault(root, []).append(held)

    def held_by(self, root: Var) -> set[Var]:
        """A storage, and those that it keeps alive."""
        return {root}.union(*[self.held_by(r) for r in self.keeps.get(root, ())])

    def enter(self, e: Eqn, i: int, sizes: Sequence[int | None]) -> None:
        """Results of equation ``i``, with the bytes of those that have a storage of their own."""
        over = self.reused.get(i)
        for k, v in enumerate(e.outs):
            size = sizes[k]
            shared = over if over is not None else e.args[k] if size is None else shared_with(e, k)
            root = v if shared is None else self.owner[shared]
            self.owner[v] = root
            if root is v:
                assert size is not None
                self.add(v, size)
            elif root in self.holders:
                self.holders[root] += 1

    def leave(self, e: Eqn, i: int) -> None:
        """Drop what the equation read or made for the last time."""
        for v in dict.fromkeys([*e.inputs, *e.outs]):
            root = self.owner[v]
            if self.last.get(v, i) == i and root in self.holders:
                self.let_go(root)

    def freed_with(self, v: Var, i: int) -> int:
        """Bytes that go when equation ``i``, their last user, lets ``v`` go."""
        root = self.owner[v]
        alone = self.last.get(v) == i and self.holders.get(root) == 1
        return self.size[root] if alone else 0


def own_bytes(e: Eqn) -> list[int | None]:
    """Bytes of the results of an operator that have storages of their own; what a feed draws is held trip by trip."""
    return [0 if isinstance(e.op, (Feed, Pack)) else nbytes(v.type) for v in e.outs]


_SCRATCH = {"_safe_softmax": 1.5}


def workspace(e: Eqn) -> int:
    """Bytes that an operator allocates and frees inside, beyond its results."""
    if not isinstance(e.op, torch._ops.OpOverload):
        return 0
    factor = _SCRATCH.get(e.op._schema.name.split("::")[1])
    return int(factor * nbytes(e.outs[0].type)) if factor else 0


def roots(region: Region) -> dict[Var, Var]:
    """The value that owns the storage of each value."""
    owner: dict[Var, Var] = {}
    for e in region.eqns:
        for k, v in enumerate(e.outs):
            shared = shared_with(e, k)
            owner[v] = v if shared is None else owner.get(shared, shared)
    return owner


def _bytes(values: Iterable[Var]) -> int:
    return sum(nbytes(v.type) for v in values)
