"""The adjoint of a whole program: values and hypergradients in one joint graph, or in forward mode both stages at once.

The first pass of the pipeline.  A gradient without a mixed product falls back to reverse over reverse, a program that
cannot go forward to mixed mode; both are written into the findings with their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mlc.errors import PlanError
from mlc.ir.builder import Builder, contiguous_type, dce
from mlc.ir.core import Eqn, Region, Var
from mlc.ir.lowered.contract import Context, Graphs, Modes
from mlc.ir.lowered.precision import Resolved
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.passes.autodiff.adjoint import FallBack, Tape, lower_grads
from mlc.passes.autodiff.forward import NotForward
from mlc.passes.autodiff.jacobian import forward_stages
from mlc.passes.autodiff.loops import nested_gradients
from mlc.passes.autodiff.policy import Policy
from mlc.passes.autodiff.reverse import active_vars, outermost
from mlc.passes.autodiff.watching import marked
from mlc.passes.precision.casts import Twins, casts_of
from mlc.passes.precision.store import storage_of
from mlc.passes.responses.paths.off import cut_flows
from mlc.passes.responses.paths.severed import severed
from mlc.passes.responses.respond import differences, respond

__all__ = ["Differentiate", "differentiate"]


@dataclass(frozen=True)
class Differentiate:
    """Hypergradients of a program, inner gradients lowered (``program -> joint``, or ``-> stages`` in forward mode)."""

    name: ClassVar[str] = "differentiate"
    takes: ClassVar[type[Program]] = Program
    ensures: ClassVar[str] = "no gradient equation is left; the graph gives results and hypergradients"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """Under the modes of the context; which one was used, and why, goes into the findings."""
        assert isinstance(graphs, Program)
        found = context.findings
        if context.modes.responses and context.precision:
            raise PlanError(
                "a precision policy beside a response other than the exact unroll",
                loc=graphs.loc, advice="give one of precision= and flows=",
            )  # fmt: skip

        def note(e: Eqn, why: str) -> None:
            found.fallbacks[str(e.loc)] = why

        asked, precision = context.modes, context.precision or Resolved()
        if asked.off:
            graphs = severed(graphs, cut_flows(graphs, asked.off))
        reverse, apart = _gradients(graphs, asked), differences(graphs, asked.responses)
        policy = Policy(
            asked.mode, context.stop, note, reverse, apart, casts=casts_of(graphs, precision), watching=True
        )
        graphs = respond(marked(graphs), asked.responses, policy)
        try:
            made = differentiate(graphs, policy)
            found.mode, found.why_not = asked.mode, ""
        except NotForward as why:
            made = differentiate(graphs, replace(policy, mode="mixed"))
            found.mode, found.why_not = "mixed", str(why)
        if isinstance(made, Joint):
            made = replace(made, storage=storage_of(graphs, precision, made.region))
        return made


def differentiate(program: Program, policy: Policy) -> Joint | Stages:
    """Adjoint of the whole program, inner gradients lowered; in forward mode both stages, as they then are.

    Raises:
        NotForward: when the policy asks for forward mode and an operator is in the way.
    """
    if policy.mode == "forward":
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
    cotangents = tuple(i for i, _ in cts)
    return Joint(region, len(program.inputs), len(outs), cotangents, tuple(which), program.handed)


def _joint(program: Program, policy: Policy, reverse_over: frozenset[Eqn]
           ) -> tuple[Builder, list[Var], list[tuple[int, Var]], list[Var], list[int]]:  # fmt: skip
    b = Builder(policy=policy)
    region = program.region
    env = {v: b.input(v.type, n.name) for v, n in zip(region.inputs, program.inputs, strict=True)}
    inputs = [env[v] for v in region.inputs]
    metas = [i for i in program.metas]
    twins: Twins = {}
    if policy.casts is not None:
        region, twins = policy.casts.whole(region, program.n_outputs)
    tape = Tape(b, region, env, policy, reverse_over=reverse_over, twins=twins)
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


def _gradients(program: Program, modes: Modes) -> frozenset[Eqn]:
    """Gradient equations of the levels that go in reverse."""
    chosen = [x for x in program.levels if modes.levels.get(x.name) == "reverse"]
    return frozenset(e for level in chosen for _, e in program.places(level))
