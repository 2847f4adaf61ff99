"""Loops under differentiation.

``loop`` is closed under both modes.  Reverse: the forward loop additionally emits its carries (and chosen inner
values) per trip, and a loop in the opposite direction runs the adjoint of the body.  Forward: a loop in the same
direction pushes tangents, reading the emitted carries.  Complexity: one body adjoint (or tangent) per trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Eqn, Grad, Loop, Region, Stop, Var, elem_type
from mlc.ir.lowered.loopview import LoopView
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType
from mlc.passes.autodiff.adjoint import FallBack, Tape
from mlc.passes.autodiff.forward import PUSH, pushforward
from mlc.passes.autodiff.policy import Policy
from mlc.passes.autodiff.reverse import PULL, add_cotangent, loop_activity, passes

__all__ = ["nested_gradients", "pull_loop", "push_loop"]


def nested_gradients(region: Region) -> frozenset[Eqn]:
    """Gradients inside the loops of a region.

    Where one of the region itself goes in reverse over reverse, so do these: the mixed product of a deeper loop is
    never differentiated in reverse.
    """
    bodies = [e.op.body for e in region.eqns if isinstance(e.op, Loop)]
    return frozenset(e for b in bodies for e in b.walk() if isinstance(e.op, Grad))


def augment(b: Builder, e: Eqn, values: Sequence[Var]) -> tuple[Eqn, dict[Var, Var]]:
    """Make the loop emit body values (inputs or results) per trip; returns it and the sequences."""
    e = b.current(e)
    op = e.op
    assert isinstance(op, Loop)
    known = {v: o for v, o in zip(op.body.outputs[op.n_carry :], e.outs[op.n_carry :], strict=True)}
    new = [v for v in dict.fromkeys(values) if v not in known]
    if new:
        body = Region(op.body.inputs, op.body.eqns, (*op.body.outputs, *new), op.body.names)
        outs = tuple(Var(op.sequence(v.type)) for v in new)
        larger = e.with_(op=replace(op, body=body), outs=e.outs + outs)
        b.replace(e, larger)
        known.update(zip(new, outs, strict=True))
        e = larger
    return e, {v: known[v] for v in values}


def saved_values(body: Region) -> list[Var]:
    """Values of a trip that the sweep hands to the adjoint: inner gradients and random or drawn values."""
    out: list[Var] = []
    for e in body.eqns:
        if isinstance(e.op, Grad) or e.impure:
            out.extend(e.outs)
    return out


def pull_loop(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
    """Reverse rule of a loop: adds a loop in the opposite direction and cotangents of its inputs to ``cts``."""
    policy = b.policy
    p = LoopView(b.current(e))
    carried, _ = loop_activity(b.current(e), active, policy.through)
    consts = [i for i, v in enumerate(p.consts) if v in active]
    seqs = [i for i, v in enumerate(p.seqs) if v in active]
    given = [i for i, v in enumerate(p.emitted) if v in cts]
    carried = _reaching(p, carried, {i for i in carried if p.final[i] in cts}, given)
    wrt = [*[p.in_carry[i] for i in carried], *[p.in_const[i] for i in consts], *[p.in_seq[i] for i in seqs]]
    keep = [v for v in saved_values(p.op.body)]
    modes: set[Eqn] = set()
    while True:
        try:
            body, kept = _adjoint_body(p, carried, consts, seqs, given, cts, wrt, keep, policy, frozenset(modes))
            break
        except FallBack as why:
            policy.note(why.eqn, why.reason)
            modes.add(why.eqn)
            policy = replace(policy, reverse=policy.reverse | nested_gradients(p.op.body))
    e, sequences = augment(b, e, kept)
    init = [cts[p.final[i]] if p.final[i] in cts else b.zero(p.final[i].type) for i in carried]
    acc = [b.zero(p.consts[i].type) for i in consts]
    args = (*init, *acc, *p.consts, *p.seqs, *[sequences[v] for v in kept], *[cts[p.emitted[i]] for i in given])
    op = Loop(body, len(init) + len(acc), len(p.consts), p.op.trips, not p.op.reverse,
              label=p.op.label, derived=(Origin.ADJOINT, *p.op.derived), usual=p.op.usual)  # fmt: skip
    types = [v.type for v in body.outputs[: op.n_carry]] + [op.sequence(v.type) for v in body.outputs[op.n_carry :]]
    outs = b.emit(op, args, types, loc=e.loc, tag=Origin.ADJOINT)
    targets = [*[p.init[i] for i in carried], *[p.consts[i] for i in consts], *[p.seqs[i] for i in seqs]]
    for v, ct in zip(targets, outs, strict=True):
        add_cotangent(b, cts, v, ct, active)


def _reaching(p: LoopView, carried: list[int], wanted: set[int], given: list[int]) -> list[int]:
    """The carries that may have a cotangent: wanted behind the loop, or read on the way to one, or to what is emitted.

    Running statistics and averages that only the final state needs have none, so nothing is kept for them.
    """
    while True:
        needed = {*[p.next[i] for i in wanted], *[p.emit[i] for i in given]}
        for x in reversed(p.op.body.eqns):
            if any(v in needed for v in x.outs):
                needed.update(x.inputs)
        more = wanted | {i for i in carried if p.in_carry[i] in needed}
        if more == wanted:
            return [i for i in carried if i in wanted]
        wanted = more


def _adjoint_body(p: LoopView, carried: list[int], consts: list[int], seqs: list[int], given: list[int],
                  cts: dict[Var, Var], wrt: list[Var], keep: list[Var], policy: Policy, reverse_over: frozenset[Eqn],
                  ) -> tuple[Region, list[Var]]:  # fmt: skip
    """Body of the adjoint loop, and the forward body's values that it reads (carries and saved values)."""
    b = Builder(policy=policy)
    ct_carry = [b.input(contiguous_type(p.in_carry[i].type), f"ct_{i}") for i in carried]
    ct_const = [b.input(contiguous_type(p.in_const[i].type), f"acc_{i}") for i in consts]
    env: dict[Var, Var] = {}
    for v in (*p.in_const, *p.in_seq):
        env[v] = b.input(v.type)
    states = {v: b.input(v.type) for v in p.in_carry}
    env.update(states)
    saved = {v: b.input(v.type) for v in keep}
    ct_emit = {i: b.input(elem_type(cts[p.emitted[i]].type)) for i in given}
    body = p.op.body if policy.casts is None else policy.casts.product(p.op.body)
    tape = Tape(b, body, env, policy, saved=saved, reverse_over=reverse_over)
    seeds: dict[Var, Var] = {}
    for i, c in zip(carried, ct_carry, strict=True):
        seeds[env[p.next[i]]] = b.add(seeds.get(env[p.next[i]]), c)
    for i, c in ct_emit.items():
        seeds[env[p.emit[i]]] = b.add(seeds.get(env[p.emit[i]]), c)
    found = tape.pull(seeds, [env[v] for v in wrt])
    results = [found[env[v]] if env[v] in found else _zero(b, v) for v in wrt]
    nc = len(carried)
    outs = [
        *results[:nc],
        *[b.add(a, r) for a, r in zip(ct_const, results[nc : nc + len(consts)], strict=True)],
        *results[nc + len(consts) :],
    ]
    region = b.region(outs)
    used = {v for x in region.eqns for v in x.inputs} | set(region.outputs)
    source = {**{s: v for v, s in states.items()}, **{s: v for v, s in saved.items()}}
    kept = [v for s, v in source.items() if s in used]
    inputs = tuple(v for v in region.inputs if v not in source or v in used)
    return Region(inputs, region.eqns, region.outputs), kept


