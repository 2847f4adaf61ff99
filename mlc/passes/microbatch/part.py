"""The body of a loop over parts of a batch: each equation of the batched part, written for one part.

Sizes of the batch in literals are divided, types are found by running operators on fake tensors and compared with what
the local rule promised.  Sums are accumulated at once; those of half precision are made of float32 parts.  (Two parts
of eight bits each cancel to exactly zero once in some hundred elements, where the sum of all examples is small but not
zero; the derivative of an Adam step there is that at zero, larger by many orders of magnitude.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from mlc.ir.builder import contiguous
from mlc.ir.core import Arg, Eqn, Index, Loop, Op, Pack, Region, Var, aten, map_vars
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, TensorType
from mlc.passes.microbatch.dependence import PARTS, SAME, SUM, Local, Shard, Size, shape_of
from mlc.passes.microbatch.independence import Analysis, Placed
from mlc.record.retype import Retyper

__all__ = ["FACTORIES", "LABEL", "TAG", "Part", "Unexpected"]

TAG, LABEL = Origin.MICRO, "micro-batches"
FACTORIES = {aten("zeros"), aten("ones"), aten("full")}
_HALF = (torch.float16, torch.bfloat16)


class Unexpected(Exception):
    """An operator did not do to a part of the batch what its rule says."""

    def __init__(self, eqn: Eqn, why: str) -> None:
        super().__init__(f"{eqn.op} cannot be run on a part of the batch: {why}")
        self.eqn = eqn


class Part:
    """The loop over parts being built: its inputs, its equations, and what its results stand for."""

    def __init__(self, a: Analysis, k: int, retyper: Retyper) -> None:
        self.a = a
        self.k = k
        self.retyper = retyper
        self.producer = {v: e for e in a.region.eqns for v in e.outs}
        self.env: dict[Var, Var] = {}
        self.consts: dict[Var, Var] = {}
        self.seqs: dict[tuple[Var, Shard], tuple[Var, list[Var]]] = {}
        self.eqns: list[Eqn] = []
        self.before: list[Eqn] = []  # slices and zeros that the loop starts from
        self.after: dict[Var, Var] = {}  # what stands for a value that leaves the loop

    # ---- one equation

    def run(self, e: Eqn, placed: Placed) -> None:
        """Emit an equation of the batched part for one part of the batch."""
        local = placed.local
        op = e.op if local.op is None else local.op
        args, kwargs = _changed(e, local.set)

        def look(v: Var) -> Var:
            return self.read(v, placed)

        args = self.resolve(args, look)
        kwargs = tuple((name, self.resolve(x, look)) for name, x in kwargs)
        if self.rounded(e, local):
            args = map_vars(args, lambda v: self.to(e, v, torch.float32))
        outs = self.emit(e, op, args, kwargs, len(e.outs))
        if local.divide is not None:
            by = float(self.k) if local.divide == PARTS else self.const(local.divide)
            div = aten("div", "Scalar") if local.divide == PARTS else aten("div", "Tensor")
            outs = [*self.emit(e, div, (outs[0], by), (), 1), *outs[1:]]
        for v, new, kind in zip(e.outs, outs, local.outs, strict=True):
            if kind is SAME:
                continue
            expected = self.part_shape(v, kind) if isinstance(kind, Shard) else shape_of(v)
            new = new if kind is SUM else self.to(e, new, _dtype(v))
            wider = kind is SUM and _dtype(v) in _HALF and _dtype(new) == torch.float32
            if shape_of(new) != expected or (_dtype(new) != _dtype(v) and not wider):
                raise Unexpected(e, f"it gives {new.type}, not the shape {expected}")
            self.env[v] = new

    def emit(self, e: Eqn, op: Op, args: Any, kwargs: Any, n_outs: int) -> list[Var]:
        """One equation of the body with its types found out."""
        try:
            types = self.retyper.types(op, args, kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as why:
            raise Unexpected(e, str(why).split("\n")[0]) from why
        if len(types) != n_outs:
            raise Unexpected(e, f"it gives {len(types)} results")
        outs = [Var(t) for t in types]
        self.eqns.append(e.with_(op=op, args=args, kwargs=kwargs, outs=tuple(outs)))
        return outs

    def rounded(self, e: Eqn, local: Local) -> bool:
        """Whether the equation sums over examples and rounds the sum to half precision."""
        sums = any(kind is SUM and _dtype(v) in _HALF for v, kind in zip(e.outs, local.outs, strict=True))
        return sums and not any(self.a.kinds.get(v) is SUM for v in e.inputs)

    def to(self, e: Eqn, v: Var, dtype: torch.dtype | None) -> Var:
        """A value of half precision as float32, or back; other values as they are."""
        if dtype not in (torch.float32, *_HALF) or _dtype(v) not in (torch.float32, *_HALF) or _dtype(v) == dtype:
            return v
        return self.emit(e, aten("_to_copy"), (v,), (("dtype", dtype),), 1)[0]

    def resolve(self, a: Arg, look: Callable[[Var], Var]) -> Arg:
        """Arguments on the values of this part, sizes of the batch divided."""
        if isinstance(a, Size):
            return a.whole // self.k
        if isinstance(a, Eqn):
            return self.emit(a, a.op, self.resolve(a.args, look), a.kwargs, 1)[0]
        if isinstance(a, (list, tuple)):
            return type(a)(self.resolve(x, look) for x in a)
        return look(a) if type(a) is Var else a

    def part_shape(self, v: Var, c: Shard) -> tuple[int, ...]:
        """Shape of a part of ``v``."""
        return tuple(s // self.k if d == c.dim else s for d, s in enumerate(shape_of(v)))

    # ---- what comes in

    def read(self, v: Var, placed: Placed) -> Var:
        """The body's value for an operand."""
        c = placed.slices.get(v) or self.a.seeds.get(v)
        if c is not None:
            return self.slice(v, c)
        if v in placed.whole or self.a.kinds[v] is SAME:
            return self.const(v)
        return self.env[v]

    def const(self, v: Var) -> Var:
        """A value of every part."""
        return self.consts.setdefault(v, Var(v.type))

    def slice(self, v: Var, c: Shard) -> Var:
        """This part of a value of all examples; constants are made anew instead."""
        made = self.producer.get(v)
        if made is not None and made.op in FACTORIES:
            return self.emit(made, made.op, (list(self.part_shape(v, c)), *made.args[1:]), made.kwargs, 1)[0]
        if (v, c) not in self.seqs:
            pieces = self.pieces(v, c)
            self.seqs[(v, c)] = Var(pieces[0].type), pieces
        return self.seqs[(v, c)][0]

    def pieces(self, v: Var, c: Shard) -> list[Var]:
        """The k parts of a value, as views where its examples are outermost."""
        emit = self.outside(self.before)
        shape, dim = shape_of(v), c.dim
        if c.outer > 1:
            v = emit(aten("reshape"), (v, [*shape[:dim], c.outer, shape[dim] // c.outer, *shape[dim + 1 :]]))
            dim += 1
        step = shape_of(v)[dim] // self.k
        parts = [emit(aten("slice", "Tensor"), (v, dim, i * step, (i + 1) * step)) for i in range(self.k)]
        if c.outer > 1:
            parts = [emit(aten("reshape"), (p, [*shape[: c.dim], -1, *shape[c.dim + 1 :]])) for p in parts]
        return parts

    def outside(self, into: list[Eqn]) -> Callable[..., Var]:
        """Emits equations outside of the loop."""

        def emit(op: Op, args: Any, kwargs: tuple[tuple[str, Arg], ...] = ()) -> Var:
            (t,) = self.retyper.types(op, args, kwargs)
            into.append(Eqn(op, args, (Var(t),), kwargs, tag=TAG))
            return into[-1].outs[0]

        return emit

    # ---- what goes out

    def close(self, leaving: list[Var]) -> list[Eqn]:
        """The loop, and what puts its results together (entered into ``after``)."""
        sums = [v for v in leaving if self.a.kinds[v] is SUM]
        rows = [v for v in leaving if v not in sums]
        starts, carried = [], []
        for v in sums:
            start, carry = self.accumulate(v)
            starts.append(start)
            carried.append(carry)
        packs = [self.packed(pieces) for _, pieces in self.seqs.values()]
        inputs = (*[c for c, _ in carried], *self.consts.values(), *[s for s, _ in self.seqs.values()])
        body = Region(inputs, tuple(self.eqns), (*[o for _, o in carried], *[self.env[v] for v in rows]))
        op = Loop(body, len(sums), len(self.consts), self.k, label=LABEL)
        outs = [Var(c.type) for c, _ in carried] + [Var(SeqType(self.env[v].type, self.k)) for v in rows]
        loc = next((e.loc for e in self.eqns if e.loc is not None), None)
        made = [Eqn(op, (*starts, *self.consts, *packs), tuple(outs), loc=loc, tag=TAG)]
        for v, o in zip(sums, outs, strict=False):
            self.after[v] = self.total(v, o, made)
        for v, o in zip(rows, outs[len(sums) :], strict=True):
            self.after[v] = self.joined(v, o, made)
        return made

    def packed(self, pieces: list[Var]) -> Var:
        """A sequence of the parts."""
        seq = Var(SeqType(pieces[0].type, self.k))
        self.before.append(Eqn(Pack(), tuple(pieces), (seq,), tag=TAG))
        return seq

    def accumulate(self, v: Var) -> tuple[Var, tuple[Var, Var]]:
        """A sum over parts: its start outside of the loop, its value before and after a trip."""
        part = self.env[v]
        where = next(i for i, e in enumerate(self.eqns) if part in e.outs)
        made = self.eqns[where]
        t = v.type
        assert isinstance(t, TensorType)
        dtype = torch.float32 if t.dtype in _HALF else t.dtype
        total = TensorType(dtype, t.shape, contiguous(t.shape), t.device)
        start, carry, after = Var(total), Var(total), Var(total)
        device = (("dtype", dtype), ("device", t.device))
        self.before.append(Eqn(aten("zeros"), (list(t.shape),), (start,), device, tag=TAG))
        add = [Eqn(aten("add", "Tensor"), (carry, part), (after,), (), made.loc, made.tag)]
        self.eqns[where + 1 : where + 1] = add
        return start, (carry, after)

    def total(self, v: Var, out: Var, into: list[Eqn]) -> Var:
        """A finished sum in the dtype that its readers expect."""
        t = v.type
        assert isinstance(t, TensorType) and isinstance(out.type, TensorType)
        if out.type.dtype == t.dtype:
            return out
        return self.outside(into)(aten("_to_copy"), (out,), (("dtype", t.dtype),))

    def joined(self, v: Var, seq: Var, into: list[Eqn]) -> Var:
        """The values of all examples, from those of the parts."""
        c = self.a.kinds[v]
        assert isinstance(c, Shard) and isinstance(seq.type, SeqType)
        emit = self.outside(into)
        parts = []
        for i in range(self.k):
            parts.append(Var(seq.type.elem))
            into.append(Eqn(Index(i), (seq,), (parts[-1],), tag=TAG))
        shape = shape_of(parts[0])
        if c.outer == 1:
            return emit(aten("cat"), (parts, c.dim))
        apart = [*shape[: c.dim], c.outer, shape[c.dim] // c.outer, *shape[c.dim + 1 :]]
        parts = [emit(aten("reshape"), (p, apart)) for p in parts]
        return emit(aten("reshape"), (emit(aten("cat"), (parts, c.dim + 1)), list(shape_of(v))))


def _dtype(v: Var) -> torch.dtype | None:
    return v.type.dtype if isinstance(v.type, TensorType) else None


def _changed(e: Eqn, changes: dict[str, Arg]) -> tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]:
    """Arguments of an equation with some replaced by name."""
    if not changes:
        return e.args, e.kwargs
    assert isinstance(e.op, OpOverload)
    args, kwargs = list(e.args), dict(e.kwargs)
    places = {a.name: i for i, a in enumerate(e.op._schema.arguments) if not a.kwarg_only}
    for name, value in changes.items():
        if places.get(name, len(args)) < len(args):
            args[places[name]] = value
        else:
            kwargs[name] = value
    return tuple(args), tuple(kwargs.items())
