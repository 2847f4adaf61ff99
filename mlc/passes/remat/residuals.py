"""Residuals: what the sweep keeps of a step for the adjoint, so that less of the step is computed twice.

An adjoint loop begins every trip by making the values of that step again from its states.  Any of these that the
forward loop computed as well can be emitted there instead.  Which: a minimum cut between seconds and bytes (see
:mod:`mlc.passes.remat.mincut`) on the part of the adjoint's body that does not depend on cotangents; values of the two
bodies are matched by value numbering.  Inner gradients, which the adjoint reads from the sweep, are up to the cut as
well (:mod:`mlc.passes.remat.inlined`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlc.ir.builder import dce, renamed
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.opaque.call import once
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, resident
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.memory import root_of
from mlc.passes.remat.inlined import inlined
from mlc.passes.remat.mincut import Infeasible, choose
from mlc.passes.remat.numbering import Numbering
from mlc.passes.remat.prune import prune

__all__ = ["Pair", "keep_residuals", "pairs"]


@dataclass(frozen=True)
class Pair:
    """A loop and its adjoint in one region, by position."""

    forward: int
    adjoint: int


def pairs(region: Region) -> list[Pair]:
    """Loops whose emissions an adjoint loop of the region reads."""
    made = {v: i for i, e in enumerate(region.eqns) if isinstance(e.op, Loop) for v in e.outs}
    out = []
    for i, e in enumerate(region.eqns):
        if isinstance(e.op, Loop) and e.origin is Origin.ADJOINT:
            sources = {made[v] for v in _seqs(e) if v in made and region.eqns[made[v]].origin is not Origin.ADJOINT}
            found = [s for s in sources if _matches(region.eqns[s], e)]
            if len(found) == 1:
                out.append(Pair(found[0], i))
    return out


def _seqs(e: Eqn) -> tuple[Var, ...]:
    op = e.op
    assert isinstance(op, Loop)
    return e.args[op.n_carry + op.n_const :]


def _matches(f: Eqn, a: Eqn) -> bool:
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    return (
        f.op.trips == a.op.trips and f.op.reverse != a.op.reverse and f.op.label == a.op.label
        and a.op.derived == (Origin.ADJOINT, *f.op.derived)
    )  # fmt: skip


def keep_residuals(region: Region, price: float, meter: Meter) -> Region:
    """Emit from each forward loop what its adjoint had better not compute again.

    Args:
        region: Forward and adjoint loops together, inner gradients lowered.
        price: Seconds of a call that one byte of peak is worth; 0 keeps everything that saves time.
        meter: Cost of equations.
    """
    for pair in pairs(region):
        region = _keep(region, pair, price, meter)
    return prune(region)


def _keep(region: Region, pair: Pair, price: float, meter: Meter) -> Region:
    f, a = region.eqns[pair.forward], region.eqns[pair.adjoint]
    if price > 0:
        f, a = inlined(f, a)
        eqns = list(region.eqns)
        eqns[pair.forward], eqns[pair.adjoint] = f, a
        region = Region(region.inputs, tuple(eqns), region.outputs, region.names)
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    body, adjoint = f.op.body, a.op.body
    numbering = Numbering()
    theirs = numbering.region(body, {})
    ours = numbering.region(adjoint, _matched_inputs(f, a, theirs, numbering))
    source = {n: v for v, n in reversed(list(theirs.items()))}
    primal, demanded = _primal(adjoint, a.op.n_carry)
    there = set(adjoint.inputs)
    count = f.op.count
    made = {v: e for e in body.eqns for v in e.outs}

    def keep(v: Var) -> float | None:
        if v in there:
            return 0.0
        twin = source.get(ours[v])
        if twin is None or isinstance(v.type, SeqType) or (twin in made and root_of(made[twin]) is not None):
            return None
        return price * resident(v.type) * count

    def redo(e: Eqn) -> float | None:
        return None if once(e) else meter(e).seconds * count

    try:
        kept = choose(primal, demanded, keep, redo)
    except Infeasible:
        return region
    new = [v for v in dict.fromkeys(v for e in primal for v in e.outs) if v in kept]
    return _hand_over(region, pair, {v: source[ours[v]] for v in new})


def _matched_inputs(f: Eqn, a: Eqn, theirs: dict[Var, int], numbering: Numbering) -> dict[Var, int]:
    """Numbers of the adjoint body's inputs that are values of the forward body."""
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    known: dict[Var, Var] = dict(zip(f.args[f.op.n_carry :], f.op.body.inputs[f.op.n_carry :], strict=True))
    known.update(zip(f.outs[f.op.n_carry :], f.op.body.outputs[f.op.n_carry :], strict=True))
    start = a.op.n_carry
    return {
        v: theirs[known[x]]
        for x, v in zip(a.args[start:], a.op.body.inputs[start:], strict=True) if x in known
    }  # fmt: skip


def _primal(body: Region, n_carry: int) -> tuple[list[Eqn], list[Var]]:
    """Equations that no cotangent enters, and their values that others read."""
    late = set(body.inputs[:n_carry])
    primal: list[Eqn] = []
    read: list[Var] = []
    for e in body.eqns:
        if any(v in late for v in e.inputs):
            late.update(e.outs)
            read.extend(e.inputs)
        else:
            primal.append(e)
    read.extend(body.outputs)
    return primal, [v for v in dict.fromkeys(read) if v not in late]


def _hand_over(region: Region, pair: Pair, twins: dict[Var, Var]) -> Region:
    """The adjoint reads these values of its body (keys) from emissions of the forward body's (values)."""
    f, a = region.eqns[pair.forward], region.eqns[pair.adjoint]
    assert isinstance(f.op, Loop) and isinstance(a.op, Loop)
    body = f.op.body
    emitted = dict(zip(body.outputs[f.op.n_carry :], f.outs[f.op.n_carry :], strict=True))
    extra = {t: Var(f.op.sequence(t.type)) for t in dict.fromkeys(twins.values()) if t not in emitted}
    emitted.update(extra)
    larger = Region(body.inputs, body.eqns, (*body.outputs, *extra), body.names)
    forward = f.with_(op=replace(f.op, body=larger), outs=(*f.outs, *extra.values()))
    mine = a.op.body
    inputs = tuple(Var(t.type) for t in twins.values())
    env = dict(zip(twins, inputs, strict=True))
    eqns = [renamed(e, env) for e in mine.eqns]
    outputs = tuple(env.get(v, v) for v in mine.outputs)
    smaller = dce(
        Region((*mine.inputs, *inputs), tuple(eqns), outputs, mine.names and (*mine.names, *[""] * len(inputs)))
    )
    adjoint = a.with_(op=replace(a.op, body=smaller), args=(*a.args, *[emitted[t] for t in twins.values()]))
    eqns_out = list(region.eqns)
    eqns_out[pair.forward], eqns_out[pair.adjoint] = forward, adjoint
    return Region(region.inputs, tuple(eqns_out), region.outputs, region.names)
