"""The norms of a level's first and last gradient: whether it has come to where its gradient is zero, for the report.

Two numbers that the level's loops carry (square roots of sums of squares over everything that is trained), so that
nothing is kept per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.types import TensorType, Type
from mlc.passes.responses.site import Run
from mlc.passes.responses.stationary import Place

__all__ = ["carrying", "first_and_last"]


def first_and_last(run: Run, places: Sequence[Place], items: dict[int, list[Eqn]]
                   ) -> tuple[dict[int, list[Eqn]], list[Var], list[Eqn]]:  # fmt: skip
    """Make a run tell these norms.

    Args:
        run: The run.
        places: Where it trains, in order.
        items: What stands in the place of its equations.

    Returns:
        The same with what its loops carry more, the two numbers, and the equations behind the run that give them.
    """
    told: list[Var] = []
    behind: list[Eqn] = []
    known: dict[int, tuple[Var, Var]] = {}
    for place, at in ((places[0], 0), (places[-1], 1)):
        if not place.loops:
            eqns, norm = _norm(place.fed)
            behind += eqns
            told.append(norm)
            continue
        if id(place) not in known:
            own = items.get(place.item, [run.eqn(place.item)])
            b = Builder(merge=False)
            start = _number(b, place.fed[0].type, -1.0), _number(b, place.fed[0].type, 0.0)
            loop, known[id(place)] = _told(own[-1], place.loops, place.fed, start)
            items = {**items, place.item: [*own[:-1], *b.eqns, loop]}
        told.append(known[id(place)][at])
    return items, told, behind


def _number(b: Builder, like: Type, value: float) -> Var:
    kind = _scalar(like)
    kw = (("dtype", kind.dtype), ("device", kind.device), ("pin_memory", False))
    return b.emit(aten("full"), ([], value), (kind,), kw)[0]


def _scalar(t: Type) -> TensorType:
    assert isinstance(t, TensorType)
    return TensorType(t.dtype, (), (), t.device)


def carrying(
    e: Eqn, start: Sequence[Var], body: Region, ends: Sequence[Var], more: Sequence[Var]
) -> tuple[Eqn, list[Var]]:
    """A loop that carries more.

    Args:
        e: The loop.
        start: Values at the start.
        body: Its body with what makes the next values; inputs as they were.
        ends: The next values, in the body.
        more: Their names at the start of a trip.

    Returns:
        The loop, and the last values behind it.
    """
    op = e.op
    assert isinstance(op, Loop)
    n = op.n_carry
    names = (*body.names[:n], *[""] * len(start), *body.names[n:]) if body.names else ()
    ins = (*body.inputs[:n], *more, *body.inputs[n:])
    larger = Region(ins, body.eqns, (*body.outputs[:n], *ends, *body.outputs[n:]), names)
    outs = [Var(v.type) for v in start]
    made = e.with_(op=replace(op, body=larger, n_carry=n + len(start)), args=(*e.args[:n], *start, *e.args[n:]),
                   outs=(*e.outs[:n], *outs, *e.outs[n:]))  # fmt: skip
    return made, outs


def _told(e: Eqn, loops: Sequence[Eqn], fed: Sequence[Var], start: tuple[Var, Var]) -> tuple[Eqn, tuple[Var, Var]]:
    """The outermost of these loops, carrying the norms of its first and its last gradient."""
    op = e.op
    assert isinstance(op, Loop)
    first, last = Var(start[0].type), Var(start[1].type)
    if len(loops) == 1:
        more, norm = _norm(fed)
        b = Builder(merge=False)
        kind = _scalar(first.type)
        (unknown,) = b.emit(aten("lt", "Scalar"), (first, 0), (replace(kind, dtype=torch.bool),))
        (now,) = b.emit(aten("where", "self"), (unknown, norm, first), (kind,))
        eqns, ends = (*op.body.eqns, *more, *b.eqns), (now, norm)
    else:
        inner, ends = _told(loops[1], loops[1:], fed, (first, last))
        eqns = tuple(inner if x is loops[1] else x for x in op.body.eqns)
    body = Region(op.body.inputs, eqns, op.body.outputs, op.body.names)
    made, outs = carrying(e, start, body, ends, (first, last))
    return made, (outs[0], outs[1])


def _norm(vs: Sequence[Var]) -> tuple[list[Eqn], Var]:
    """Euclidean norm of several values together, in the kind of the first."""
    b = Builder()
    kind = _scalar(vs[0].type)
    total: Var | None = None
    for v in vs:
        t = v.type
        assert isinstance(t, TensorType)
        (square,) = b.emit(aten("mul", "Tensor"), (v, v), (t,))
        (summed,) = b.emit(aten("sum"), (square,), (_scalar(t),))
        if t.dtype != kind.dtype or t.device != kind.device:
            kw = (("dtype", kind.dtype), ("device", kind.device))
            (summed,) = b.emit(aten("_to_copy"), (summed,), (kind,), kw)
        total = b.add(total, summed)
    assert total is not None
    (root,) = b.emit(aten("sqrt"), (total,), (kind,))
    return list(b.eqns), root
