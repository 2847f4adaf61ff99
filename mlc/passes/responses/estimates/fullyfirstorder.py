"""FullyFirstOrder: the derivative of what a level trained from two trainings, by first derivatives alone.

With L(theta, u) the level's loss, y what its run came to, and a cotangent c of y, a second run from the same start, on
the same items, trains on L + <c, theta> / penalty and comes to z.  Then

    u' = penalty (dL/du(z, u) - dL/du(y, u))

(F2SA, Kwon et al. 2023, and BOME, Liu et al. 2022, whose upper loss is taken here at first order around y: the penalty
times a difference of values of the lower problem).  Where the run has converged it differs from the implicit gradient
by O(1 / penalty); where it has not, it is the response of as many steps.  No product is taken, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Custom, Eqn, Grad, Loop, Region, Var, aten
from mlc.ir.lowered.responses import FullyFirstOrder
from mlc.ir.program import Program
from mlc.passes.autodiff.adjoint import Tape
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.again import again
from mlc.passes.responses.ending import Ending, rebuilt
from mlc.passes.responses.fed import Fed
from mlc.passes.responses.rewrite import copied, put, renamed_outs
from mlc.passes.responses.site import Run, Site
from mlc.passes.responses.stationary import Place, Stationary, at_last, refused, steps_of

__all__ = ["fully_first_order"]


def fully_first_order(program: Program, site: Site, response: FullyFirstOrder, policy: Policy) -> Program:
    """The program with every run of the level answered by a second one.

    Raises:
        PlanError: where a level is no minimiser of its loss.
    """
    what = "FullyFirstOrder"
    fed = Fed(site, what)
    for run in sorted(site.runs, key=lambda r: (*r.path, r.items[-1]), reverse=True):
        places = steps_of(run, site, fed)
        losses, seeds = _losses(run, site, places[-1], what)
        point = at_last(run, site, places[-1], what, [*losses, *seeds])
        rule = _Rule(program, run, site, places, point, len(losses), response, policy)
        program = put(program, run.path, rebuilt(Ending(program, run, site, places, what), point, rule.equation))
    return program


def _losses(run: Run, site: Site, place: Place, what: str) -> tuple[list[Var], list[Var]]:
    """Losses and seeds of the gradients that the last update is fed.

    Raises:
        PlanError: where one of them is taken in a loop of its own (accumulation), whose last trip is not all of it.
    """
    losses: list[Var] = []
    seeds: list[Var] = []
    for s in run.steps:
        op = s.site.eqn.op
        assert isinstance(op, Grad)
        updates = any(site.graph.home[after] is place.body for _, after, _, _ in s.trained)
        if s.site.at[len(run.path)] not in place.items or not updates:
            continue
        if s.site.eqn not in place.body.eqns:
            raise refused(site, what, s.site.eqn, "a gradient of its last step is taken in a loop of its own")
        losses += s.site.eqn.args[: op.n_loss]
        seeds += s.site.eqn.args[op.n_loss + op.n_wrt :]
    return losses, seeds


@dataclass
class _Rule:
    """The equation that a run ends in."""

    program: Program
    run: Run
    site: Site
    places: Sequence[Place]
    point: Stationary
    n_loss: int
    response: FullyFirstOrder
    policy: Policy

    def equation(self, results: Sequence[Var], ends: Sequence[Var], told: Sequence[Var]) -> Eqn:
        """``ends = custom(u..., results..., other...)``."""
        nudges = [Var(contiguous_type(v.type)) for v in ends]
        nudging = _Nudging(self.run, self.places, nudges)
        region = self.program.region_at(self.run.path)
        second = again(region, self.run, self.site, "FullyFirstOrder", change=nudging.change)
        moving = [s in self.site.moving for s in self.point.sources]
        ins = [v for v, m in zip(self.point.given, moving, strict=True) if m and v.type.is_float]
        others = list(dict.fromkeys(v for v in (*self.point.given, *second.given) if v not in ins))
        b = Builder(policy=self.policy)
        given = {v: b.input(v.type) for v in ins}
        thetas = [b.input(v.type) for v in ends]
        given.update((v, b.input(v.type)) for v in others)
        cts = [b.input(contiguous_type(v.type)) for v in ends]
        scale = 1.0 / self.response.penalty
        scaled = [b.emit(aten("mul", "Tensor"), (c, scale), (c.type,))[0] for c in cts]
        whole = Region((*second.given, *nudges), second.region.eqns, second.ends)
        start = [given[v] for v in second.given]
        z = _inlined(b, copied(whole), [*start, *scaled])
        at = [given[v] for v in self.point.given]
        wanted = [given[v] for v in ins]
        far = self._gradients(b, z, at, wanted)
        near = self._gradients(b, thetas, at, wanted)
        found: list[Var] = []
        for w in wanted:
            if w in far and w in near:
                (apart,) = b.emit(aten("sub", "Tensor"), (far[w], near[w]), (contiguous_type(w.type),))
                found.append(b.emit(aten("mul", "Tensor"), (apart, self.response.penalty), (apart.type,))[0])
        present = tuple(w in far and w in near for w in wanted)
        op = Custom(f"FullyFirstOrder of {self.site.level.title}", b.region(found), len(ins), len(ends), present)
        return Eqn(op, (*ins, *results, *others), tuple(ends), (), self.site.level.loc, "response")

    def _gradients(self, b: Builder, thetas: Sequence[Var], at: Sequence[Var], wanted: Sequence[Var]
                   ) -> dict[Var, Var]:  # fmt: skip
        """dL/du at a point."""
        # Inputs as values of their own, so that what the two points share is not taken for one.
        env = dict(zip(self.point.region.inputs, [*thetas, *at], strict=True))
        policy = replace(self.policy, mode="reverse", depth=_depth(self.run) - 1)
        tape = Tape(b, self.point.region, env, policy)
        outs = [env[v] for v in self.point.region.outputs]
        seeds: dict[Var, Var] = {}
        for loss, seed in zip(outs[: self.n_loss], outs[self.n_loss :], strict=True):
            seeds[loss] = b.add(seeds.get(loss), seed)
        return {v: c for v, c in tape.pull(seeds, wanted).items() if v in wanted}


def _depth(run: Run) -> int:
    op = run.steps[0].site.eqn.op
    assert isinstance(op, Grad)
    return op.depth


def _inlined(b: Builder, region: Region, args: Sequence[Var]) -> list[Var]:
    """Equations of a region on these values; gradients in it are lowered later."""
    env = dict(zip(region.inputs, args, strict=True))
    for e in region.eqns:
        b.copy_eqn(e, env)
    return [env[v] for v in region.outputs]


class _Nudging:
    """Adds something to the gradients that the update is fed, all over a run."""

    def __init__(self, run: Run, places: Sequence[Place], nudges: Sequence[Var]) -> None:
        self.run = run
        self.by = {}
        for place in places:
            for v, trained in zip(place.fed, place.trained, strict=True):
                at = next(i for i, t in enumerate(run.trained) if t is trained)
                self.by[v] = nudges[at]

    def change(self, e: Eqn) -> list[Eqn]:
        """An equation of the run's region, nudged."""
        if isinstance(e.op, Loop) and any(v in self.by for x in e.op.body.walk() for v in x.outs):
            return [self._loop(e)]
        mine = [v for v in e.outs if v in self.by]
        if not mine:
            return [e]
        raw = {v: Var(v.type, v.mask) for v in mine}
        add = aten("add", "Tensor")
        return [renamed_outs(e, raw), *[Eqn(add, (raw[v], self.by[v]), (v,), (), e.loc, "response") for v in mine]]

    def _loop(self, e: Eqn) -> Eqn:
        """The loop with the nudges as constants more."""
        op = e.op
        assert isinstance(op, Loop)
        nudges = list(dict.fromkeys(self.by.values()))
        inner = {v: Var(v.type) for v in nudges}
        below = _Nudging.__new__(_Nudging)
        below.run, below.by = self.run, {v: inner[n] for v, n in self.by.items()}
        split = op.n_carry + op.n_const
        body = op.body
        ins = (*body.inputs[:split], *inner.values(), *body.inputs[split:])
        eqns = tuple(x for y in body.eqns for x in below.change(y))
        names = (*body.names[:split], *[""] * len(nudges), *body.names[split:]) if body.names else ()
        op = replace(op, body=Region(ins, eqns, body.outputs, names), n_const=op.n_const + len(nudges))
        return e.with_(op=op, args=(*e.args[:split], *nudges, *e.args[split:]))
