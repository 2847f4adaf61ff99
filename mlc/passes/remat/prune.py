"""Loops without what nobody reads: carries, constants, sequences and emissions that lead to no result.

Before and after: the same region with the same results.  A carry is needed when its final value is read, or when a
needed value of the next trip reads it (a fixpoint).  O(equations x depth of nesting x rounds of the fixpoint).
"""

from __future__ import annotations

from dataclasses import replace

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.opaque.estimates import Solve
from mlc.ir.origin import Origin
from mlc.ir.types import nbytes

__all__ = ["prune"]


def prune(region: Region) -> Region:
    """Drop dead equations and the dead parts of loops, from the last to the first."""
    live = set(region.outputs)
    kept: list[Eqn] = []
    for e in reversed(region.eqns):
        if not (e.impure or any(v in live for v in e.outs)):
            continue
        if isinstance(e.op, Loop) and not isinstance(e.op, Solve) and e.op.replay is None:
            e = _loop(e, live)
        kept.append(e)
        live.update(e.inputs)
    return Region(region.inputs, tuple(reversed(kept)), region.outputs, region.names)


def _loop(e: Eqn, live: set[Var]) -> Eqn:
    op = e.op
    assert isinstance(op, Loop)
    nc, nk = op.n_carry, op.n_const
    ins, outs = op.body.inputs, op.body.outputs
    emits = [i for i, v in enumerate(e.outs[nc:]) if v in live]
    carries = {i for i in range(nc) if e.outs[i] in live}
    while True:
        kept = sorted(carries)
        body = prune(Region(ins, op.body.eqns, (*[outs[i] for i in kept], *[outs[nc + i] for i in emits])))
        used = {v for x in body.eqns for v in x.inputs} | set(body.outputs)
        more = carries | {i for i in range(nc) if ins[i] in used}
        if more == carries:
            break
        carries = more
    consts = [i for i in range(nc, nc + nk) if ins[i] in used]
    seqs = [
        i for i in range(nc + nk, len(ins)) if ins[i] in used or (op.trips is None and e.origin is not Origin.ADJOINT)
    ]
    if op.trips is None and not seqs:  # a loop of unknown length runs as long as what it draws from
        seqs = sorted(range(nc + nk, len(ins)), key=lambda i: nbytes(ins[i].type))[:1]
    places = [*kept, *consts, *seqs]
    body = Region(tuple(ins[i] for i in places), body.eqns, body.outputs, _names(op.body, places))
    smaller = replace(op, body=body, n_carry=len(kept), n_const=len(consts))
    results = (*[e.outs[i] for i in kept], *[e.outs[nc + i] for i in emits])
    return e.with_(op=smaller, args=tuple(e.args[i] for i in places), outs=results)


def _names(body: Region, places: list[int]) -> tuple[str, ...]:
    return tuple(body.names[i] for i in places) if body.names else ()
