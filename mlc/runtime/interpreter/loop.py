"""Running loops: trip by trip, forward or in reverse, with sequences that may be drawn on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlc.ir.core import Eqn, Feed, Loop, Region
from mlc.ir.opaque.call import Call
from mlc.ir.opaque.estimates import Keep, Noise, Recall, Solve, Tell
from mlc.runtime.interpreter.host import Column, Reader, Shelf
from mlc.runtime.interpreter.interpreter import Executable, compile_region
from mlc.runtime.interpreter.meter import Meter
from mlc.runtime.interpreter.particles import Window, keep_runner, recall_runner
from mlc.runtime.interpreter.recording import REPLAY, each_trip
from mlc.runtime.interpreter.solve import SolveRunner, Told, noise_runner, tell_runner
from mlc.runtime.interpreter.states import Rebuilt, States

__all__ = ["LoopRunner", "link"]


class LoopRunner:
    """A compiled loop equation; called with its arguments in a list, returns its results in a list."""

    def __init__(self, op: Loop, body: Executable, replay: Executable | None = None,
                 tell: Callable[[Told], None] = lambda told: None) -> None:  # fmt: skip
        self.op = op
        self.tell = tell
        self.watch = [w for w in op.watch if w.kind != "state"]
        self.body = each_trip(body, op.title or "loop")
        self.replay = None if replay is None else each_trip(replay, REPLAY)
        self.rebuilt = _rebuilt(op)
        self.sparse_on_host = any(j in self.rebuilt for j in op.host)
        self.hosted = [j for j in op.host if j not in self.rebuilt]
        self.dense = [j for j in range(op.n_emit) if j not in self.rebuilt and j not in op.host]

    def trips(self, seqs: list[Any]) -> int | None:
        """How many trips: fixed, the length of a sequence, or None until a lazy one ends."""
        for s in seqs:
            n = getattr(s, "length", None) if not isinstance(s, list) else len(s)
            if n is not None and self.op.trips is None:
                return int(n)
        return self.op.trips

    def _meters(self) -> list[Meter]:
        """For what is measured of the trips; a loop around those that are only tells that a run begins."""
        meters = [Meter(w, self.op.trips) for w in self.watch]
        for m in meters:
            if not m.watch.carries:
                self.tell(m.read())
        return [m for m in meters if m.watch.carries]

    def __call__(self, args: list[Any]) -> list[Any]:
        """Run all trips; ``args`` is emptied."""
        op = self.op
        nc, nk = op.n_carry, op.n_const
        carries, consts, seqs = args[:nc], args[nc : nc + nk], args[nc + nk :]
        args.clear()
        n = self.trips(seqs)
        shelf, reader = Shelf(), Reader(seqs)
        emitted: list[Any] = [[] for _ in range(op.n_emit)]
        for k, j in enumerate(self.hosted):
            emitted[j] = Column(shelf, k)
        meters = self._meters()
        states = None if self.replay is None else States(op, self.replay, consts, seqs, emitted, self.sparse_on_host)
        t = 0
        while n is None or t < n:
            at = n - 1 - t if op.reverse and n is not None else t
            try:
                ins = [*carries, *consts, *reader.take(at)]
            except StopIteration:
                break
            reader.fetch(at - 1 if op.reverse else at + 1)
            if states is not None:
                states.offer(t, carries)
            for m in meters:
                m.enter(carries)
            carries = []
            outs = self.body(ins)
            for j in self.dense:
                emitted[j].append(outs[nc + j])
            if self.hosted:
                shelf.put([outs[nc + j] for j in self.hosted])
            carries = outs[:nc]
            del outs
            for m in meters:
                m.leave(carries)
            t += 1
        shelf.settle()
        for m in meters:
            self.tell(m.read())
        if op.reverse:
            for s in (shelf.parcels, *[emitted[j] for j in self.dense]):
                s.reverse()
        if states is not None:
            states.settle()
            for j, k in self.rebuilt.items():
                emitted[j] = Rebuilt(states, k)
        return [*carries, *emitted]


def _rebuilt(op: Loop) -> dict[int, int]:
    """Emissions that are rebuilt, and which state each one is."""
    if op.replay is None:
        return {}
    where = {op.body.inputs[c]: k for k, c in enumerate(op.replay.carries)}
    emitted = op.body.outputs[op.n_carry :]
    return {j: where[v] for j, v in enumerate(emitted) if v in where}


def link(
    feed: Callable[[Feed], Callable[..., Any]],
    draw: Callable[[Eqn], Callable[..., Any] | None],
    compile: Callable[..., Executable] = compile_region,
    tell: Callable[[Told], None] = lambda told: None,
    window: Callable[[], Window] = Window,
) -> Callable[[Eqn], Callable[..., Any] | None]:
    """The ``special`` function of :func:`compile_region` for whole programs.

    ``compile`` lowers loop bodies; ``tell`` hears of every linear solve and of what else is told;
    ``window`` gives the particles of the call.
    """
    known: dict[int, tuple[Any, Executable]] = {}

    def compiled(region: Region) -> Executable:
        entry = known.get(id(region))
        if entry is None:
            entry = known[id(region)] = (region, compile(region, special))
        return entry[1]

    def special(e: Eqn) -> Callable[..., Any] | None:
        if isinstance(e.op, Solve):
            return SolveRunner(e.op, compiled(e.op.body), tell)
        if isinstance(e.op, Noise):
            return noise_runner(e)
        if isinstance(e.op, Recall):
            return recall_runner(e.op, window)
        if isinstance(e.op, Keep):
            return keep_runner(e.op, window)
        if isinstance(e.op, Tell):
            return tell_runner(e.op, tell)
        if isinstance(e.op, Loop):
            replay = None if e.op.replay is None else compiled(e.op.replay.body)
            return LoopRunner(e.op, compiled(e.op.body), replay, tell)
        if isinstance(e.op, Feed):
            return feed(e.op)
        if isinstance(e.op, Call):
            return e.op.callee
        return draw(e)

    return special
