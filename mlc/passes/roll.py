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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlc.ir.builder import Builder
from mlc.ir.core import (
    Custom,
    Draw,
    EffectCall,
    Eqn,
    Feed,
    Grad,
    Index,
    Loop,
    NestedEffects,
    Pack,
    Random,
    Region,
    Var,
    flat_vars,
    map_vars,
)
from mlc.ir.types import SeqType
from mlc.passes.liveness import live_equations
from mlc.passes.scalars import holes, literal_key, spell_out

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
    loops = _worth_rolling(eqns)
    paths = {id(e): _truncate(e, loops) for e in eqns}
    eqns = live_equations([e for e in eqns], results, paths)
    paths = {id(e): _truncate(e, loops) for e in eqns}
    r = _Roller(eqns, results)
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
        if isinstance(e.op, (Grad, Draw)) or e.tag == "update" or not any_grad:
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


class _Roller:
    def __init__(self, eqns: Sequence[Eqn], results: Sequence[Var]) -> None:
        self.repl: dict[Var, Var] = {}
        self.notes: list[str] = []
        self.uses: dict[Var, set[int]] = defaultdict(set)
        for e in eqns:
            for v in e.inputs:
                self.uses[v].add(id(e))
        self.results = set(results)
        self.origin: dict[int, int] = {}
        self.keep: list[Eqn] = []

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
        for it in item.iterations:
            iterations.append(self.run(it))
        before, iterations = self.hoist(iterations)
        iterations, extra = self.tables(iterations)
        out = [*before, *extra]
        out.extend(self.runs(iterations))
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
        op = e.op.title if isinstance(e.op, Custom) else e.op
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
            made = _Fold(self, group).build()
            if made is not None:
                break
            start, reps = start + 1, (len(iterations) - start - 1 if period == 1 else reps * period - 1) // period
            while reps >= 2 and not all(
                keys[start + i] == keys[start + i % period] for i in range(reps * period)
            ):
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
    n, best, score = len(s), None, 0
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


