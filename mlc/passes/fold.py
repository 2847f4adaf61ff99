"""Folding: a run of equal iterations becomes one loop equation (the second half of :mod:`mlc.passes.roll`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from mlc.ir.builder import Builder
from mlc.ir.core import (
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
    Seed,
    Var,
    flat_vars,
    map_vars,
)
from mlc.ir.types import SeqType

__all__ = ["Fold", "Uses"]


class Uses:
    """Who reads what while a recording is being rolled, and what stands for what."""

    def __init__(self, eqns: Iterable[Eqn], results: Iterable[Var]) -> None:
        self.repl: dict[Var, Var] = {}
        self.uses: dict[Var, set[int]] = defaultdict(set)
        for e in eqns:
            for v in e.inputs:
                self.uses[v].add(id(e))
        self.results = set(results)
        self.keep: list[Eqn] = []


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
        """``"const"``, ``"seq"``, the place of a carry's next value, or None when it has none of these roles."""
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
        loose = [e for e in template if e.impure]
        if any(isinstance(e.op, Random) and e.inputs for e in loose):  # it depends on what the trip computes
            loose = [e for e in loose if isinstance(e.op, Draw)]
        out: list[Any] = []
        for e in loose:
            if isinstance(e.op, Feed):
                out.append(NestedEffects(e.op.effects, e.op.trips))
            else:
                assert isinstance(e.op, (Random, Draw, Seed))
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
