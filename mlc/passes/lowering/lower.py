"""Lowering: a program and the decisions of a plan become two stage graphs, forward and backward.

The joint graph (values and hypergradient) is built by the adjoint of the whole program and cut where the first
cotangent of an output enters: what lies before runs at the call, what lies behind runs at ``backward()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlc.ir.builder import Builder, contiguous_type, dce
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.lowered.slots import replayed_steps
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.ir.types import SeqType, resident
from mlc.passes.autodiff.adjoint import FallBack, Policy, Tape, lower_grads
from mlc.passes.autodiff.loops import map_bodies, nested_gradients
from mlc.passes.autodiff.reverse import active_vars, outermost
from mlc.passes.cost.equations import Meter, device_of
from mlc.passes.cost.memory import Footprint, region_peak, root_of
from mlc.passes.microbatch.independence import Refused
from mlc.passes.microbatch.phases import in_phases
from mlc.passes.remat.inlined import TAG as INNER
from mlc.passes.remat.mincut import choose, needed_for
from mlc.passes.remat.offload import offload
from mlc.passes.remat.residuals import keep_residuals
from mlc.passes.remat.segments import AGAIN, Trade, rematerialise
from mlc.passes.remat.states import sparse_states

__all__ = ["Levers", "differentiate", "finish"]


@dataclass(frozen=True)
class Levers:
    """What is kept and what is computed again; every setting is exact.

    Attributes:
        price: Seconds of a call that one byte of its peak is worth: for values kept between a step and its adjoint,
            between the stages, inside products, and for what replays of states read.
        slots: Sets of states kept per loop; None: all of them.
        parts: Micro-batches: parts that a batch is split into, where its examples are independent.
        rounds: Most cuts of rematerialisation inside a region.
        offload: Bytes of an element from which on what loops emit for their adjoint rests on the host; None: nothing
            does.
    """

    price: float = 0.0
    slots: int | None = None
    parts: int = 1
    rounds: int = 4
    offload: int | None = None


def differentiate(program: Program, policy: Policy) -> Joint | Stages:
    """Adjoint of the whole program, inner gradients lowered; in forward mode both stages, as they then are.

    Raises:
        NotForward: when the policy asks for forward mode and an operator is in the way.
    """
    if policy.mode == "forward":
        from mlc.passes.autodiff.jacobian import forward_stages

        return forward_stages(program, policy)
    reverse_over: frozenset[Eqn] = frozenset()
    while True:
        try:
            b, outs, cts, grads, which = _joint(program, policy, reverse_over)
            break
        except FallBack as why:
            policy.note(why.eqn, why.reason)
            reverse_over |= {why.eqn}
            policy = replace(policy, reverse=policy.reverse | nested_gradients(program.region))
    region = lower_grads(dce(Region(tuple(b.inputs), tuple(b.eqns), (*outs, *grads), tuple(b.names))), policy)
    return Joint(region, len(program.inputs), len(outs), tuple(i for i, _ in cts), tuple(which),
                 program.handed)  # fmt: skip


def finish(joint: Joint | Stages, levers: Levers, refused: Callable[[Refused], None] = lambda why: None) -> Stages:
    """Decide what is kept, cut into stages, split batches, order and rematerialise.

    Args:
        joint: What :func:`differentiate` gave.
        levers: The decisions.
        refused: Told why a batch cannot be split.
    """
    stages = _decided(joint, levers, refused)
    if levers.offload is None:
        return stages
    regions = offload((stages.forward, *([] if stages.backward is None else [stages.backward])), levers.offload)
    return replace(stages, forward=regions[0], backward=regions[1] if len(regions) > 1 else None)


def _decided(joint: Joint | Stages, levers: Levers, refused: Callable[[Refused], None]) -> Stages:
    """What is kept where it was made."""
    if isinstance(joint, Stages):
        return _finished(joint, levers, Meter(device_of(joint.forward)), refused)
    meter = Meter(device_of(joint.region))
    region = _kept(joint.region, levers, meter, 1)
    forward, backward, saved = _cut(replace(joint, region=region), levers.price, meter)
    stages = Stages(forward, backward, joint.n_results, saved, joint.cotangents, joint.gradients, joint.handed)
    return _finished(stages, levers, meter, refused)


def _finished(stages: Stages, levers: Levers, meter: Meter, refused: Callable[[Refused], None]) -> Stages:
    """Split batches, order and rematerialise; the forward stage only as far as it is the larger one."""
    free = replace(levers, price=0.0)
    forward = stages.forward
    if levers.parts > 1:
        forward = map_bodies(forward, lambda body: _split(body, levers.parts, refused))
        split = in_phases(forward, levers.parts, refused)  # values kept for later are joined again: it may cost more
        forward = min(forward, split, key=region_peak)
    forward = _shrink(forward, free, meter, 1, levers)

    footprint = Footprint()
    first = footprint.region(forward)
    backward, peak = stages.backward, 0
    if backward is not None:
        backward = _shrink(_split(backward, levers.parts, refused), levers, meter, 1)
        owned, results = footprint.hand_over(first.book, replace(stages, forward=forward, backward=backward))
        peak = results + footprint.region(backward, owned).peak
    if first.peak > peak:
        forward = _shrink(forward, levers, meter, 1, free)
    return replace(stages, forward=forward, backward=backward)


def _split(region: Region, parts: int, refused: Callable[[Refused], None]) -> Region:
    """Micro-batches in the bodies of loops and in the region itself, where a model works on independent examples."""
    if parts < 2:
        return region
    return in_phases(map_bodies(region, lambda body: _split(body, parts, refused)), parts, refused)


def _kept(region: Region, levers: Levers, meter: Meter, times: int) -> Region:
    """Residuals and states of the region's loops, then of the loops inside their bodies (run ``times`` as often)."""
    region = keep_residuals(region, levers.price / times, meter)
    if levers.slots is not None:
        region = sparse_states(region, levers.slots, levers.price / times, meter)
    return _bodies(region, lambda body, n: _kept(body, levers, meter, times * n))


