"""Implicit: the derivative of what a level trained by the implicit function theorem at its final point.

With g(theta, u) the gradient that the level's update is fed (:mod:`mlc.passes.responses.stationary`), g = 0 where it
has converged, and a cotangent c of theta,

    u' = -(dg/du)^T w,        (dg/dtheta)^T w = c

(Pedregosa 2016; Lorraine et al. 2020).  Before: a loop, and equations that read its final parameters.  After: the loop
with its results stopped, and one equation with them as its results and the rule above as its backward: a ``solve``
whose body is one product with the Hessian, and one mixed product.  Both are what the adjoint of one step of the loop
would be, so stops mean the same and the planner treats them alike; of the loop's trips nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Custom, Eqn, Grad, Region, Var
from mlc.ir.lowered.responses import Implicit
from mlc.ir.opaque.estimates import Solve
from mlc.ir.origin import Origin
from mlc.ir.program import Program
from mlc.ir.types import Type
from mlc.passes.autodiff.adjoint import FallBack, Tape
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.batches import mean_gradient, unpaired
from mlc.passes.responses.ending import Ending, rebuilt
from mlc.passes.responses.fed import Fed
from mlc.passes.responses.rewrite import put
from mlc.passes.responses.site import Run, Site
from mlc.passes.responses.solving import negated
from mlc.passes.responses.stationary import Stationary, last_gradient, steps_of

__all__ = ["implicit"]

_STEPS = {"cg": 20, "gmres": 20, "neumann": 20, "nystrom": 10}
_DAMPING = 1e-2  # of Nystrom, where none was given: what it does not see is divided by it


def implicit(program: Program, site: Site, response: Implicit, policy: Policy) -> Program:
    """The program with every run of the level answered by a solve.

    Raises:
        PlanError: where a level is no fixed point of its gradient.
    """
    what = f"Implicit({response.solver!r})"
    depth = min(_depth(s.site.eqn) for s in site.steps)
    policy = replace(policy, mode="mixed" if policy.mode == "forward" else policy.mode, depth=depth - 1)
    fed = Fed(site, what)
    for run in sorted(site.runs, key=lambda r: (*r.path, r.items[-1]), reverse=True):
        places = steps_of(run, site, fed)
        if response.data == "all":
            point = mean_gradient(run, site, places, what)
        else:
            point = last_gradient(run, site, places[-1], what)
        rule = _Rule(run, site, point, response, policy)
        program = put(program, run.path, rebuilt(Ending(program, run, site, places, what), point, rule.equation))
    return program


def _depth(e: Eqn) -> int:
    assert isinstance(e.op, Grad)
    return e.op.depth


@dataclass
class _Rule:
    """The equation that a run ends in."""

    run: Run
    site: Site
    point: Stationary
    response: Implicit
    policy: Policy

    def equation(self, results: Sequence[Var], ends: Sequence[Var], told: Sequence[Var]) -> Eqn:
        """``ends = custom(u..., results..., other..., told...)``.

        Args:
            results: What the run computed, stopped.
            ends: The names of the results.
            told: Numbers for the report.
        """
        pairs = zip(self.point.given, self.point.sources, strict=True)
        ins = [v for v, source in pairs if v.type.is_float and source in self.site.moving]
        others = [v for v in self.point.given if v not in ins]
        backward, present = self._backward(ins, ends, others, told)
        op = Custom(f"Implicit of {self.site.level.title}", backward, len(ins), len(ends), present)
        loc = self.site.level.loc
        return Eqn(op, (*ins, *results, *others, *told), tuple(ends), (), loc, "response")

    def _backward(self, ins: Sequence[Var], ends: Sequence[Var], others: Sequence[Var], told: Sequence[Var]
                  ) -> tuple[Region, tuple[bool, ...]]:  # fmt: skip
        modes: frozenset[Eqn] = frozenset()
        while True:
            try:
                return self._built(ins, ends, others, told, modes)
            except FallBack as why:
                self.policy.note(why.eqn, why.reason)
                modes |= {why.eqn}

    def _built(self, ins: Sequence[Var], ends: Sequence[Var], others: Sequence[Var], told: Sequence[Var],
               modes: frozenset[Eqn]) -> tuple[Region, tuple[bool, ...]]:  # fmt: skip
        b = Builder(policy=self.policy)
        given = {v: b.input(v.type) for v in ins}
        thetas = [b.input(v.type) for v in ends]
        given.update((v, b.input(v.type)) for v in others)
        numbers = [b.input(v.type) for v in told]
        cts = [b.input(contiguous_type(v.type)) for v in ends]
        at = [given[v] for v in self.point.given]
        solved = self._solve(b, cts, [*thetas, *at], numbers, modes)
        env = dict(zip(self.point.region.inputs, [*thetas, *at], strict=True))
        tape = Tape(b, self.point.region, env, self.policy, reverse_over=modes)
        seeds: dict[Var, Var] = {}
        for v, w in zip(self.point.region.outputs, solved, strict=True):
            seeds[env[v]] = b.add(seeds.get(env[v]), negated(b, w))
        wanted = [given[v] for v in ins]
        found = tape.pull(seeds, wanted)
        present = tuple(v in found for v in wanted)
        return unpaired(b.region([found[v] for v in wanted if v in found])), present

    def _solve(self, b: Builder, cts: Sequence[Var], at: Sequence[Var], told: Sequence[Var], modes: frozenset[Eqn]
               ) -> tuple[Var, ...]:  # fmt: skip
        """W with (dg/dtheta)^T w = c."""
        r = self.response
        body = self._product([v.type for v in told], modes)
        damping = r.damping or (_DAMPING if r.solver == "nystrom" else 0.0)
        op = Solve(
            body, len(cts), len(at) + len(told), r.steps or _STEPS[r.solver], label="solve",
            solver=r.solver, tol=r.tol, damping=damping, level=self.site.level.title, told=len(told),
        )  # fmt: skip
        types = [contiguous_type(v.type) for v in cts]
        return b.emit(op, (*cts, *at, *told), types, loc=self.site.level.loc, tag=Origin.RESPONSE)

    def _product(self, told: Sequence[Type], modes: frozenset[Eqn]) -> Region:
        """``(p..., theta..., given...) -> (dg/dtheta)^T p``."""
        region = self.point.region
        n = len(self.run.trained)
        b = Builder(policy=self.policy)
        p = [b.input(contiguous_type(v.type)) for v in region.inputs[:n]]
        env = {v: b.input(v.type) for v in region.inputs}
        thetas = [env[v] for v in region.inputs[:n]]
        for t in told:
            b.input(t)
        tape = Tape(b, region, env, self.policy, reverse_over=modes)
        seeds: dict[Var, Var] = {}
        for v, x in zip(region.outputs, p, strict=True):
            seeds[env[v]] = b.add(seeds.get(env[v]), x)
        found = tape.pull(seeds, thetas)
        return unpaired(b.region([found[v] if v in found else b.zero(v.type) for v in thetas]))
