"""Lowering: a program and the decisions of a plan become two stage graphs, forward and backward.

The joint graph (values and hypergradient) is built by the adjoint of the whole program and cut where the first
cotangent of an output enters: what lies before runs at the call, what lies behind runs at ``backward()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlc.ir.builder import Builder, contiguous_type, dce
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.program import Program
from mlc.passes.adjoint import FallBack, Policy, Tape, lower_grads
from mlc.passes.remat import rematerialise
from mlc.passes.reverse import active_vars

__all__ = ["Stages", "lower"]


@dataclass(frozen=True)
class Stages:
    """Executable form of a program, before code generation.

    Attributes:
        forward: ``inputs -> (results, saved)``.
        backward: ``(saved, cotangents) -> hypergradients``; None when nothing is differentiated.
        n_results: Number of results of the program at the head of ``forward``'s outputs.
        saved: Which ``forward`` outputs and which program inputs the backward stage reads: ``("out", i)`` or
            ``("in", i)``.
        cotangents: Output positions that have a cotangent input.
        gradients: Input positions (meta-parameters) in the order of ``backward``'s results.
    """

    forward: Region
    backward: Region | None
    n_results: int
    saved: tuple[tuple[str, int], ...]
    cotangents: tuple[int, ...]
    gradients: tuple[int, ...]


def lower(program: Program, policy: Policy, rounds: int = 2) -> Stages:
    """Differentiate and cut; ``rounds`` of rematerialisation inside products.

    Raises:
        NotForward: when the policy asks for forward mode and an operator is in the way.
    """
    if policy.mode == "forward":
        from mlc.passes.columns import forward_stages

        return forward_stages(program, policy, rounds)
    reverse_over: frozenset[Eqn] = frozenset()
    while True:
        try:
            joint, outs, cts, grads, which = _joint(program, policy, reverse_over)
            break
        except FallBack as why:
            policy.note(why.eqn, why.reason)
            reverse_over |= {why.eqn}
    return _cut(program, policy, joint, outs, cts, grads, which, rounds)


def _shrink(region: Region, rounds: int) -> Region:
    """Order and rematerialise the backward stage and the bodies of its adjoint loops."""

    def one(e: Eqn) -> Eqn:
        if not isinstance(e.op, Loop) or e.tag != "adjoint":
            return e
        return e.with_(op=replace(e.op, body=rematerialise(e.op.body, lambda x: x.tag == "tangent", rounds)))

    shrunk = Region(region.inputs, tuple(one(e) for e in region.eqns), region.outputs, region.names)
    return rematerialise(shrunk, lambda x: x.tag == "tangent", rounds)


def _joint(program: Program, policy: Policy, reverse_over: frozenset[Eqn]
           ) -> tuple[Builder, list[Var], list[tuple[int, Var]], list[Var], list[int]]:  # fmt: skip
    b = Builder(policy=policy)
    region = program.region
    env = {v: b.input(v.type, n.name) for v, n in zip(region.inputs, program.inputs, strict=True)}
    inputs = [env[v] for v in region.inputs]
    metas = [i for i in program.metas]
    tape = Tape(b, region, env, policy, reverse_over=reverse_over)
    outs = [env[v] for v in region.outputs]
    passing: bool | str = True if policy.stop == "inner" else "inner"
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


def _cut(program: Program, policy: Policy, b: Builder, outs: list[Var], cts: list[tuple[int, Var]], grads: list[Var],
         which: list[int], rounds: int) -> Stages:  # fmt: skip
    joint = lower_grads(dce(Region(tuple(b.inputs), tuple(b.eqns), (*outs, *grads), tuple(b.names))), policy)
    n_in = len(program.inputs)
    ct_vars = joint.inputs[n_in:]
    outs, grads = list(joint.outputs[: len(outs)]), list(joint.outputs[len(outs) :])
    late: set[Var] = set(ct_vars)
    before: list[Eqn] = []
    behind: list[Eqn] = []
    for e in joint.eqns:
        if any(v in late for v in e.inputs):
            late.update(e.outs)
            behind.append(e)
        else:
            before.append(e)
    if not grads:
        forward = dce(Region(joint.inputs[:n_in], tuple(before), tuple(outs), joint.names[:n_in]))
        return Stages(forward, None, len(outs), (), (), ())
    behind = _with_factories(before, behind, grads)
    saved = _crossing(behind, grads, ct_vars)
    position = {v: i for i, v in enumerate(joint.inputs[:n_in])}
    results = list(outs)
    where: list[tuple[str, int]] = []
    for v in saved:
        if v in position:
            where.append(("in", position[v]))
        else:
            where.append(("out", len(results)))
            results.append(v)
    forward = dce(Region(joint.inputs[:n_in], tuple(before), tuple(results), joint.names[:n_in]))
    backward = _shrink(dce(Region((*saved, *ct_vars), tuple(behind), tuple(grads))), rounds)
    return Stages(forward, backward, len(outs), tuple(where), tuple(i for i, _ in cts), tuple(which))


def _with_factories(before: Sequence[Eqn], behind: list[Eqn], grads: Sequence[Var]) -> list[Eqn]:
    """Constants are made anew behind the cut instead of being kept."""
    cheap = [e for e in before if not e.inputs and not e.impure]
    needed = {v for e in behind for v in e.inputs} | set(grads)
    return [e for e in cheap if any(v in needed for v in e.outs)] + behind


def _crossing(behind: Sequence[Eqn], grads: Sequence[Var], ct_vars: Sequence[Var]) -> list[Var]:
    own = {v for e in behind for v in e.outs} | set(ct_vars)
    return list(
        dict.fromkeys([v for e in behind for v in e.inputs if v not in own] + [g for g in grads if g not in own])
    )
