"""Micro-batches: the part of a region that works on single examples becomes a loop over k parts of the batch.

Before it runs what does not depend on the examples; the loop's sequences are slices (views) of what holds examples,
its carries the sums over them, its emissions the results per example; behind it runs what needs the sums.  Exact:
the same operators on the same examples, sums in another order.  What may be split is proved by
:mod:`mlc.passes.microbatch.independence`; a batch that cannot be is :class:`Refused` with a reason.  The loop's body is
written by :mod:`mlc.passes.microbatch.part`.  O(equations).
"""

from __future__ import annotations

from torch._ops import OpOverload

from mlc.ir.builder import dce, renamed
from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.lowered.contract import Refused
from mlc.ir.types import nbytes
from mlc.passes.microbatch.dependence import MIXED, SUM, Shard
from mlc.passes.microbatch.independence import Analysis, batchwise
from mlc.passes.microbatch.part import LABEL, TAG, Part, Unexpected
from mlc.passes.remat.schedule import on_demand
from mlc.record.retype import shared

__all__ = ["LABEL", "TAG", "microbatch"]


def microbatch(region: Region, k: int, analysis: Analysis | Refused | None = None) -> Region | Refused:
    """The region with its batched part as a loop over ``k`` parts of equal size.

    Args:
        region: Equations without inner gradients; results and inputs stay as they are.
        k: Number of parts; must divide the number of examples.
        analysis: What :func:`batchwise` said about the region, when it has been asked already.
    """
    found = batchwise(region, parts=k) if analysis is None else analysis
    if isinstance(found, Refused):
        return found
    if k < 2 or found.n % k:
        return Refused(f"a batch of {found.n} examples cannot be split into {k} equal parts")
    try:
        return _Split(found, k).build()
    except Unexpected as why:
        return Refused(str(why), why.eqn.loc)


class _Split:
    """The three parts of a region: before, batched, behind."""

    def __init__(self, a: Analysis, k: int) -> None:
        self.a = a
        self.k = k
        self.kinds = a.kinds
        self.retyper = shared()
        self.producer = {v: e for e in a.region.eqns for v in e.outs}
        self.part = Part(a, k, self.retyper)

    def build(self) -> Region:
        """The rewritten region."""
        region = self.a.region
        ready = {v for e in self.a.early for v in e.outs}
        late = [e for e in region.eqns if e.outs and self.kinds[e.outs[0]] is MIXED and e.outs[0] not in ready]
        asked = dict.fromkeys([*(v for e in late for v in e.inputs), *region.outputs])
        leaving = {v: None for v in asked if v in self.producer and v not in ready and self.batched(v)}
        inside = self.cut(leaving)
        for e in inside:
            self.part.run(e, self.a.placed[e])
        loop = self.part.close(list(leaving))
        order = self.ordered()
        before = self.before(order)
        behind = self.behind(order, {*before, *inside}, leaving)
        env = self.part.after
        outputs = tuple(env.get(v, v) for v in region.outputs)
        new = Region(region.inputs, (*before, *self.part.before, *loop, *behind), outputs, region.names)
        return on_demand(dce(new), lambda e: e.origin is TAG and isinstance(e.op, Loop))

    def batched(self, v: Var) -> bool:
        """Whether a value depends on the examples without mixing them."""
        return self.kinds[v] is SUM or isinstance(self.kinds[v], Shard)

    def cut(self, leaving: dict[Var, None]) -> list[Eqn]:
        """Equations of the loop.  One that only reshapes or scales a sum on its way out runs once, behind it."""
        inside: list[Eqn] = []
        read: set[Var] = set()
        for e in reversed(self.a.region.eqns):
            if e not in self.a.placed or not any(v in leaving or v in read for v in e.outs):
                continue
            source = None if any(v in read for v in e.outs) else self.scaled(e)
            if source is None:
                inside.append(e)
                read.update(e.inputs)
                continue
            for v in e.outs:
                leaving.pop(v, None)
            leaving[source] = None
        return inside[::-1]

    def scaled(self, e: Eqn) -> Var | None:
        """The only sum that an equation reads, when its result is no smaller."""
        p = self.a.placed[e]
        found = {v: None for v in e.inputs if self.batched(v)}
        if len(found) != 1 or p.whole or p.local.divide is not None:
            return None
        (v,) = found
        small = nbytes(v.type) <= sum(nbytes(x.type) for x in e.outs)
        return v if small and self.kinds[v] is SUM else None

    def ordered(self) -> list[Eqn]:
        """Every equation in the order of the region, added ones where their equation stood."""
        out: list[Eqn] = []
        for e in self.a.region.eqns:
            if e in self.a.placed:
                out += self.a.placed[e].local.early
            out.append(e)
        return out

    def before(self, order: list[Eqn]) -> list[Eqn]:
        """Equations that the loop needs, on all examples or on none; and impure ones, in their order."""
        made = {v: e for e in order if e not in self.a.placed or e in self.a.early for v in e.outs}
        needed: set[Eqn] = set()
        todo = [v for e in self.part.before for v in e.inputs] + [*self.part.consts]
        todo += [v for e in order if e.impure or e in self.a.early for v in (*e.inputs, *e.outs)]
        while todo:
            e = made.get(todo.pop())
            if e is not None and e not in needed:
                needed.add(e)
                todo += e.inputs
        return [e for e in order if e in needed or e.impure]

    def behind(self, order: list[Eqn], done: set[Eqn], leaving: dict[Var, None]) -> list[Eqn]:
        """Equations that only results need, on what leaves the loop."""
        needed = set(self.a.region.outputs) - set(leaving)
        out: list[Eqn] = []
        for e in reversed(order):
            if e not in done and any(v in needed for v in e.outs):
                out.append(e)
                needed.update(v for v in e.inputs if v not in leaving)
        return self.retyped(out[::-1])

    def retyped(self, eqns: list[Eqn]) -> list[Eqn]:
        """Late equations, on the results of the loop; types follow where the layout of a result is another."""
        env = self.part.after
        out = []
        for e in eqns:
            if all(env.get(v, v).type == v.type for v in e.inputs) or not isinstance(e.op, OpOverload):
                out.append(renamed(e, env))
                continue
            if e.op is aten("as_strided"):
                raise Unexpected(e, "it reads memory by strides")
            new = self.retyper.equation(e, lambda v: env.get(v, v))
            out.append(new)
            env.update(zip(e.outs, new.outs, strict=True))
        return out
