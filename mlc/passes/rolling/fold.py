"""Folding: a run of equal iterations becomes one loop equation (the second half of :mod:`mlc.passes.rolling.roll`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from mlc.ir.builder import Builder
from mlc.ir.core import (
    Draw,
    Effect,
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
    Seed,
    Stop,
    Var,
    flat_vars,
    map_vars,
)
from mlc.ir.types import SeqType

__all__ = ["Fold", "Uses"]


class Uses:
    """Who reads what while a recording is being rolled, and what stands for what.

    ``exits`` tells the depths of loops that a value leaves whoever reads it (see :mod:`mlc.passes.rolling.exits`);
    ``depth`` is that of the loop being folded.
    """

    depth: int

    def __init__(self, eqns: Iterable[Eqn], results: Iterable[Var], exits: dict[Var, set[int]]) -> None:
        self.exits = exits
        self.repl: dict[Var, Var] = {}
        self.uses: dict[Var, set[int]] = defaultdict(set)
        eqns = list(eqns)
        for e in eqns:
            for v in e.inputs:
                self.uses[v].add(id(e))
        self.results = set(results)
        self.keep: list[Eqn] = []
        self.made: dict[Var, tuple[int, Eqn]] = {}  # where each value was made, in the order of the recording
        for i, e in enumerate(eqns):
            self.enter(e, i)

    def enter(self, e: Eqn, place: int) -> None:
        """Note who makes what."""
        self.made.update((v, (place, e)) for v in e.outs)

    def leads(self, start: set[Var], ends: Iterable[Var], depth: int) -> bool:
        """Whether a gradient taken in so many declared levels passes from any of ``start`` to any of ``ends``."""
        first = min((self.made[v][0] for v in start if v in self.made), default=-1)
        seen: set[Var] = set()
        todo = list(ends)
        while todo:
            v = todo.pop()
            if v in start:
                return True
            place, e = self.made.get(v, (-1, None))
            if e is None or v in seen or place < first:
                continue
            seen.add(v)
            if not (isinstance(e.op, Stop) and (e.op.level is None or e.op.level <= depth)):
                todo.extend(x for x in e.inputs if x.type.is_float or isinstance(x.type, SeqType))
        return False


class Fold:
    """One run of equal iterations becomes a loop equation."""

    def __init__(self, roller: Uses, group: list[list[Eqn]]) -> None:
        self.roller = roller
        self.group = group
        self.local = [{v: (i, o) for i, e in enumerate(it) for o, v in enumerate(e.outs)} for it in group]
        self.carries: dict[Any, tuple[Var, Var]] = {}
        self.ids = {id(e) for it in group for e in it}

    def build(self) -> list[Eqn] | None:
        """Equations before the loop, the loop, and those that take its results apart; None when it cannot be."""
        columns = self.columns()
        if columns is None or not all(map(self.whole, self.group)):
            return None
        template = self.group[0]
        found = self.effects(template)
        if found is None:
            return None
        effects, fed = found
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

    def whole(self, it: list[Eqn]) -> bool:
        """Whether every way that a gradient of this trip goes lies in the trip.

        A body that begins in the middle of an iteration takes a part of the loss from the trip before.
        """
        local = {v: e for e in it for v in e.outs}
        for e in it:
            if not isinstance(e.op, Grad):
                continue
            targets = set(e.args[e.op.n_loss : e.op.n_loss + e.op.n_wrt])
            outside, seen, todo = set(), set(), list(e.args[: e.op.n_loss])
            while todo:
                v = todo.pop()
                if v in seen or v in targets:
                    continue
                seen.add(v)
                if v in local:
                    todo.extend(x for x in local[v].inputs if x.type.is_float or isinstance(x.type, SeqType))
                else:
                    outside.add(v)
            if self.roller.leads({v for v in targets if v not in local}, outside, e.op.depth):
                return False
        return True

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
        """``"const"``, ``"seq"``, the place of a carry's next value, or None when it has none of these roles."""
        if all(v is column[0] for v in column):
            return "const"
        at = self.local[0].get(column[1])
        if at is not None:
            ok = all(self.local[k - 1].get(column[k]) == at for k in range(1, len(column)))
            return at if ok and column[0] not in self.local[0] else None
        anywhere = any(v in loc for v in column for loc in self.local)
        return None if anywhere else "seq"

    def effects(self, template: list[Eqn]) -> tuple[list[Any], set[int]] | None:
        """Random draws and batches taken out of the body, when all of its random numbers can be.

        None when the trips draw from iterables in a way that does not advance evenly.
        """
        loose = [i for i, e in enumerate(template) if e.impure]
        if any(
            isinstance(template[i].op, Random) and template[i].inputs for i in loose
        ):  # needs what the trip computes
            staying = [i for i in loose if not isinstance(template[i].op, Draw)]
            if any(it[i].op != template[i].op for it in self.group for i in staying):
                return None
            loose = [i for i in loose if isinstance(template[i].op, Draw)]
        out = advancing([tuple([_effect(it[i]) for i in loose]) for it in self.group])
        return None if out is None else (list(out), {id(template[i]) for i in loose})

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
                    if not (v in r.results or r.uses[v] - self.ids or r.depth in r.exits.get(v, ())):
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
        """Equations before the loop, the loop itself, and what takes its results apart."""
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
            if v in r.exits:
                r.exits[new] = r.exits[v]
        for e in out:
            for v in flat_vars(e.args, e.kwargs):
                r.uses[v].add(id(e))
        r.keep.extend(out)
        place = max((r.made[v][0] for it in self.group for e in it for v in e.outs if v in r.made), default=0)
        for e in out:
            r.enter(e, place)
        for it in self.group:
            r.keep.extend(it)
            for e in it:
                for v in e.inputs:
                    r.uses[v].discard(id(e))


def _effect(e: Eqn) -> Effect:
    if isinstance(e.op, Feed):
        return NestedEffects(e.op.effects, e.op.trips)
    assert isinstance(e.op, (Random, Draw, Seed))
    kwargs = tuple((k, _frozen(v)) for k, v in e.kwargs)
    return EffectCall(e.op, _frozen(e.args), kwargs, tuple(v.type for v in e.outs))


def advancing(rows: Sequence[tuple[Effect, ...]]) -> tuple[Effect, ...] | None:
    """Effects of all trips as those of one; None when an iteration over an iterable does not advance evenly."""
    out: list[Effect] = []
    for column in zip(*rows, strict=True):
        e = column[0]
        if isinstance(e, NestedEffects):
            inner = advancing([x.effects for x in column if isinstance(x, NestedEffects)])
            if inner is None:
                return None
            e = replace(e, effects=inner)
        elif isinstance(e.op, Draw):
            first = e.op.visit
            visits = [x.op.visit for x in column if isinstance(x, EffectCall) and isinstance(x.op, Draw)]
            step = visits[1] - first
            if any(v != first + k * step for k, v in enumerate(visits)):
                return None
            steps = (step, *e.op.steps)
            e = replace(e, op=replace(e.op, steps=steps if any(steps) else ()))
        out.append(e)
    return tuple(out)


def _frozen(a: Any) -> Any:
    """Literals with tuples in place of lists."""
    return tuple(_frozen(x) for x in a) if isinstance(a, (list, tuple)) else a


def _blank(b: Builder, v: Var) -> Var:
    """Initial value of a result that only the last trip defines."""
    return b.zero(v.type)


def _label(it: Iterable[Eqn]) -> str:
    return "train" if any(isinstance(e.op, Grad) for e in it) else "loop"
