"""Values that a gradient is taken with respect to, kept apart from what the operator that made them saved.

A gradient by an activation beside the weights below it moves the activation alone: what its own operator reads of its
result on the way back (``tanh`` reads ``y`` for ``1 - y^2``) stays.  So such a value gets a name of its own behind the
operator.  Linear in the number of equations.
"""

from __future__ import annotations

from dataclasses import replace

from mlc.ir.core import Alias, Eqn, Grad, Loop, Region, Stop, Var, map_vars

__all__ = ["apart"]


def apart(region: Region) -> Region:
    """The region, and the bodies of its loops, with such values renamed."""
    made = {v: e for e in region.eqns for v in e.outs}
    wanted = {
        v
        for e in region.eqns
        if isinstance(e.op, Grad)
        for v in e.args[e.op.n_loss : e.op.n_loss + e.op.n_wrt]
        if v in made and not isinstance(made[v].op, (Alias, Stop, Grad, Loop))
    }
    now: dict[Var, Var] = {}
    eqns: list[Eqn] = []
    for e in region.eqns:
        if isinstance(e.op, Loop):
            e = e.with_(op=replace(e.op, body=apart(e.op.body)))
        if any(v in now for v in e.inputs):
            args = map_vars(e.args, lambda v: now.get(v, v))
            kwargs = tuple((k, map_vars(a, lambda v: now.get(v, v))) for k, a in e.kwargs)
            e = e.with_(args=args, kwargs=kwargs)
        eqns.append(e)
        for v in e.outs:
            if v in wanted:
                now[v] = Var(v.type, v.mask)
                eqns.append(Eqn(Alias(), (v,), (now[v],), (), e.loc, e.tag))
    outputs = tuple(now.get(v, v) for v in region.outputs)
    return Region(region.inputs, tuple(eqns), outputs, region.names)