def _shrink(region: Region, levers: Levers, meter: Meter, times: int, replays: Levers | None = None) -> Region:
    """Order and rematerialise a stage and the bodies of its loops; ``replays`` are the levers of their replays.

    A replay runs while the other stage does, so its memory is that stage's.
    """
    again = replays or levers

    def body(region: Region, n: int) -> Region:
        return _shrink(region, levers, meter, times * n, again)

    region = _bodies(region, body, lambda region, n: _shrink(region, again, meter, times * n))
    return rematerialise(region, _anchors(region), Trade(levers.price, times, levers.rounds), meter)


def _anchors(region: Region) -> Callable[[Eqn], bool]:
    """Equations whose order says in which the others run: those of products, else all but copies."""
    if any(e.tag in _ORDERED for e in region.eqns):
        return lambda e: e.tag in _ORDERED
    return lambda e: not e.tag.startswith(AGAIN)


_ORDERED = ("tangent", "fused", INNER)


def _bodies(region: Region, f: Callable[[Region, int], Region], replay: Callable[[Region, int], Region] | None = None
            ) -> Region:  # fmt: skip
    """The region with other bodies of its loops (and of their replays), made from them and how often they run."""
    eqns = []
    for e in region.eqns:
        if isinstance(e.op, Loop):
            op = replace(e.op, body=f(e.op.body, e.op.count))
            if op.replay is not None and replay is not None:
                often = max(replayed_steps(op.count, op.replay.slots), 1)
                op = replace(op, replay=replace(op.replay, body=replay(op.replay.body, often)))
            e = e.with_(op=op)
        eqns.append(e)
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def _joint(program: Program, policy: Policy, reverse_over: frozenset[Eqn]
           ) -> tuple[Builder, list[Var], list[tuple[int, Var]], list[Var], list[int]]:  # fmt: skip
    b = Builder(policy=policy)
    region = program.region
    env = {v: b.input(v.type, n.name) for v, n in zip(region.inputs, program.inputs, strict=True)}
    inputs = [env[v] for v in region.inputs]
    metas = [i for i in program.metas]
    tape = Tape(b, region, env, policy, reverse_over=reverse_over)
    outs = [env[v] for v in region.outputs]
    passing = outermost(policy.stop)
    active = active_vars(tape.eqns, [inputs[i] for i in metas], through_stops=passing)
    cts = [
        (i, b.input(contiguous_type(v.type), f"ct_{i}"))
        for i, v in enumerate(outs[: program.n_outputs]) if v in active
    ]  # fmt: skip
    seeds: dict[Var, Var] = {}
    for i, c in cts:
        seeds[outs[i]] = b.add(seeds.get(outs[i]), c)
    found = tape.pull(seeds, [inputs[i] for i in metas]) if cts else {}
    which = [i for i in metas if inputs[i] in found]
    return b, outs, cts, [found[inputs[i]] for i in which], which


def _cut(joint: Joint, price: float, meter: Meter) -> tuple[Region, Region | None, tuple[tuple[str, int], ...]]:
    """Forward and backward stage, and where the backward stage's saved inputs come from."""
    region, n = joint.region, joint.n_results
    outs, grads = region.outputs[:n], region.outputs[n:]
    inputs, ct_vars = region.inputs[: joint.n_inputs], region.inputs[joint.n_inputs :]
    names = region.names[: joint.n_inputs]
    late: set[Var] = set(ct_vars)
    before: list[Eqn] = []
    behind: list[Eqn] = []
    for e in region.eqns:
        if any(v in late for v in e.inputs):
            late.update(e.outs)
            behind.append(e)
        else:
            before.append(e)
    if not grads:
        return dce(Region(inputs, tuple(before), outs, names)), None, ()
    read = dict.fromkeys(v for v in (*[v for e in behind for v in e.inputs], *grads) if v not in late)
    kept = choose(before, read, *_prices(inputs, before, price, meter))
    again = needed_for(before, read, kept)
    used = {v for e in (*again, *behind) for v in e.inputs} | set(grads)
    saved = [v for v in (*inputs, *[v for e in before for v in e.outs]) if v in kept and v in used]
    position = {v: i for i, v in enumerate(inputs)}
    results = [*outs, *[v for v in saved if v not in position]]
    where = [("in", position[v]) if v in position else ("out", results.index(v, n)) for v in saved]
    forward = dce(Region(inputs, tuple(before), tuple(results), names))
    backward = dce(Region((*saved, *ct_vars), (*again, *behind), tuple(grads)))
    return forward, backward, tuple(where)


def _prices(inputs: Sequence[Var], before: Sequence[Eqn], price: float, meter: Meter
            ) -> tuple[Callable[[Var], float | None], Callable[[Eqn], float | None]]:  # fmt: skip
    """What keeping and making again costs between the stages; constants are always made again, loops never."""
    made = {v: e for e in before for v in e.outs}

    def keep(v: Var) -> float | None:
        e = made.get(v)
        if e is None or isinstance(v.type, SeqType):
            return 0.0
        if redo(e) is not None and (root_of(e) is not None or not e.inputs):
            return None
        return price * resident(v.type)

    def redo(e: Eqn) -> float | None:
        if e.impure or any(isinstance(v.type, SeqType) for v in (*e.inputs, *e.outs)) or isinstance(e.op, Loop):
            return None
        return meter(e).seconds

    return keep, redo
