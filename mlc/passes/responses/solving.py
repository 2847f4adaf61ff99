"""The adjoint of a linear solve: that of x = A(c)^-1 b.

    b' = A^-T x',        c' = -d/dc <b', A(c) x>        (implicit function theorem once more)

so a hypergradient goes through a solve without anything of its iterations being kept.  The body of the solve is linear
in what it multiplies; its transpose is its own pull-back (the body itself where the solver takes it for symmetric).
"""

from __future__ import annotations

from dataclasses import replace

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Alias, Eqn, Region, Var, aten
from mlc.ir.opaque.estimates import Solve
from mlc.ir.origin import Origin
from mlc.linear.solvers import SYMMETRIC
from mlc.passes.autodiff.forward import PUSH, NotForward
from mlc.passes.autodiff.reverse import PULL, pullback

__all__ = ["negated", "pull_solve"]


def pull_solve(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
    """Reverse rule of a solve; adds to ``cts``."""
    op = e.op
    assert isinstance(op, Solve)
    n = op.n_carry
    body = op.body if op.solver in SYMMETRIC else _transposed(op, b)
    given = [cts[v] if v in cts else b.zero(v.type) for v in e.outs]
    back = replace(op, body=body, derived=(Origin.ADJOINT, *op.derived), told=0)
    if op.told:
        back = replace(back, body=_without(body, op.told), n_const=op.n_const - op.told)
    consts = e.args[n : len(e.args) - op.told]
    types = [contiguous_type(v.type) for v in e.args[:n]]
    solved = b.emit(back, (*given, *consts), types, loc=e.loc, tag=Origin.ADJOINT)
    env = dict(zip(op.body.inputs, (*e.outs, *e.args[n:]), strict=True))
    eqns = _copied(b, op.body, env)
    wanted = [v for v in consts if v in active]
    seeds: dict[Var, Var] = {}
    for v, s in zip(op.body.outputs, solved, strict=True):
        seeds[env[v]] = b.add(seeds.get(env[v]), s)
    found = pullback(b, eqns, seeds, wanted)
    for v, s in zip(e.args[:n], solved, strict=True):
        if v in active:
            cts[v] = b.add(cts.get(v), s)
    for v in dict.fromkeys(wanted):
        if v in found:
            cts[v] = b.add(cts.get(v), negated(b, found[v]))


def _copied(b: Builder, body: Region, env: dict[Var, Var]) -> list[Eqn]:
    """The equations that now stand for those of a region, in order (equal ones that were there already, too)."""
    found: dict[int, Eqn] = {}
    for x in body.eqns:
        outs = b.copy_eqn(x, env)
        found.update((b.position[v], b.eqns[b.position[v]]) for v in outs)
    return [found[i] for i in sorted(found)]


def _not_forward(b: Builder, e: Eqn, tan: dict[Var, Var]) -> None:
    raise NotForward("the solve of an implicit response is differentiated in reverse")


PULL[Solve] = pull_solve
PUSH[Solve] = _not_forward


def negated(b: Builder, v: Var) -> Var:
    """-v."""
    if v in b.zeros:
        return v
    return b.emit(aten("neg"), (v,), (v.type,), tag=Origin.ADJOINT)[0]


def _without(body: Region, told: int) -> Region:
    return Region(body.inputs[: len(body.inputs) - told], body.eqns, body.outputs)


def _transposed(op: Solve, outer: Builder) -> Region:
    """The body as a function of what its results are multiplied with."""
    b = Builder(policy=outer.policy)
    n = op.n_carry
    given = [b.input(contiguous_type(v.type)) for v in op.body.inputs[:n]]
    env = {v: b.input(v.type) for v in op.body.inputs[n:]}
    for v in op.body.inputs[:n]:  # it is linear: where it is differentiated makes no difference
        env[v] = Var(v.type)
        b.append(Eqn(Alias(), (b.zero(v.type),), (env[v],)))
    start = len(b.eqns)
    for x in op.body.eqns:
        b.copy_eqn(x, env)
    points = [env[v] for v in op.body.inputs[:n]]
    seeds: dict[Var, Var] = {}
    for v, s in zip(op.body.outputs, given, strict=True):
        seeds[env[v]] = b.add(seeds.get(env[v]), s)
    found = pullback(b, list(b.eqns[start:]), seeds, points)
    return b.region([found[v] if v in found else b.zero(v.type) for v in points])
