"""Evolution: the derivative of what follows from a level's training, from values at random meta-parameters.

With F the results of the program as a function of a level's sources u (meta-parameters, what levels before it trained),
as far as they depend on them through that level, a cotangent c and Gaussian directions e_1 ... e_k,

    u' = 1/k sum_s <c, F(u + sigma e_s) - F(u - sigma e_s)> / (2 sigma) e_s

which is an unbiased estimate of the gradient of F smoothed by noise of standard deviation sigma (antithetic evolution
strategies; Salimans et al. 2017; Metz et al. 2019).  The level and all that comes behind it run 2 k times more, at
``backward()``, on the same items and random numbers; nothing of their trips is kept and nothing is differentiated.
Where a loop enters the level again and again (tasks), F is what one trip of that loop leaves; behind it all is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Custom, Eqn, Index, Loop, Pack, Region, Var, aten, map_vars
from mlc.ir.lowered.responses import Evolution
from mlc.ir.opaque.estimates import Noise, Tell
from mlc.ir.origin import Origin
from mlc.ir.program import Program
from mlc.ir.types import SeqType
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.again import Again, again
from mlc.passes.responses.estimates.forwardgradient import elements, refuse_below, sources_of
from mlc.passes.responses.estimates.persistent import persistent
from mlc.passes.responses.estimates.recorded import recorded
from mlc.passes.responses.rewrite import ALWAYS, copied, put, renamed_outs
from mlc.passes.responses.site import Run, Site
from mlc.passes.responses.stationary import refused

__all__ = ["evolution"]


def evolution(program: Program, site: Site, response: Evolution, policy: Policy) -> Program:
    """The program with the ways through every run of the level answered by differences of results.

    Raises:
        PlanError: for a level that another one steps through.
    """
    refuse_below(site, "Evolution")
    if response.persistent:
        return put(program, (), persistent(program, site, response, policy))
    for run in sorted(site.runs, key=lambda r: (*r.path, r.items[-1]), reverse=True):
        program = put(program, run.path, _answered(program, run, site, response, policy))
    return program


def _answered(program: Program, run: Run, site: Site, response: Evolution, policy: Policy) -> Region:
    region = program.region_at(run.path)
    n = len(region.outputs) if run.path else program.n_outputs
    second = again(region, run, site, "Evolution", from_metas=True)
    left = (*second.ends, *second.others)
    results = [v for v in dict.fromkeys(region.outputs[:n]) if v.type.is_float]
    behind = _behind(region, left, results, site)
    results = [v for v in results if v in left or any(v in e.outs for e in behind)]
    raw = {v: Var(v.type, v.mask) for v in left}
    eqns: list[Eqn] = []
    for e in region.eqns:
        eqns.append(renamed_outs(e, raw))
        eqns += [Eqn(ALWAYS, (raw[v],), (v,), (), e.loc, "response") for v in e.outs if v in raw]
    b = Builder(merge=False)
    zeros = [b.zero(v.type) for v in results]
    made = _Rule(site, second, behind, results, response, policy).equation(zeros)
    sums = {v: Var(v.type, v.mask) for v in results}
    added = [Eqn(aten("add", "Tensor"), (v, z), (sums[v],), (), site.level.loc, "response")
             for v, z in zip(results, made.outs, strict=True)]  # fmt: skip
    outputs = (*[sums.get(v, v) for v in region.outputs[:n]], *region.outputs[n:])
    return Region(region.inputs, (*eqns, *b.eqns, made, *added), outputs, region.names)


def _behind(region: Region, left: Sequence[Var], results: Sequence[Var], site: Site) -> list[Eqn]:
    """Equations from what the run leaves to the results."""
    made_by_run = {v for v in left}
    reached, on_the_way = set(made_by_run), list[Eqn]()
    for e in region.eqns:
        if any(v in reached for v in e.inputs) and not set(e.outs) & made_by_run:
            reached.update(e.outs)
            on_the_way.append(e)
    needed, kept = set(results), list[Eqn]()
    for e in reversed(on_the_way):
        if any(v in needed for v in e.outs):
            if e.impure:
                raise refused(site, "Evolution", e, "numbers are drawn behind it that depend on it")
            kept.append(e)
            needed.update(e.inputs)
    return kept[::-1]


@dataclass
class _Rule:
    """The equation that gives zero, and the estimate as its derivative."""

    site: Site
    second: Again
    behind: list[Eqn]
    results: Sequence[Var]
    response: Evolution
    policy: Policy

    def equation(self, zeros: Sequence[Var]) -> Eqn:
        """``zeros = custom(sources..., zeros..., other...)``."""
        title = self.site.level.title
        ins = sources_of(self.second, self.site)
        whole, direct = self._whole(ins)
        others = list(dict.fromkeys(v for v in whole.inputs if v not in ins and v not in direct.values()))
        b = Builder(policy=self.policy)
        given = {v: b.input(v.type) for v in ins}
        for v in zeros:
            b.input(v.type)
        given.update((v, b.input(v.type)) for v in others)
        cts = [b.input(contiguous_type(v.type)) for v in zeros]
        given.update((v, given[s]) for s, v in direct.items())
        found = self._estimate(b, whole, ins, given, cts)
        present = (True,) * len(ins)
        op = Custom(f"Evolution of {title}", b.region(found), len(ins), len(zeros), present)
        outs = tuple(Var(v.type) for v in zeros)
        return Eqn(op, (*ins, *zeros, *others), outs, (), self.site.level.loc, "response")

    def _whole(self, ins: Sequence[Var]) -> tuple[Region, dict[Var, Var]]:
        """``sources and others -> results``, and the names under which what lies behind the run reads sources.

        Those ways have their own derivative, which is exact: there a source stays what it is.
        """
        direct = {v: Var(v.type) for v in ins}
        behind = [e.with_(args=map_vars(e.args, lambda v: direct.get(v, v)),
                          kwargs=tuple((k, map_vars(a, lambda v: direct.get(v, v))) for k, a in e.kwargs))
                  for e in self.behind]  # fmt: skip
        eqns = (*self.second.region.eqns, *behind)
        made = {v for e in eqns for v in e.outs}
        read = dict.fromkeys((*self.second.given, *[v for e in behind for v in e.inputs if v not in made]))
        return Region(tuple(read), eqns, tuple(self.results)), {s: v for s, v in direct.items() if v in read}

    def _estimate(self, b: Builder, whole: Region, ins: Sequence[Var], given: dict[Var, Var], cts: Sequence[Var]
                  ) -> list[Var]:  # fmt: skip
        k = self.response.samples
        zeros = [b.zero(contiguous_type(v.type)) for v in ins]
        noise: list[Var] = []
        for v in ins:
            drawn = [b.emit(Noise(), (cts[0],), (contiguous_type(v.type),))[0] for _ in range(k)]
            noise.append(b.emit(Pack(), tuple(drawn), (SeqType(contiguous_type(v.type), k),))[0])
        fixed = [given[v] for v in whole.inputs]
        inner = Builder(policy=self.policy)
        sums = [inner.input(contiguous_type(v.type)) for v in ins]
        at = {v: inner.input(v.type) for v in whole.inputs}
        back = [inner.input(v.type) for v in cts]
        each = [inner.input(contiguous_type(v.type)) for v in ins]
        body, slope = self._pair(inner, whole, ins, at, back, each, sums)
        region = Region(tuple(inner.inputs), tuple(inner.eqns), (*body, slope))
        op = Loop(region, len(ins), len(fixed) + len(cts), k, label="samples")
        types = [*[v.type for v in zeros], op.sequence(slope.type)]
        *total, slopes = b.emit(op, (*zeros, *fixed, *cts, *noise), types, loc=self.site.level.loc, tag=Origin.RESPONSE)
        means = [b.emit(aten("div", "Tensor"), (t, k), (t.type,))[0] for t in total]
        assert isinstance(slopes.type, SeqType)
        picked = [b.emit(Index(i), (slopes,), (slopes.type.elem,))[0] for i in range(k)]
        size = float(sum(elements(v) for v in ins))
        stack = recorded(lambda ts: [torch.stack(ts), ts[0].new_full((), size)], [v.type for v in picked])
        row, count = b.inline(stack, picked, tag=Origin.RESPONSE)
        tell = Tell(self.site.level.title, "slopes")  # at each: one of them is always wanted
        return [b.emit(tell, (m, row, count), (m.type,))[0] for m in means]

    def _pair(self, b: Builder, whole: Region, ins: Sequence[Var], at: dict[Var, Var], cts: Sequence[Var],
              noise: Sequence[Var], sums: Sequence[Var]) -> tuple[list[Var], Var]:  # fmt: skip
        """One antithetic pair: the sums with it, and its slope."""
        sigma = self.response.sigma
        sides = []
        for sign in (sigma, -sigma):
            here = dict(at)
            for v, e in zip(ins, noise, strict=True):
                (here[v],) = b.emit(aten("add", "Tensor"), (at[v], e), (v.type,), (("alpha", sign),))
            side = copied(whole)
            env = dict(zip(side.inputs, [here[v] for v in whole.inputs], strict=True))
            for x in side.eqns:
                b.copy_eqn(x, env)
            sides.append([env[v] for v in side.outputs])
        n = len(cts)

        def f(ts: list[Tensor]) -> list[Tensor]:
            up, down, back, es, totals = (
                ts[:n],
                ts[n : 2 * n],
                ts[2 * n : 3 * n],
                ts[3 * n : -len(sums)],
                ts[-len(sums) :],
            )
            slope = es[0].new_zeros(())
            for x, y, c in zip(up, down, back, strict=True):
                slope = slope + ((x - y) * c).sum().to(slope.dtype) / (2 * sigma)
            return [*[t + slope.to(t.dtype) * e for t, e in zip(totals, es, strict=True)], slope]

        args = [*sides[0], *sides[1], *cts, *noise, *sums]
        *found, slope = b.inline(recorded(f, [v.type for v in args]), args, tag=Origin.RESPONSE)
        return found, slope
