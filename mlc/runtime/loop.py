"""Running loops: trip by trip, forward or in reverse, with sequences that may be drawn on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlc.ir.core import Eqn, Feed, Loop
from mlc.runtime.interpreter import Executable, compile_region
from mlc.runtime.recording import each_trip

__all__ = ["LoopRunner", "link"]


class LoopRunner:
    """A compiled loop equation; called with its arguments in a list, returns its results in a list."""

    def __init__(self, op: Loop, body: Executable) -> None:
        self.op = op
        self.body = each_trip(body, op.label or "loop")
        n = op.n_emit
        self.every = op.emit_every or (1,) * n

    def trips(self, seqs: list[Any]) -> int | None:
        """How many trips: fixed, the length of a sequence, or None until a lazy one ends."""
        for s in seqs:
            n = getattr(s, "length", None) if not isinstance(s, list) else len(s)
            if n is not None and self.op.trips is None:
                return int(n)
        return self.op.trips

    def __call__(self, args: list[Any]) -> list[Any]:
        """Run all trips; ``args`` is emptied."""
        op = self.op
        nc, nk = op.n_carry, op.n_const
        carries, consts, seqs = args[:nc], args[nc : nc + nk], args[nc + nk :]
        args.clear()
        n = self.trips(seqs)
        emitted: list[list[Any]] = [[] for _ in range(op.n_emit)]
        t = 0
        while n is None or t < n:
            at = n - 1 - t if op.reverse and n is not None else t
            try:
                ins = [*carries, *consts, *[s[at] for s in seqs]]
            except StopIteration:
                break
            carries = []
            outs = self.body(ins)
            for j in range(op.n_emit):
                if at % self.every[j] == 0:
                    emitted[j].append(outs[nc + j])
            carries = outs[:nc]
            del outs
            t += 1
        if op.reverse:
            for s in emitted:
                s.reverse()
        return [*carries, *emitted]


def link(feed: Callable[[Feed], Callable[..., Any]], draw: Callable[[Eqn], Callable[..., Any] | None],
         ) -> Callable[[Eqn], Callable[..., Any] | None]:  # fmt: skip
    """The ``special`` function of :func:`compile_region` for whole programs."""
    known: dict[int, tuple[Any, Executable]] = {}

    def special(e: Eqn) -> Callable[..., Any] | None:
        if isinstance(e.op, Loop):
            entry = known.get(id(e.op.body))
            if entry is None:
                entry = known[id(e.op.body)] = (e.op.body, compile_region(e.op.body, special))
            return LoopRunner(e.op, entry[1])
        if isinstance(e.op, Feed):
            return feed(e.op)
        return draw(e)

    return special
