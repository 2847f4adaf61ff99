"""ForwardGradient: an unbiased estimate of the derivative of what a level trained, from random directions.

With J the Jacobian of what a run trained by its sources (meta-parameters, what levels before it trained), a cotangent
c and Gaussian directions v_1 ... v_k,

    u' = 1/k sum_s <c, J v_s> v_s,        E[u'] = J^T c

(Baydin et al. 2022; Silver et al. 2022).  The run is run a second time, at ``backward()``, with k tangents beside its
values (:mod:`mlc.passes.autodiff.tangents`); nothing of its trips is kept.  Expected squared error:
(n + 1) |J^T c|^2 / k for n elements of the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mlc.errors import PlanError
from mlc.ir.builder import Builder, contiguous, contiguous_type
from mlc.ir.core import Custom, Eqn, Region, Stop, Var
from mlc.ir.lowered.nesting import map_bodies
from mlc.ir.lowered.responses import ForwardGradient
from mlc.ir.opaque.estimates import Noise, Tell
from mlc.ir.origin import Origin
from mlc.ir.program import Program
from mlc.ir.types import TensorType, Type
from mlc.passes.autodiff.adjoint import Tape, lower_grads
from mlc.passes.autodiff.forward import NotForward
from mlc.passes.autodiff.policy import Policy
from mlc.passes.autodiff.reverse import outermost
from mlc.passes.autodiff.tangents import Pusher
from mlc.passes.responses.again import Again, again
from mlc.passes.responses.ending import Ending, rebuilt
from mlc.passes.responses.estimates.recorded import recorded
from mlc.passes.responses.rewrite import put
from mlc.passes.responses.site import Run, Site
from mlc.passes.responses.stationary import Stationary, refused

__all__ = ["elements", "forward_gradient", "refuse_below", "sources_of"]


def forward_gradient(program: Program, site: Site, response: ForwardGradient, policy: Policy) -> Program:
    """The program with every run of the level answered by directional derivatives.

    Raises:
        PlanError: for a level that another one steps through, and where an operator cannot go forward.
    """
    what = "ForwardGradient"
    refuse_below(site, what)
    for run in sorted(site.runs, key=lambda r: (*r.path, r.items[-1]), reverse=True):
        second = again(program.region_at(run.path), run, site, what, from_metas=True)
        rule = _Rule(run, site, second, response, policy)
        nothing = Stationary(Region((), (), ()), (), ())
        program = put(program, run.path, rebuilt(Ending(program, run, site, (), what), nothing, rule.equation))
    return program


def refuse_below(site: Site, what: str) -> None:
    """Refuse levels whose response the program itself steps along: its values would be random.

    A loop that enters the level again and again without such steps (tasks, restarts) is none of these: each entry has
    directions of its own.

    Raises:
        PlanError: naming the level, at the gradient that would be random.
    """
    if site.above:
        raise refused(
            site, what, site.above[0].site.eqn,
            "another level steps along the gradient of what it trained, which would be random, and so would be every "
            "value behind it",
        )  # fmt: skip


def sources_of(second: Again, site: Site) -> list[Var]:
    """What directions are drawn for.

    Raises:
        PlanError: for sequences.
    """
    found = [v for v in second.given if v in site.moving and v.type.is_float]
    odd = next((v for v in found if not isinstance(v.type, TensorType) or v.type.dtype.is_complex), None)
    if odd is not None:
        raise PlanError(
            f"level {site.level.title}: no directions can be drawn for a source of type {odd.type}",
            loc=site.level.loc, advice="use mlc.Unroll() or mlc.Truncated(steps)",
        )  # fmt: skip
    return found


@dataclass
class _Rule:
    """The equation that a run ends in."""

    run: Run
    site: Site
    second: Again
    response: ForwardGradient
    policy: Policy

    def equation(self, results: Sequence[Var], ends: Sequence[Var], told: Sequence[Var]) -> Eqn:
        """``ends = custom(sources..., results..., other...)``."""
        ins = sources_of(self.second, self.site)
        others = [v for v in self.second.given if v not in ins]
        b = Builder(policy=self.policy)
        given = {v: b.input(v.type) for v in ins}
        for v in ends:
            b.input(v.type)
        given.update((v, b.input(v.type)) for v in others)
        cts = [b.input(contiguous_type(v.type)) for v in ends]
        k = self.response.samples
        noise = [b.emit(Noise(), (cts[0],), (_batched(v.type, k),))[0] for v in ins]
        region, passing = self._lowered()
        pusher = Pusher(b, k, outermost(self.policy.stop), lambda e: e in passing)
        pusher.env.update(zip(region.inputs, [given[v] for v in self.second.given], strict=True))
        pusher.tan.update((given[v], x) for v, x in zip(ins, noise, strict=True))
        try:
            pusher.run(region)
        except NotForward as why:
            raise refused(self.site, "ForwardGradient", self.site.steps[0].site.eqn, str(why)) from why
        outs = [pusher.env[v] for v in region.outputs]
        pairs = [(pusher.tan[v], c) for v, c in zip(outs, cts, strict=True) if v in pusher.tan]
        found = _estimate(b, pairs, noise, ins, k, self.site.level.title)
        op = Custom(
            f"ForwardGradient of {self.site.level.title}", b.region(found), len(ins), len(ends), (True,) * len(ins)
        )
        return Eqn(op, (*ins, *results, *others), tuple(ends), (), self.site.level.loc, "response")

    def _lowered(self) -> tuple[Region, frozenset[Eqn]]:
        """The run without inner gradients, and the stops that let derivatives pass."""
        policy = replace(self.policy, mode="mixed")
        b = Builder(policy=policy)
        source = self.second.region
        env = {v: b.input(v.type) for v in source.inputs}
        tape = Tape(b, source, env, Policy("reverse", policy.stop))
        cut = tape.outer_cut()
        passing = frozenset(e for e in tape.eqns if isinstance(e.op, Stop) and e not in cut)
        region = b.region([env[v] for v in self.second.ends])
        return map_bodies(region, lambda r: lower_grads(r, policy)), passing


def elements(v: Var) -> int:
    """Of a tensor."""
    assert isinstance(v.type, TensorType)
    return v.type.numel


def _batched(t: Type, k: int) -> TensorType:
    assert isinstance(t, TensorType)
    shape = t.shape if k == 1 else (k, *t.shape)
    return TensorType(t.dtype, shape, contiguous(shape), t.device)


def _estimate(b: Builder, pairs: Sequence[tuple[Var, Var]], noise: Sequence[Var], ins: Sequence[Var], k: int, level: str
              ) -> list[Var]:  # fmt: skip
    """1/k sum_s <c, J v_s> v_s, told to the report."""
    n = len(pairs)
    size = sum(elements(v) for v in ins)

    def f(ts: list[Tensor]) -> list[Tensor]:
        tangents, cts, vs = ts[:n], ts[n : 2 * n], ts[2 * n :]
        slopes = vs[0].new_zeros(k)
        for t, c in zip(tangents, cts, strict=True):
            slopes = slopes + (t.reshape(k, -1) * c.reshape(1, -1)).sum(1).to(slopes.dtype)
        out = [(slopes.reshape(k, 1) * v.reshape(k, -1)).mean(0).to(v.dtype) for v in vs]
        return [slopes, slopes.new_full((), float(size)), *out]

    given = [*[t for t, _ in pairs], *[c for _, c in pairs], *noise]
    slopes, count, *flat = b.inline(recorded(f, [v.type for v in given]), given, tag=Origin.RESPONSE)
    out: list[Var] = []
    for v, x in zip(ins, flat, strict=True):
        (x,) = b.emit(Tell(level, "slopes"), (x, slopes, count), (x.type,))  # at each: one of them is always wanted
        kind = contiguous_type(v.type)
        shaped = recorded(lambda ts, s=v.type.shape: [ts[0].reshape(s)], [x.type])  # type: ignore[misc, union-attr]
        out.append(b.inline(shaped, [x], tag=Origin.RESPONSE)[0])
        assert out[-1].type == kind
    return out