def _zero(b: Builder, v: Var) -> Var:
    if isinstance(v.type, SeqType):
        n = v.type.length or 0
        inner = Builder()
        zero = inner.zero(v.type.elem) if not isinstance(v.type.elem, SeqType) else _zero(inner, Var(v.type.elem))
        return b.emit(Loop(inner.region([zero]), 0, 0, n, label="zeros"), (), (v.type,))[0]
    return b.zero(v.type)


def push_loop(b: Builder, e: Eqn, tan: dict[Var, Var]) -> None:
    """Forward rule of a loop: a loop in the same direction over tangents, reading the emitted carries."""
    p = LoopView(b.current(e))
    given = {v for v in (*p.init, *p.consts, *p.seqs) if v in tan}
    carried, _ = loop_activity(b.current(e), given, b.policy.through)
    consts = [i for i, v in enumerate(p.consts) if v in tan]
    seqs = [i for i, v in enumerate(p.seqs) if v in tan]
    inner = Builder(policy=b.policy)
    t_carry = [inner.input(contiguous_type(p.in_carry[i].type)) for i in carried]
    t_const = [inner.input(tan[p.consts[i]].type) for i in consts]
    env: dict[Var, Var] = {v: inner.input(v.type) for v in p.in_const}
    env.update((v, inner.input(v.type)) for v in p.in_seq)
    states = {v: inner.input(v.type) for v in p.in_carry}
    env.update(states)
    t_seq = [inner.input(elem_type(tan[p.seqs[i]].type)) for i in seqs]
    policy = Policy("reverse", b.policy.stop, depth=b.policy.depth, casts=b.policy.casts)
    source = p.op.body if policy.casts is None else policy.casts.product(p.op.body)
    tape = Tape(inner, source, env, policy)
    start = {env[p.in_carry[i]]: t for i, t in zip(carried, t_carry, strict=True)}
    start.update((env[p.in_const[i]], t) for i, t in zip(consts, t_const, strict=True))
    start.update((env[p.in_seq[i]], t) for i, t in zip(seqs, t_seq, strict=True))
    through = b.policy.through
    found = pushforward(inner, tape.eqns, start, passes=lambda x: isinstance(x.op, Stop) and passes(x, through))
    emits = [i for i, v in enumerate(p.emit) if env[v] in found]
    outs = [found[env[p.next[i]]] if env[p.next[i]] in found else inner.zero(p.next[i].type) for i in carried]
    outs += [found[env[p.emit[i]]] for i in emits]
    body = inner.region(outs)
    e, sequences = augment(b, e, list(p.in_carry))
    init = [tan[p.init[i]] if p.init[i] in tan else b.zero(p.init[i].type) for i in carried]
    args = (*init, *[tan[p.consts[i]] for i in consts], *p.consts, *p.seqs,
            *[sequences[v] for v in p.in_carry], *[tan[p.seqs[i]] for i in seqs])  # fmt: skip
    op = Loop(body, len(init), len(consts) + len(p.consts), p.op.trips, p.op.reverse,
              label=p.op.label, derived=(Origin.TANGENT, *p.op.derived), usual=p.op.usual)  # fmt: skip
    types = [v.type for v in outs[: len(init)]] + [op.sequence(v.type) for v in outs[len(init) :]]
    results = b.emit(op, args, types, loc=e.loc, tag=Origin.TANGENT)
    tan.update((p.final[i], r) for i, r in zip(carried, results[: len(carried)], strict=True))
    tan.update((p.emitted[i], r) for i, r in zip(emits, results[len(carried) :], strict=True))


PULL[Loop] = pull_loop
PUSH[Loop] = push_loop
