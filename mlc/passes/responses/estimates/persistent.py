"""Persistent evolution strategies: calls are windows of one long unroll, whose particles live from call to call.

A particle is the whole program once more, at meta-parameters u + sigma e, from a state of its own: where it got to in
the window before.  With e_1 ... e_t the directions of a particle since the unroll began, s_t = e_1 + ... + e_t, and
pairs of particles that differ in the signs of all of their directions,

    u' = 1/k sum_s <c, F(u + sigma e_t, state up) - F(u - sigma e_t, state down)> / (2 sigma) s_t

(Vicol, Metz and Sohl-Dickstein 2021, algorithm 2).  Summed over the windows it is an unbiased estimate of the gradient
of the sum of results over the whole unroll, smoothed by the noise; s_t, not e_t, gives a direction its share in every
later window too, which is what truncation leaves out.

Particles run beside the loop in the forward stage (2 k more runs, nothing of their trips is kept): they go on whether
or not the result is differentiated.  All ways by which a meta-parameter reaches a result are in the differences, so all
others are cut.  Which states there are says the program: inputs that it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Custom, Eqn, Loop, Region, Var, aten
from mlc.ir.lowered.responses import Evolution
from mlc.ir.opaque.estimates import Keep, Recall, Tell
from mlc.ir.origin import Origin
from mlc.ir.program import Program
from mlc.ir.types import SeqType, TensorType, Type
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.estimates.recorded import recorded
from mlc.passes.responses.rewrite import ALWAYS, copied
from mlc.passes.responses.site import Site
from mlc.passes.responses.stationary import refused

__all__ = ["persistent"]

_WHAT = "Evolution(persistent=True)"


def persistent(program: Program, site: Site, response: Evolution, policy: Policy) -> Region:
    """The program's region with particles beside it, whose differences are its derivative.

    Raises:
        PlanError: where particles cannot run beside the loop.
    """
    region = program.region
    metas = [i for i in program.metas if _real(region.inputs[i])]
    states = [i for i, x in enumerate(program.inputs) if x.role in ("trained", "state") and _tensor(region.inputs[i])]
    made = _Particles(program, site, metas, states, response, policy)
    read = {v for e in made.particle()[0].eqns for v in e.inputs}
    made.states = [i for i in states if region.inputs[i] in read]
    if not made.states:
        raise refused(site, _WHAT, site.steps[0].site.eqn, "the call goes on from no tensor that it changes")
    return made.region()


def _tensor(v: Var) -> bool:
    return isinstance(v.type, TensorType)


def _real(v: Var) -> bool:
    return isinstance(v.type, TensorType) and v.type.is_float and not v.type.dtype.is_complex


@dataclass
class _Particles:
    """Builds the region.

    Attributes:
        metas: Positions of the meta-parameters that are perturbed.
        states: Positions of the inputs that every particle has for itself.
    """

    program: Program
    site: Site
    metas: Sequence[int]
    states: Sequence[int]
    response: Evolution
    policy: Policy

    def region(self) -> Region:
        """What stands in the place of the program's."""
        old, n = self.program.region, self.program.n_outputs
        particle, results, ends = self.particle()
        fresh = {old.inputs[i]: Var(old.inputs[i].type, old.inputs[i].mask) for i in self.metas}
        cut = [Eqn(ALWAYS, (new,), (m,), (), None, "response") for m, new in fresh.items()]
        b = Builder(merge=False, policy=self.policy)
        apart, sums = self._run(b, particle, len(results), ends)
        zeros = [b.zero(v.type) for v in results]
        made = self._rule(list(fresh.values()), zeros, apart, sums)
        added = {v: Var(v.type, v.mask) for v in results}
        adds = [Eqn(aten("add", "Tensor"), (v, z), (added[v],), (), self.site.level.loc, "response")
                for v, z in zip(results, made.outs, strict=True)]  # fmt: skip
        outputs = (*[added.get(v, v) for v in old.outputs[:n]], *old.outputs[n:])
        inputs = tuple(fresh.get(v, v) for v in old.inputs)
        return Region(inputs, (*cut, *old.eqns, *b.eqns, made, *adds), outputs, old.names)

    def particle(self) -> tuple[Region, list[Var], list[int]]:
        """``metas, states, others -> results, ends``: what depends on the first two; positions of the ends."""
        region, n = self.program.region, self.program.n_outputs
        own = [region.inputs[i] for i in (*self.metas, *self.states)]
        moved = set(own)
        for e in region.eqns:
            if any(v in moved for v in e.inputs):
                moved.update(e.outs)
        results = [v for v in dict.fromkeys(region.outputs[:n]) if v in moved and _real(v)]
        if not results:
            raise refused(self.site, _WHAT, self.site.steps[0].site.eqn, "no result depends on a meta-parameter")
        ends = [i for i, v in enumerate(region.outputs) if i >= n and v in moved and _tensor(v)]
        needed, kept = {*results, *[region.outputs[i] for i in ends]}, list[Eqn]()
        for e in reversed(region.eqns):
            if any(v in needed for v in e.outs) and any(v in moved for v in e.inputs):
                if e.impure:
                    raise refused(
                        self.site, _WHAT, e, "numbers are drawn that depend on a meta-parameter or on its state"
                    )
                kept.append(e)
                needed.update(e.inputs)
        kept.reverse()
        made = {v for e in kept for v in e.outs}
        read = dict.fromkeys([*own, *[v for e in kept for v in e.inputs if v not in made]])
        outputs = (*results, *[region.outputs[i] for i in ends])
        return Region(tuple(read), tuple(kept), outputs), results, ends

    def _run(self, b: Builder, particle: Region, n: int, ends: Sequence[int]) -> tuple[list[Var], list[Var]]:
        """The particles' window: differences of results, and the sums of directions, by pair."""
        k, level = self.response.samples, self.site.level.title
        m, s = len(self.metas), len(self.states)
        own = particle.inputs[: m + s]
        types = [_seq(v, k) for v in (*own[m:], *own[m:], *own[:m], *own[:m])]
        recall = Recall(level, tuple(self.states), tuple(self.metas), k)
        recalled = b.emit(recall, (*own[m:], *own[:m]), types, loc=self.site.level.loc, tag=Origin.RESPONSE)
        ups, downs, each, sums = (recalled[:s], recalled[s : 2 * s], recalled[2 * s : 2 * s + m], recalled[2 * s + m :])
        fixed = [*own[:m], *particle.inputs[m + s :]]
        body = self._pair(particle, n)
        op = Loop(body, 0, len(fixed), k, label="particles")
        emitted = [op.sequence(v.type) for v in body.outputs]
        outs = b.emit(op, (*fixed, *ups, *downs, *each), emitted, loc=self.site.level.loc, tag=Origin.RESPONSE)
        keep = Keep(level, n, tuple(self.metas), tuple(ends))
        args = (*outs[:n], *sums, *outs[n:])
        told = b.emit(keep, args, [v.type for v in outs[:n]], loc=self.site.level.loc, tag=Origin.RESPONSE)
        return list(told), list(sums)

    def _pair(self, particle: Region, n: int) -> Region:
        """``metas, others; up, down, directions -> differences of results, ends up, ends down``."""
        m, s = len(self.metas), len(self.states)
        b = Builder(policy=self.policy)
        fixed = [b.input(v.type) for v in (*particle.inputs[:m], *particle.inputs[m + s :])]
        both = [[b.input(contiguous_type(v.type)) for v in particle.inputs[m : m + s]] for _ in range(2)]
        each = [b.input(contiguous_type(v.type)) for v in particle.inputs[:m]]
        sides = []
        for state, sign in zip(both, (self.response.sigma, -self.response.sigma), strict=True):
            moved = [b.emit(aten("add", "Tensor"), (u, e), (u.type,), (("alpha", sign),))[0]
                     for u, e in zip(fixed[:m], each, strict=True)]  # fmt: skip
            side = copied(particle)
            env = dict(zip(side.inputs, [*moved, *state, *fixed[m:]], strict=True))
            for e in side.eqns:
                b.copy_eqn(e, env)
            sides.append([env[v] for v in side.outputs])
        up, down = sides
        apart = [b.emit(aten("sub", "Tensor"), (x, y), (contiguous_type(x.type),))[0]
                 for x, y in zip(up[:n], down[:n], strict=True)]  # fmt: skip
        return b.region([*apart, *up[n:], *down[n:]])

    def _rule(self, metas: Sequence[Var], zeros: Sequence[Var], apart: Sequence[Var], sums: Sequence[Var]) -> Eqn:
        """``zeros = custom(metas..., zeros..., differences..., sums...)``."""
        k, level = self.response.samples, self.site.level
        b = Builder(policy=self.policy)
        given = [b.input(v.type) for v in metas]
        for v in zeros:
            b.input(v.type)
        others = [b.input(v.type) for v in (*apart, *sums)]
        cts = [b.input(contiguous_type(v.type)) for v in zeros]
        totals = [b.zero(contiguous_type(v.type)) for v in given]
        body = self._summed(len(zeros), [v.type for v in (*totals, *cts)], [_elem(v) for v in others])
        op = Loop(body, len(totals), len(cts), k, label="samples")
        types = [*[v.type for v in totals], op.sequence(body.outputs[-1].type)]
        *found, slopes = b.emit(op, (*totals, *cts, *others), types, loc=level.loc, tag=Origin.RESPONSE)
        means = [b.emit(aten("div", "Tensor"), (t, k), (t.type,))[0] for t in found]
        size = sum(_numel(v) for v in given)
        tell = Tell(level.title, "norms")
        told = [b.emit(tell, (m, slopes, size), (m.type,))[0] for m in means]  # at each: one of them is always wanted
        rule = Custom(f"{_WHAT} of {level.title}", b.region(told), len(metas), len(zeros), (True,) * len(metas))
        outs = tuple(Var(v.type) for v in zeros)
        return Eqn(rule, (*metas, *zeros, *apart, *sums), outs, (), level.loc, "response")

    def _summed(self, n: int, fixed: Sequence[Type], each: Sequence[Type]) -> Region:
        """``totals, cotangents; differences, sums -> totals, the length of what this pair adds``."""
        m, sigma = len(self.metas), self.response.sigma

        def f(ts: list[Tensor]) -> list[Tensor]:
            totals, cts, apart, sums = ts[:m], ts[m : m + n], ts[m + n : m + 2 * n], ts[m + 2 * n :]
            slope = sums[0].new_zeros(())
            for x, c in zip(apart, cts, strict=True):
                slope = slope + (x * c).sum().to(slope.dtype) / (2 * sigma)
            length = torch.stack([s.square().sum().to(slope.dtype) for s in sums]).sum().sqrt() * slope
            return [*[t + slope.to(t.dtype) * s for t, s in zip(totals, sums, strict=True)], length]

        return recorded(f, [*fixed, *each])


def _seq(v: Var, k: int) -> SeqType:
    return SeqType(contiguous_type(v.type), k)


def _elem(v: Var) -> TensorType:
    assert isinstance(v.type, SeqType) and isinstance(v.type.elem, TensorType)
    return v.type.elem


def _numel(v: Var) -> int:
    assert isinstance(v.type, TensorType)
    return v.type.numel
