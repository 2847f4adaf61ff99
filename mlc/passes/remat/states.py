"""States: a loop's emitted carries kept sparsely, the others rebuilt when the adjoint asks for them.

An adjoint loop reads the carries at the start of every trip: parameters and optimizer state, three or four times the
bytes of the parameters with Adam.  Given the inner gradient of each trip, the update is cheap, so it is enough to
keep the gradients and a few sets of carries and to replay updates from the nearest one.  What a replay reads from
every trip is again a minimum cut between bytes and seconds: at a high price nothing is, and whole steps are redone
(recursive checkpointing, Griewank and Walther 2000).
"""

from __future__ import annotations

from dataclasses import replace

from mlc.ir.builder import dce
from mlc.ir.call import once
from mlc.ir.core import Eqn, Loop, Region, Replay, Var
from mlc.ir.lowered.slots import replayed_steps
from mlc.ir.types import SeqType, resident
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.memory import root_of
from mlc.passes.remat.mincut import Infeasible, choose, needed_for
from mlc.passes.remat.prune import prune
from mlc.passes.remat.residuals import pairs

__all__ = ["replays", "sparse_states"]


def replays(trips: int, slots: int) -> float:
    """Mean number of replayed steps per trip of a backward sweep over ``trips`` with ``slots`` kept states.

    The count of the runtime's own schedule (:class:`mlc.runtime.interpreter.states.States`).
    """
    return replayed_steps(trips, slots) / max(trips, 1)


def sparse_states(region: Region, slots: int, price: float, meter: Meter) -> Region:
    """Keep at most ``slots`` sets of each loop's emitted carries.

    Args:
        region: Forward and adjoint loops together, inner gradients lowered.
        slots: Sets of carries kept, the first one included.
        price: Seconds of a call that one byte of peak is worth.
        meter: Cost of equations.
    """
    for pair in pairs(region):
        f = region.eqns[pair.forward]
        assert isinstance(f.op, Loop)
        if f.op.reverse or (f.op.trips is not None and f.op.trips <= slots):
            continue
        new = _sparse(f, slots, price, meter)
        if new is not None:
            eqns = list(region.eqns)
            eqns[pair.forward] = new
            region = Region(region.inputs, tuple(eqns), region.outputs, region.names)
    return prune(region)


def _sparse(e: Eqn, slots: int, price: float, meter: Meter) -> Eqn | None:
    op = e.op
    assert isinstance(op, Loop)
    ins, emitted = op.body.inputs, op.body.outputs[op.n_carry :]
    carries = {i for i in range(op.n_carry) if ins[i] in emitted}
    if not carries:
        return None
    trips = op.count
    again = replays(trips, slots)
    dense = {v for v in emitted if v not in ins[: op.n_carry]}
    made = {v: x for x in op.body.eqns for v in x.outs}

    def keep(v: Var) -> float | None:
        if v in dense or v in ins:
            return 0.0
        if isinstance(v.type, SeqType) or (v in made and root_of(made[v]) is not None):
            return None
        return price * resident(v.type) * trips

    def redo(x: Eqn) -> float | None:
        return None if once(x) else meter(x).seconds * again * trips

    while True:
        wanted = [op.body.outputs[i] for i in sorted(carries)]
        try:
            kept = choose(op.body.eqns, wanted, keep, redo)
        except Infeasible:
            return None
        more = {i for i in range(op.n_carry) if ins[i] in kept} | carries
        if more == carries:
            break
        carries = more
    return _with_replay(e, sorted(carries), wanted, kept, slots)


def _with_replay(e: Eqn, carries: list[int], wanted: list[Var], kept: set[Var], slots: int) -> Eqn | None:
    op = e.op
    assert isinstance(op, Loop)
    ins, emitted = op.body.inputs, list(op.body.outputs[op.n_carry :])
    new = [v for x in op.body.eqns for v in x.outs if v in kept and v not in emitted]
    split = op.n_carry + op.n_const
    needed = needed_for(op.body.eqns, wanted, kept)
    read = {v for x in needed for v in x.inputs} | set(wanted)
    consts = tuple(i for i in range(op.n_const) if ins[op.n_carry + i] in read)
    seqs = tuple(i for i in range(op.n_seq) if ins[split + i] in read)
    values = [*emitted, *new]
    dense = tuple(j for j, v in enumerate(values) if v in read and v not in ins)
    inputs = [ins[i] for i in carries] + [ins[op.n_carry + i] for i in consts]
    inputs += [ins[split + i] for i in seqs] + [values[j] for j in dense]
    body = dce(Region(tuple(inputs), tuple(needed), tuple(wanted)))
    larger = Region(ins, op.body.eqns, (*op.body.outputs, *new), op.body.names)
    replay = Replay(body, tuple(carries), consts, seqs, dense, slots)
    outs = (*e.outs, *[Var(op.sequence(v.type)) for v in new])
    return e.with_(op=replace(op, body=larger, replay=replay), outs=outs)
