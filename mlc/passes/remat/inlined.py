"""An adjoint that computes for itself what it reads from the sweep.

The adjoint of a step reads inner gradients that the sweep emitted: as many bytes per trip as there are parameters.
Here the equations that made them are written into the adjoint's body, on the states it has, so that the minimum cut
of :mod:`mlc.passes.remat.residuals` may drop the emissions where memory is dear.  They are not shared with those that
the mixed product runs: nothing but the gradient then lives from the first sweep over the step to the second, and each
can be split into micro-batches alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlc.ir.builder import renamed
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.opaque.call import once
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType
from mlc.passes.remat.mincut import needed_for

__all__ = ["TAG", "inlined"]

TAG = Origin.INNER  # of equations copied from the sweep: they keep their order


@dataclass(frozen=True)
class _Links:
    """How a forward loop and its adjoint hang together.

    Attributes:
        read: Values of the forward body that the adjoint's body has as inputs.
        blocked: Values of the forward body that nobody else can make again.
    """

    read: dict[Var, Var]
    blocked: set[Var]


def inlined(f: Eqn, a: Eqn) -> tuple[Eqn, Eqn]:
    """Both loops, the adjoint with the equations of what it read.

    Args:
        f: A forward loop; it may emit more carries then.
        a: Its adjoint, which reads ``f``'s emissions.
    """
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    body = f.op.body
    links = _links(f, a)
    made = {v for e in body.eqns for v in e.outs}
    targets = [v for v in links.read if v in made and v not in links.blocked]
    fence = {v for v in links.read if v not in targets} | set(body.inputs)
    needed = needed_for(body.eqns, targets, fence)
    if not needed:
        return f, a
    used = dict.fromkeys(v for e in needed for v in e.inputs if v in fence)
    f, a, env = _wired(f, a, [v for v in used if v not in links.read], links.read)
    copies = []
    for e in needed:
        outs = tuple([Var(v.type) for v in e.outs])
        copies.append(renamed(e, env).with_(outs=outs, tag=TAG))
        env.update(zip(e.outs, outs, strict=True))
    now = {links.read[v]: env[v] for v in targets}
    assert isinstance(a.op, Loop)
    mine = a.op.body
    eqns = (*copies, *[renamed(e, now) for e in mine.eqns])
    outputs = tuple([now.get(v, v) for v in mine.outputs])
    return f, a.with_(op=replace(a.op, body=Region(mine.inputs, eqns, outputs, mine.names)))


def _links(f: Eqn, a: Eqn) -> _Links:
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    body, start = f.op.body, a.op.n_carry
    place: dict[Var, Var] = {}
    for x, v in zip(a.args[start:], a.op.body.inputs[start:], strict=True):
        place.setdefault(x, v)
    read = {v: place[x] for x, v in zip(f.args[f.op.n_carry :], body.inputs[f.op.n_carry :], strict=True) if x in place}
    emitted = zip(f.outs[f.op.n_carry :], body.outputs[f.op.n_carry :], strict=True)
    read.update((v, place[x]) for x, v in emitted if x in place)
    blocked: set[Var] = set()
    for e in body.eqns:
        alone = once(e) or isinstance(e.op, Loop) or any(isinstance(v.type, SeqType) for v in (*e.inputs, *e.outs))
        if alone or any(v in blocked and v not in read for v in e.inputs):
            blocked.update(e.outs)
    return _Links(read, blocked)


def _wired(f: Eqn, a: Eqn, missing: Sequence[Var], read: dict[Var, Var]) -> tuple[Eqn, Eqn, dict[Var, Var]]:
    """Both loops, the adjoint with these inputs of the forward body as inputs of its own."""
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    op, mine = f.op, a.op.body
    nc, split = op.n_carry, op.n_carry + op.n_const
    where = {v: i for i, v in enumerate(op.body.inputs)}
    carries = [v for v in missing if where[v] < nc]
    consts = [v for v in missing if nc <= where[v] < split]
    seqs = [v for v in missing if where[v] >= split]
    sequences = {v: Var(op.sequence(v.type)) for v in carries}
    larger = Region(op.body.inputs, op.body.eqns, (*op.body.outputs, *carries), op.body.names)
    f = f.with_(op=replace(op, body=larger), outs=(*f.outs, *sequences.values()))
    new = {v: Var(v.type) for v in missing}
    at = a.op.n_carry + a.op.n_const
    inputs = (*mine.inputs[:at], *[new[v] for v in consts], *mine.inputs[at:], *[new[v] for v in (*carries, *seqs)])
    args = (*a.args[:at], *[f.args[where[v]] for v in consts], *a.args[at:], *sequences.values(),
            *[f.args[where[v]] for v in seqs])  # fmt: skip
    body = Region(inputs, mine.eqns, mine.outputs)
    adjoint = a.with_(op=replace(a.op, body=body, n_const=a.op.n_const + len(consts)), args=args)
    return f, adjoint, {**read, **new}
