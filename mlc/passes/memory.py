"""Peak memory by liveness over the types, storage by storage, as the interpreter allocates and frees.

Views share the storage of their base; a value is freed after its last use; a loop holds its constants and sequences
until it ends, frees its carries inside the body, and adds its emissions trip by trip (states that are rebuilt count
as the few sets that are kept).  Of sequences that rest on the host, the device holds two elements: that of the trip,
and one on its way.  O(equations).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from mlc.ir.core import Eqn, Feed, Loop, Pack, Region, Var
from mlc.ir.reuse import reused, shared_with
from mlc.ir.types import SeqType, TensorType, nbytes

__all__ = ["Footprint", "Profile", "liveness", "rebuilt_of", "region_peak", "resting", "root_of", "roots_of"]


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
    """

    peak: int
    where: int
    after: tuple[int, ...]
    during: tuple[int, ...]


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
        hosted: Sequences whose elements rest on the host.
    """

    def __init__(self) -> None:
        self.sparse: dict[Var, int] = {}
        self.sizes: dict[Var, int] = {}
        self.hosted: set[Var] = set()

    def region(self, region: Region, owned: Collection[Var] = ()) -> Profile:
        """Profile of a region; ``owned`` inputs die inside, at their last use."""
        book = _Book(region, {v: self.sizes.get(v, nbytes(v.type)) for v in owned})
        peak, where = book.live, 0
        after, during = [], []
        for i, e in enumerate(region.eqns):
            now = self._enter(book, e, i)
            if now > peak:
                peak, where = now, i
            book.leave(e, i)
            during.append(now)
            after.append(book.live)
        return Profile(peak, where, tuple(after), tuple(during))

    def _enter(self, book: _Book, e: Eqn, i: int) -> int:
        """Enter the results of an equation; returns the bytes alive while it runs."""
        if not isinstance(e.op, Loop):
            book.enter(e, i, [_size(e, k, v) for k, v in enumerate(e.outs)])
            return book.live + _workspace(e)
        loop = self._loop(e)
        freed = sum(book.freed_with(v, i) for v in dict.fromkeys(e.args[: e.op.n_carry]))
        during = book.live - freed + loop.peak
        book.enter(e, i, loop.results)
        return max(during, book.live)

    def _loop(self, e: Eqn) -> _LoopMemory:
        """Memory of a loop; notes which of its emissions are rebuilt or on the host, and what the others take."""
        op = e.op
        assert isinstance(op, Loop)
        given = tuple([(v in self.sparse, v in self.hosted) for v in e.args])
        found = _known.setdefault(op, {}).get((op.count, given))
        if found is None:
            found = _known[op][op.count, given] = _measured(op, given)
        self.sizes.update(zip(e.outs[op.n_carry :], found.results[op.n_carry :], strict=True))
        self.sparse.update((e.outs[i], size) for i, size in found.replays.items())
        self.hosted.update(e.outs[i] for i in found.hosted)
        replayed = max((self.sparse[v] for v in e.args if v in self.sparse), default=0)
        return replace(found, peak=found.before + max(found.peak, replayed))


# Loops are measured once, however many candidates have them.
_known: WeakKeyDictionary[Loop, dict[tuple[int, tuple[tuple[bool, bool], ...]], _LoopMemory]] = WeakKeyDictionary()


def _measured(op: Loop, given: Sequence[tuple[bool, bool]]) -> _LoopMemory:
    """Memory of a loop; ``given`` tells which arguments are rebuilt, and which rest on the host."""
    n, ins = op.count, op.body.inputs
    carries, outs = ins[: op.n_carry], op.body.outputs[op.n_carry :]
    roots, rebuilt = roots_of(op.body), rebuilt_of(op)
    emitted = [roots.get(v, v) for v in outs]
    inner = Footprint()
    inner.hosted = {v for v, (_, far) in zip(ins, given, strict=True) if far and isinstance(v.type, SeqType)}
    fed = [v for v, how in zip(ins, given, strict=True) if any(how) and v not in inner.hosted]
    incoming = _bytes(v for v, (_, far) in zip(ins, given, strict=True) if far and v not in inner.hosted)
    kept = {v for j, v in enumerate(emitted) if j not in op.host}
    states = {v for v in kept if v in carries and v not in rebuilt}
    body = inner.region(op.body, [v for v in carries if v not in states] + fed)
    kept -= {emitted[j] for j, v in enumerate(outs) if v in inner.hosted}
    made = {v for v in kept if v not in ins}
    gone = {v for v in emitted if v not in kept and isinstance(v.type, TensorType)}
    leaving = _bytes(gone | rebuilt if gone & rebuilt else gone)
    share = 0 if op.replay is None or gone & rebuilt else (min(op.replay.slots, n) - 1) * _bytes(rebuilt)
    before = (n - 1) * (_bytes(made) + _bytes(states)) + share + (n > 1) * (leaving + incoming)
    results = [nbytes(v.type) for v in carries]
    replays: dict[int, int] = {}
    seen: set[Var] = set()
    replayed = _replayed(op)
    for i, v in enumerate(emitted):
        if v in rebuilt:
            size = share if not seen & rebuilt else 0
            replays[op.n_carry + i] = replayed
        else:
            size = 0 if v in seen else n * nbytes(v.type) if v in made else (n - 1) * nbytes(v.type) * (v in states)
        seen.add(v)
        results.append(size)
    hosted = tuple(op.n_carry + j for j, v in enumerate(outs) if j in op.host or v in inner.hosted)
    return _LoopMemory(body.peak, results, before, replays, hosted)


def _replayed(op: Loop) -> int:
    """Bytes that rebuilding a set of states needs; what that reads from the host, for two steps."""
    if op.replay is None:
        return 0
    r, outs = op.replay, op.body.outputs[op.n_carry :]
    read = _bytes(outs[j] for j in r.dense if j in op.host)
    return _bytes(rebuilt_of(op)) + 2 * read + region_peak(r.body, r.body.inputs[: len(r.carries)])


@dataclass(frozen=True)
class _LoopMemory:
    """Bytes of a loop: at its last trip beyond its arguments, of its results, and of replays by emission.

    ``hosted`` are the results that rest on the host.
    """

    peak: int
    results: list[int]
    before: int
    replays: dict[int, int]
    hosted: tuple[int, ...]


class _Book:
    """Storages alive at a point of a region."""

    def __init__(self, region: Region, owned: Mapping[Var, int]) -> None:
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
        self.live = 0
        for v, size in owned.items():
            if v in self.last:
                self.holders[v], self.size[v] = 1, size
                self.live += size

    def enter(self, e: Eqn, i: int, sizes: list[int]) -> None:
        """Results of equation ``i``, with the bytes of those that have a storage of their own."""
        over = self.reused.get(i)
        for k, v in enumerate(e.outs):
            shared = shared_with(e, k) if over is None else over
            root = v if shared is None else self.owner[shared]
            self.owner[v] = root
            if root is v:
                self.size[v] = sizes[k]
                self.live += sizes[k]
                self.holders[v] = 1
            elif root in self.holders:
                self.holders[root] += 1

    def leave(self, e: Eqn, i: int) -> None:
        """Drop what the equation read or made for the last time."""
        for v in dict.fromkeys([*e.inputs, *e.outs]):
            root = self.owner[v]
            if self.last.get(v, i) == i and root in self.holders:
                self.holders[root] -= 1
                if self.holders[root] == 0:
                    self.live -= self.size[root]
                    del self.holders[root]

    def freed_with(self, v: Var, i: int) -> int:
        """Bytes that go when equation ``i``, their last user, lets ``v`` go."""
        root = self.owner[v]
        alone = self.last.get(v) == i and self.holders.get(root) == 1
        return self.size[root] if alone else 0


def _size(e: Eqn, k: int, v: Var) -> int:
    """Bytes of a result with a storage of its own; what a feed draws is held one trip at a time."""
    if isinstance(e.op, (Feed, Pack)):
        return 0
    return nbytes(v.type)


_SCRATCH = {"_safe_softmax": 1.5}


def _workspace(e: Eqn) -> int:
    """Bytes that an operator allocates and frees inside, beyond its results."""
    if not isinstance(e.op, torch._ops.OpOverload):
        return 0
    factor = _SCRATCH.get(e.op._schema.name.split("::")[1])
    return int(factor * nbytes(e.outs[0].type)) if factor else 0


def rebuilt_of(op: Loop) -> set[Var]:
    """Carries of a loop's body that are kept sparsely."""
    return set() if op.replay is None else {op.body.inputs[i] for i in op.replay.carries}


def resting(region: Region) -> set[Var]:
    """Sequences that the loops of a region emit onto the host."""
    out: set[Var] = set()
    for e in region.eqns:
        if isinstance(e.op, Loop):
            inner = resting(e.op.body)
            outs = zip(e.outs[e.op.n_carry :], e.op.body.outputs[e.op.n_carry :], strict=True)
            out.update(v for j, (v, x) in enumerate(outs) if j in e.op.host or x in inner)
    return out


def roots_of(region: Region) -> dict[Var, Var]:
    """The value that owns the storage of each value."""
    owner: dict[Var, Var] = {}
    for e in region.eqns:
        for k, v in enumerate(e.outs):
            shared = shared_with(e, k)
            owner[v] = v if shared is None else owner.get(shared, shared)
    return owner


def _bytes(values: Iterable[Var]) -> int:
    return sum(nbytes(v.type) for v in values)
