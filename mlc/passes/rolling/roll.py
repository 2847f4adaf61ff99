"""Rolling: the T recorded iterations of a user's loop become one loop body.

Input is the flat recording, whose equations know the loop iterations they ran in.  Iterations are compared by
structure (operators, literals, types, local references); runs of equal ones, possibly with a period, become ``loop``
equations, inner loops first.  References to the outside decide the roles: the same value every time is a constant, a
value of the iteration before is a carry, anything else a sequence.  Iterations that differ (a first step that creates
optimizer state in a special way, a smaller last batch) stay outside, as straight code.

Cost: linear in the recording, times the periods tried (at most 12).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch._ops import OpOverload

from mlc.ir.builder import Builder
from mlc.ir.core import (
    Custom,
    Draw,
    Eqn,
    Grad,
    Index,
    Loop,
    Region,
    Var,
    map_vars,
)
from mlc.ir.origin import Origin
from mlc.passes.rolling.exits import even_exits
from mlc.passes.rolling.fold import Fold, Uses
from mlc.passes.rolling.liveness import live_equations
from mlc.passes.rolling.quotients import regrouped
from mlc.passes.rolling.scalars import holes, literal_key, spell_out

__all__ = ["RollResult", "roll"]


@dataclass
class _LoopItem:
    instance: int
    iterations: list[list[Any]] = field(default_factory=list)


@dataclass
class RollResult:
    """The rolled region and, for readers, what stayed unrolled and why."""

    region: Region
    notes: list[str]


def roll(eqns: Sequence[Eqn], inputs: Sequence[Var], results: Sequence[Var], names: Sequence[str]) -> RollResult:
    """Roll a flat recording.

    Args:
        eqns: Recorded equations in order.
        inputs: Values of tensors from outside.
        results: Values that the program returns (outputs and final states).
        names: Names of the inputs, for readers.
    """
    eqns = regrouped(eqns)
    loops = _worth_rolling(eqns)
    paths = {id(e): _truncate(e, loops) for e in eqns}
    eqns = live_equations([e for e in eqns], results, paths)
    paths = {id(e): _truncate(e, loops) for e in eqns}
    r = _Roller(eqns, results, even_exits(eqns, results, paths))
    flat = r.run(_tree(eqns, paths))
    outs = tuple(r.now(v) for v in results)
    return RollResult(Region(tuple(inputs), tuple(flat), outs, tuple(names)), r.notes)


def _worth_rolling(eqns: Sequence[Eqn]) -> set[int]:
    """Loop instances that train or draw; all loops when the program takes no gradient."""
    any_grad = any(isinstance(e.op, Grad) for e in eqns)
    out: set[int] = set()
    for e in eqns:
        if e.site is None:
            continue
        if isinstance(e.op, (Grad, Draw)) or e.origin is Origin.UPDATE or not any_grad:
            out.update(i for i, _ in e.site.path)
    return out


def _truncate(e: Eqn, loops: set[int]) -> tuple[tuple[int, int], ...]:
    return () if e.site is None else tuple(p for p in e.site.path if p[0] in loops)


def _tree(eqns: Sequence[Eqn], paths: dict[int, tuple[tuple[int, int], ...]]) -> list[Any]:
    root: list[Any] = []
    for e in eqns:
        at = root
        for instance, iteration in paths[id(e)]:
            last = at[-1] if at else None
            if not isinstance(last, _LoopItem) or last.instance != instance:
                last = _LoopItem(instance)
                at.append(last)
            while len(last.iterations) <= iteration:
                last.iterations.append([])
            at = last.iterations[iteration]
        at.append(e)
    return root


class _Roller(Uses):
    def __init__(self, eqns: Sequence[Eqn], results: Sequence[Var], exits: dict[Var, set[int]]) -> None:
        super().__init__(eqns, results, exits)
        self.depth = -1
        self.notes: list[str] = []

    def now(self, v: Var) -> Var:
        """The value that now stands for ``v``."""
        while v in self.repl:
            v = self.repl[v]
        return v

    def fresh(self, e: Eqn) -> Eqn:
        """The equation with replaced inputs; keeps track of who uses what."""
        if not any(v in self.repl for v in e.inputs):
            return e
        new = e.with_(args=map_vars(e.args, self.now), kwargs=tuple((k, map_vars(v, self.now)) for k, v in e.kwargs))
        self.adopt(e, new)
        return new

    def adopt(self, old: Eqn, new: Eqn) -> None:
        self.keep.append(old)
        self.enter(new, max((self.made[v][0] for v in old.outs if v in self.made), default=-1))
        for v in new.inputs:
            self.uses[v].discard(id(old))
            self.uses[v].add(id(new))

    def run(self, items: list[Any]) -> list[Eqn]:
        out: list[Eqn] = []
        for item in items:
            if isinstance(item, _LoopItem):
                out.extend(self.loop(item))
            else:
                out.append(self.fresh(item))
        return out

    def loop(self, item: _LoopItem) -> list[Eqn]:
        """One instance of a user's loop: inner loops, hoisting, then runs of equal iterations."""
        iterations: list[list[Eqn]] = []
        self.depth += 1
        for it in item.iterations:
            iterations.append(self.run(it))
        before, iterations = self.hoist(iterations)
        iterations, extra = self.tables(iterations)
        out = [*before, *extra]
        out.extend(self.runs(iterations))
        self.depth -= 1
        return out

    # ---- hoisting

    def hoist(self, iterations: list[list[Eqn]]) -> tuple[list[Eqn], list[list[Eqn]]]:
        """Take factories, and invariant equations whose literals differ from trip to trip, out of the loop."""
        inside = {v for it in iterations for e in it for v in e.outs}
        literals: dict[Any, set[Any]] = defaultdict(set)
        tied: set[Any] = set()
        placed: list[list[tuple[Any, Eqn]]] = []
        present: dict[Any, int] = defaultdict(int)
        for it in iterations:
            loose: set[Var] = set()
            counts: dict[Any, int] = defaultdict(int)
            row = [(self.aligned(e, counts), e) for e in it]
            placed.append(row)
            for at, e in row:
                present[at] += 1
                pure = not (e.impure or isinstance(e.op, (Grad, Loop, Index)))
                if pure and all(v not in inside or v in loose for v in e.inputs):
                    loose.update(e.outs)
                    literals[at].add(literal_key(e, strict=True))
                else:
                    tied.add(at)
        free = {at for at in literals if at not in tied}
        moved: set[int] = set()
        for row in placed:
            needed: set[Var] = set()
            for at, e in reversed(row):
                odd = at in free and (len(literals[at]) > 1 or present[at] < len(iterations))
                wanted = not e.inputs or odd or any(v in needed for v in e.outs)
                if wanted and (at in free or not e.inputs) and not e.impure:
                    moved.add(id(e))
                    needed.update(e.inputs)
        for row in placed:
            for _, e in row:
                if id(e) in moved and any(v in inside for v in e.inputs):
                    moved.discard(id(e))
                elif id(e) in moved:
                    inside.difference_update(e.outs)
        before: list[Eqn] = []
        made: dict[Any, Eqn] = {}
        for it in iterations:
            for e in it:
                if id(e) not in moved:
                    continue
                same = made.setdefault(literal_key(e, strict=True), e) if not e.inputs else e
                if same is e:
                    before.append(self.fresh(e))
                else:
                    self.merge(e, same)
        return before, [[self.fresh(e) for e in it if id(e) not in moved] for it in iterations]

    def merge(self, e: Eqn, same: Eqn) -> None:
        """Results of ``e`` are those of ``same``."""
        for v, w in zip(e.outs, same.outs, strict=True):
            self.repl[v] = w
            self.uses[w] |= self.uses[v]
            if v in self.results:
                self.results.add(w)

    @staticmethod
    def aligned(e: Eqn, counts: dict[Any, int]) -> Any:
        op = e.op.title if isinstance(e.op, Custom) else id(e.op) if isinstance(e.op, OpOverload) else e.op
        key = (e.site.key if e.site is not None else None, op)
        counts[key] += 1
        return (*key, counts[key])

    # ---- Python numbers that differ from trip to trip

    def tables(self, iterations: list[list[Eqn]]) -> tuple[list[list[Eqn]], list[Eqn]]:
        """Numbers that vary become 0-d tensors made before the loop (a table that the loop reads)."""
        seen: dict[Any, list[Any]] = {}
        for it in iterations:
            counts: dict[Any, int] = defaultdict(int)
            for e in it:
                h = holes(e)
                if h:
                    seen.setdefault(self.aligned(e, counts), []).append(h)
        vary = {k for k, hs in seen.items() if any(h != hs[0] for h in hs[1:])}
        if not vary:
            return iterations, []
        before = Builder(merge=True)
        out: list[list[Eqn]] = []
        for it in iterations:
            counts = defaultdict(int)
            new: list[Eqn] = []
            for e in it:
                if holes(e) and self.aligned(e, counts) in vary:
                    spelled = spell_out(e, before)
                    for s in spelled:
                        self.adopt(e, s)
                    new.extend(spelled)
                else:
                    new.append(e)
            out.append(new)
        return out, list(before.eqns)

    # ---- runs

    def runs(self, iterations: list[list[Eqn]]) -> list[Eqn]:
        """Cut a list of iterations into loops and straight code."""
        if len(iterations) < 2:
            return [e for it in iterations for e in map(self.fresh, it)]
        keys = [self.signature(it) for it in iterations]
        found = _best_run(keys)
        if found is None:
            self.notes.append(f"{len(iterations)} iterations that all differ stay unrolled")
            return [self.fresh(e) for it in iterations for e in it]
        start, period, reps = found
        while reps >= 2:
            group = [
                [e for it in iterations[start + k * period : start + (k + 1) * period] for e in it] for k in range(reps)
            ]
            made = Fold(self, group).build()
            if made is not None:
                break
            start, reps = start + 1, (len(iterations) - start - 1 if period == 1 else reps * period - 1) // period
            while reps >= 2 and not all(keys[start + i] == keys[start + i % period] for i in range(reps * period)):
                reps -= 1
        if reps < 2 or made is None:
            self.notes.append(f"{len(iterations)} iterations are linked in a way that cannot be rolled")
            return [self.fresh(e) for it in iterations for e in it]
        end = start + reps * period
        if start or end < len(iterations):
            self.notes.append(
                f"iterations {start} to {end - 1} of {len(iterations)} are rolled"
                + (f" with period {period}" if period > 1 else "") + "; the others differ from them"
            )  # fmt: skip
        head = self.runs(iterations[:start]) if start else []
        made = [self.fresh(e) for e in made]  # it was made before the loops that it now follows
        tail_items = [[self.fresh(e) for e in it] for it in iterations[end:]]
        return [*head, *made, *(self.runs(tail_items) if tail_items else [])]

    def signature(self, it: Sequence[Eqn]) -> Any:
        local: dict[Var, tuple[int, int]] = {}
        parts = []
        for i, e in enumerate(it):
            refs = tuple(local.get(v, v.type) for v in e.inputs)
            parts.append((literal_key(e, strict=False), refs, tuple(v.type for v in e.outs)))
            for o, v in enumerate(e.outs):
                local[v] = (i, o)
        return tuple(parts)


def _best_run(keys: list[Any]) -> tuple[int, int, int] | None:
    """(start, period, repetitions) that covers most iterations; None when nothing repeats."""
    ids: dict[Any, int] = {}
    s = [ids.setdefault(k, len(ids)) for k in keys]
    n, best, score = len(s), None, 0.0
    for q in range(1, min(n // 2, 12) + 1):
        i = 0
        while i + q < n:
            j = i
            while j + q < n and s[j] == s[j + q]:
                j += 1
            reps = (j - i) // q + 1
            gain = (reps - 1) * q - (q - 1) * 0.5
            if reps >= 2 and gain > score:
                best, score = (i, q, reps), gain
            i = j + 1
    return best