class _Fold:
    """One run of equal iterations becomes a loop equation."""

    def __init__(self, roller: _Roller, group: list[list[Eqn]]) -> None:
        self.roller = roller
        self.group = group
        self.local = [{v: (i, o) for i, e in enumerate(it) for o, v in enumerate(e.outs)} for it in group]
        self.carries: dict[Any, tuple[Var, Var]] = {}
        self.ids = {id(e) for it in group for e in it}

    def build(self) -> list[Eqn] | None:
        """Equations before the loop, the loop, and those that take its results apart; None when it cannot be."""
        columns = self.columns()
        if columns is None:
            return None
        template = self.group[0]
        effects, fed = self.effects(template)
        env: dict[Var, Var] = {}
        carry_in, inits, nexts, const_in, consts, seq_in, packs = [], [], [], [], [], [], []
        for column, kind in columns.items():
            v = Var(column[0].type)
            if isinstance(kind, tuple):
                carry_in.append(v)
                inits.append(column[0])
                nexts.append(template[kind[0]].outs[kind[1]])
            elif kind == "const":
                const_in.append(v)
                consts.append(column[0])
            else:
                seq_in.append(v)
                packs.append(column)
            self.columns_in[column] = v
        final, emits, extra = self.leaving(template, nexts)
        for var in extra:
            carry_in.append(Var(var.type))
            nexts.append(var)
        body_eqns = []
        for i, e in enumerate(template):
            if id(e) in fed:
                continue
            body_eqns.append(self.localise(e, i, env))
        return self.emit(effects, fed, template, carry_in, inits, nexts, const_in, consts, seq_in, packs, body_eqns,
                         final, emits, extra)  # fmt: skip

    def columns(self) -> dict[tuple[Var, ...], Any] | None:
        """Outside references, one column per distinct sequence of values, with its role."""
        self.columns_in: dict[tuple[Var, ...], Var] = {}
        self.column_at: dict[tuple[int, int], tuple[Var, ...]] = {}
        out: dict[tuple[Var, ...], Any] = {}
        for i in range(len(self.group[0])):
            ins = [it[i].inputs for it in self.group]
            for a in range(len(ins[0])):
                if ins[0][a] in self.local[0]:
                    continue
                column = tuple([x[a] for x in ins])
                if column not in out:
                    kind = self.role(column)
                    if kind is None:
                        return None
                    out[column] = kind
                self.column_at[(i, a)] = column
        return out

    def role(self, column: tuple[Var, ...]) -> Any:
        if all(v is column[0] for v in column):
            return "const"
        at = self.local[0].get(column[1])
        if at is not None:
            ok = all(self.local[k - 1].get(column[k]) == at for k in range(1, len(column)))
            return at if ok and column[0] not in self.local[0] else None
        anywhere = any(v in loc for v in column for loc in self.local)
        return None if anywhere else "seq"

    def effects(self, template: list[Eqn]) -> tuple[list[Any], set[int]]:
        """Random draws and batches taken out of the body, when all of its random numbers can be."""
        inside = {v for e in template for v in e.outs}
        loose = [e for e in template if e.impure]
        if any(isinstance(e.op, Random) and any(v in inside for v in e.inputs) for e in loose):
            loose = [e for e in loose if isinstance(e.op, Draw)]
        elif any(isinstance(e.op, Random) and e.inputs for e in loose):
            loose = [e for e in loose if isinstance(e.op, Draw)]
        out: list[Any] = []
        for e in loose:
            if isinstance(e.op, Feed):
                out.append(NestedEffects(e.op.effects, e.op.trips))
            else:
                assert isinstance(e.op, (Random, Draw))
                kwargs = tuple((k, _frozen(v)) for k, v in e.kwargs)
                out.append(EffectCall(e.op, _frozen(e.args), kwargs, tuple(v.type for v in e.outs)))
        return out, {id(e) for e in loose}

    def leaving(self, template: list[Eqn], nexts: list[Var]) -> tuple[dict[Var, Any], list[Var], list[Var]]:
        """Values used after the loop: by the last trip only (carried out) or by others (emitted)."""
        r = self.roller
        final: dict[Var, Any] = {}
        emits: list[Var] = []
        extra: list[Var] = []
        last = len(self.group) - 1
        known = {v: n for n, v in enumerate(nexts)}
        for k, it in enumerate(self.group):
            for i, e in enumerate(it):
                for o, v in enumerate(e.outs):
                    if not (v in r.results or r.uses[v] - self.ids):
                        continue
                    mine = template[i].outs[o]
                    if k == last and (mine in known or not isinstance(mine.type, SeqType)):
                        if mine not in known:
                            known[mine] = len(nexts) + len(extra)
                            extra.append(mine)
                        final[v] = ("carry", known[mine])
                    else:
                        if mine not in emits:
                            emits.append(mine)
                        final[v] = ("emit", emits.index(mine), k)
        return final, emits, extra

    def localise(self, e: Eqn, i: int, env: dict[Var, Var]) -> Eqn:
        """The template's equation with outside references replaced by body inputs."""
        counter = iter(range(10**9))

        def look(v: Var) -> Var:
            column = self.column_at.get((i, next(counter)))
            return v if column is None else self.columns_in[column]

        args = map_vars(e.args, look)
        return e.with_(args=args, kwargs=tuple((k, map_vars(v, look)) for k, v in e.kwargs), site=None)

    def emit(self, effects: list[Any], fed: set[int], template: list[Eqn], carry_in: list[Var], inits: list[Var],
             nexts: list[Var], const_in: list[Var], consts: list[Var], seq_in: list[Var],
             packs: list[tuple[Var, ...]], body_eqns: list[Eqn], final: dict[Var, Any], emits: list[Var],
             extra: list[Var]) -> list[Eqn]:  # fmt: skip
        n = len(self.group)
        b = Builder(merge=False)
        out: list[Eqn] = []
        for v in extra:
            inits.append(_blank(b, v))
        out += b.eqns
        seq_args: list[Var] = []
        for column in packs:
            packed = Var(SeqType(column[0].type, n))
            out.append(Eqn(Pack(), column, (packed,)))
            seq_args.append(packed)
        for e in template:
            if id(e) in fed:
                seq_in.extend(e.outs)
        if effects:
            drawn = tuple(Var(SeqType(v.type, n)) for e in template if id(e) in fed for v in e.outs)
            out.append(Eqn(Feed(tuple(effects), n), (), drawn, loc=template[0].loc))
            seq_args.extend(drawn)
        body = Region((*carry_in, *const_in, *seq_in), tuple(body_eqns), (*nexts, *emits))
        label = _label(self.group[0])
        op = Loop(body, len(carry_in), len(const_in), n, label=label)
        outs = tuple(Var(v.type) for v in nexts) + tuple(Var(SeqType(v.type, n)) for v in emits)
        loc = next((e.loc for e in template if e.loc is not None), None)
        eqn = Eqn(op, (*inits, *consts, *seq_args), outs, loc=loc)
        out.append(eqn)
        self.finish(out, eqn, outs, len(nexts), final)
        return out

    def finish(self, out: list[Eqn], eqn: Eqn, outs: tuple[Var, ...], n_carry: int, final: dict[Var, Any]) -> None:
        """Later references now go to the loop's results."""
        r = self.roller
        for v, where in final.items():
            if where[0] == "carry":
                new = outs[where[1]]
            else:
                seq = outs[n_carry + where[1]]
                new = Var(v.type)
                out.append(Eqn(Index(where[2]), (seq,), (new,)))
            r.repl[v] = new
            r.uses[new] |= r.uses[v] - self.ids
            if v in r.results:
                r.results.add(new)
        for e in out:
            for v in flat_vars(e.args, e.kwargs):
                r.uses[v].add(id(e))
        r.keep.extend(out)
        r.keep.extend(e for it in self.group for e in it)


def _frozen(a: Any) -> Any:
    """Literals with tuples in place of lists."""
    return tuple(_frozen(x) for x in a) if isinstance(a, (list, tuple)) else a


def _blank(b: Builder, v: Var) -> Var:
    """Initial value of a result that only the last trip defines."""
    return b.zero(v.type)


def _label(it: Iterable[Eqn]) -> str:
    return "train" if any(isinstance(e.op, Grad) for e in it) else "loop"
