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
from mlc.ir.types import Type
from mlc.passes.autodiff.norm import norm, scalar
from mlc.passes.responses.rewrite import carrying
from mlc.passes.responses.site import Run
from mlc.passes.responses.stationary import Place

__all__ = ["first_and_last"]


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
            b = Builder()
            told.append(norm(b, place.fed))
            behind += b.eqns
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
    kind = scalar(like)
    kw = (("dtype", kind.dtype), ("device", kind.device), ("pin_memory", False))
    return b.emit(aten("full"), ([], value), (kind,), kw)[0]


def _told(e: Eqn, loops: Sequence[Eqn], fed: Sequence[Var], start: tuple[Var, Var]) -> tuple[Eqn, tuple[Var, Var]]:
    """The outermost of these loops, carrying the norms of its first and its last gradient."""
    op = e.op
    assert isinstance(op, Loop)
    first, last = Var(start[0].type), Var(start[1].type)
    if len(loops) == 1:
        b = Builder(merge=False)
        size = norm(b, fed)
        kind = scalar(first.type)
        (unknown,) = b.emit(aten("lt", "Scalar"), (first, 0), (replace(kind, dtype=torch.bool),))
        (now,) = b.emit(aten("where", "self"), (unknown, size, first), (kind,))
        eqns, ends = (*op.body.eqns, *b.eqns), (now, size)
    else:
        inner, ends = _told(loops[1], loops[1:], fed, (first, last))
        eqns = tuple(inner if x is loops[1] else x for x in op.body.eqns)
    body = Region(op.body.inputs, eqns, op.body.outputs, op.body.names)
    made, outs, _ = carrying(e, start, body, ends, (first, last))
    return made, (outs[0], outs[1])
