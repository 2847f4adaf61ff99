"""Adjoint of a region with inner gradients: the heart of the compiler.

Reverse mode over ordinary equations; at an inner gradient g = dL/dtheta with cotangent v, one *mixed* product

    (d/dtheta, d/du) <v, dL/dtheta>  =  jvp( grad_{theta,u} L )(v, 0)            (symmetry of second derivatives)

that is a forward sweep over the gradient of L, instead of a second reverse sweep over its first (reverse over
reverse).  u are the values from outside that L reads; stopped values are inputs of L too, so L is a true scalar
function of all of them (Pearlmutter 1994; MixFlow-MG, Kemaev et al. 2025).  Where a rule is not symmetric
(custom ``autograd.Function``) or an operator has no forward rule, the gradient is lowered first and differentiated
in reverse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlc.errors import PlanError
from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Eqn, Grad, Loop, Region, Stop, Var
from mlc.ir.lowered.nesting import map_bodies
from mlc.ir.origin import Origin
from mlc.passes.autodiff.difference import difference
from mlc.passes.autodiff.forward import pushforward
from mlc.passes.autodiff.policy import GradRecord, Policy
from mlc.passes.autodiff.reverse import Inside, Passing, active_vars, passes, pull_eqn, pullback
from mlc.passes.precision.casts import Twins
from mlc.passes.rules.recorded import NoRule

__all__ = ["FallBack", "Tape", "lower_grads"]


class Tape:
    """A copy of a region in a builder, ready to be differentiated."""

    def __init__(self, b: Builder, region: Region, env: dict[Var, Var], policy: Policy, *,
                 saved: dict[Var, Var] | None = None, reverse_over: frozenset[Eqn] = frozenset(),
                 twins: Twins | None = None) -> None:  # fmt: skip
        self.twins = twins or {}
        self.b = b
        self.policy = policy
        self.records: dict[Eqn, GradRecord] = {}
        self.origin: dict[Eqn, Eqn] = {}
        self.owned: set[Eqn] = set()
        self._reverse_over = reverse_over | policy.reverse | _inner_gradients(region)
        start = len(b.eqns)
        saved = saved or {}
        for e in region.eqns:
            if isinstance(e.op, Grad):
                self._grad(e, env, saved)
            elif e.outs and all(v in saved for v in e.outs):
                env.update((v, saved[v]) for v in e.outs)
            else:
                b.copy_eqn(e, env)
        self.env = env
        self.eqns = b.eqns[start:]

    def _grad(self, e: Eqn, env: dict[Var, Var], saved: dict[Var, Var]) -> None:
        b, op = self.b, e.op
        assert isinstance(op, Grad)
        args = [env[v] for v in e.args]
        losses, rest = args[: op.n_loss], args[op.n_loss :]
        wrt, seeds = rest[: op.n_wrt], rest[op.n_wrt :]
        cut = self._cuts(losses, wrt, op.depth)
        own = replace(self.policy, depth=op.depth)
        rec = GradRecord(losses, wrt, seeds, _slice(b, losses, wrt, cut, own.through), cut, own, e)
        apart = e in self.policy.differences
        mixed = apart or (self.policy.mode == "mixed" and e not in self._reverse_over)
        if mixed and not apart and _stops_in_loops(rec.slice, op.depth):
            self.policy.note(e, "a loop that it goes through holds constants of its own")
            mixed = False
        known = mixed and all(v in saved for v in e.outs)
        values = [saved[v] for v in e.outs] if known else lower_grad(b, rec)
        if e in self.twins:
            if not mixed:
                raise PlanError(
                    "precision: a gradient outside of a loop that is differentiated in reverse has one dtype",
                    loc=e.loc, advice="name its level and its flow alike",
                )  # fmt: skip
            losses = [env[v] for v in self.twins[e]]
            cut = self._cuts(losses, wrt, op.depth)
            rec = GradRecord(losses, wrt, seeds, _slice(b, losses, wrt, cut, own.through), cut, own)
        if mixed:
            marker = Eqn(
                Alias(), tuple(values + losses + wrt + seeds), tuple(Var(v.type) for v in values), tag=Origin.GRAD
            )
            b.append(marker)
            self.records[marker] = rec
            self.origin[marker] = e
            env.update(zip(e.outs, marker.outs, strict=True))
        else:
            env.update(zip(e.outs, values, strict=True))

    def _cuts(self, losses: list[Var], wrt: list[Var], depth: int) -> frozenset[Eqn]:
        """The stops that hold for a gradient taken here; under "inner" each hard one belongs to its first gradient."""
        stops = [e for e in _ancestors(self.b, losses, set()) if isinstance(e.op, Stop)]
        soft = {e for e in stops if e.op.level is not None and e.op.level <= depth}  # type: ignore[union-attr]
        hard = {e for e in stops if e.op.level is None}  # type: ignore[union-attr]
        if self.policy.stop == "inner":
            hard &= set(_ancestors(self.b, losses, set(wrt)))
            hard -= self.owned
            self.owned |= hard
        return frozenset(soft | hard)

    def outer_cut(self) -> frozenset[Eqn]:
        """The stops that hold for the gradient of the whole region."""
        depth = self.policy.depth
        stops = [e for e in self.eqns if isinstance(e.op, Stop)]
        soft = {e for e in stops if e.op.inner and e.op.level <= depth}  # type: ignore[union-attr]
        hard = {e for e in stops if not passes(e, "torch" if self.policy.stop == "torch" else "inner")}
        if self.policy.stop == "inner":
            hard -= self.owned
        return frozenset(soft | hard | {e for e in stops if e.op.always})  # type: ignore[union-attr]

    def pull(self, seeds: dict[Var, Var], wrt: Sequence[Var]) -> dict[Var, Var]:
        """Cotangents of ``wrt`` given those of results (all are values of the builder)."""
        b = self.b
        cut = self.outer_cut()
        passing = frozenset(e for e in self.eqns if isinstance(e.op, Stop) and e not in cut)
        active = active_vars(self.eqns, wrt, through_stops=Passing(passing, self.policy.through))
        cts = {v: c for v, c in seeds.items() if v in active}
        for e in reversed(self.eqns):
            if not any(v in cts for v in e.outs):
                continue
            rec = self.records.get(e)
            if rec is None:
                e = b.current(e)
                pull_eqn(b, e, cts, active, passing=e in passing)
            else:
                try:
                    self._product(rec, e, cts, active)
                except NoRule as why:
                    raise FallBack(self.origin[e], str(why)) from why
        return cts

    def _product(self, rec: GradRecord, marker: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
        """Mixed product of one inner gradient (see the module's head)."""
        b = self.b
        directions: dict[Var, Var] = {}
        for theta, out in zip(rec.wrt, marker.outs, strict=True):
            if out in cts:
                directions[theta] = b.add(directions.get(theta), cts[out])
        inside = {v for e in rec.slice for v in e.outs}
        stopped = {e.outs[0] for e in rec.slice if e in rec.cut}
        roots = [t for t in dict.fromkeys(rec.wrt) if t not in inside]
        others = [
            v for v in dict.fromkeys(v for e in rec.slice for v in e.inputs)
            if v in active and v not in roots and (v not in inside or v in stopped)
        ]  # fmt: skip
        with _taking(b, rec.policy):
            if rec.source is not None and rec.source in self.policy.differences:
                difference(b, rec, self.policy.differences[rec.source], directions, (roots, others), cts, active)
            else:
                self._mixed(rec, directions, roots, others, cts, active)

    def _mixed(self, rec: GradRecord, directions: dict[Var, Var], roots: list[Var], others: list[Var],
               cts: dict[Var, Var], active: set[Var]) -> None:  # fmt: skip
        b = self.b
        inside = rec.policy.through
        found = pullback(b, rec.slice, _seeds(b, rec), [*dict.fromkeys(rec.wrt), *others], cut=rec.cut, inside=inside)
        targets = [v for v in (*roots, *others) if v in found and v in active]
        seeded = [s for s in rec.seeds if s in active]
        fence = {*roots, *others, *rec.seeds}
        wanted = [found[v] for v in targets] + (rec.losses if seeded else [])
        between = _ancestors(b, wanted, fence)
        start = {v: t for v, t in directions.items() if v in fence}
        more = {v: t for v, t in directions.items() if v not in fence}
        tangents = pushforward(b, between, start, extra=more, passes=lambda e: e not in rec.cut)
        for v in targets:
            t = tangents.get(found[v])
            if t is not None:
                cts[v] = b.add(cts.get(v), t)
        for loss, seed in zip(rec.losses, rec.seeds, strict=True):
            if seed in active and loss in tangents:
                cts[seed] = b.add(cts.get(seed), tangents[loss])


class FallBack(Exception):
    """A gradient must be differentiated in reverse over reverse; carries its source equation and the reason."""

    def __init__(self, eqn: Eqn, reason: str) -> None:
        super().__init__(reason)
        self.eqn = eqn
        self.reason = reason


def _inner_gradients(region: Region) -> frozenset[Eqn]:
    """Gradients that another gradient of the region differentiates (a penalty, SAM): these are lowered first."""
    where = {v: i for i, e in enumerate(region.eqns) for v in e.outs}
    grads = [(i, e) for i, e in enumerate(region.eqns) if isinstance(e.op, Grad)]
    out: set[Eqn] = set()
    for i, f in grads:
        op = f.op
        assert isinstance(op, Grad)
        wrt = f.args[op.n_loss : op.n_loss + op.n_wrt]
        first = min((where.get(v, -1) for v in wrt), default=i) + 1
        between = [e for j, e in grads if first <= j < i]
        if not between:
            continue
        act = active_vars(region.eqns[first:i], wrt, through_stops=True)
        needed = set(f.args[: op.n_loss])
        for e in reversed(region.eqns[first:i]):
            if any(v in needed for v in e.outs):
                needed.update(e.inputs)
        out |= {e for e in between if any(v in act and v in needed for v in e.outs)}
    return frozenset(out)


def _seeds(b: Builder, rec: GradRecord) -> dict[Var, Var]:
    seeds: dict[Var, Var] = {}
    for loss, seed in zip(rec.losses, rec.seeds, strict=True):
        seeds[loss] = b.add(seeds.get(loss), seed)
    return seeds


def _ancestors(b: Builder, of: Sequence[Var], fence: set[Var]) -> list[Eqn]:
    """Equations of ``b`` that ``of`` depends on, in order, not looking behind ``fence``."""
    seen: set[int] = set()
    todo = [v for v in of if v not in fence]
    while todo:
        e = b.producer(todo.pop())
        if e is None:
            continue
        where = b.position[e.outs[0]]
        if where in seen:
            continue
        seen.add(where)
        todo.extend(v for v in e.inputs if v not in fence)
    return [b.eqns[i] for i in sorted(seen)]


@contextlib.contextmanager
def _taking(b: Builder, policy: Policy) -> Iterator[None]:
    """While an inner gradient is lowered or pushed, loops hold the stops that it holds."""
    before, b.policy = b.policy, policy
    try:
        yield
    finally:
        b.policy = before


def _stops_in_loops(eqns: Sequence[Eqn], depth: int) -> bool:
    """Whether a loop on the way holds constants for a gradient that the hypergradient passes.

    These are inputs of the loss that its mixed product does not have.
    """
    bodies = [e.op.body for e in eqns if isinstance(e.op, Loop)]
    stops = [e.op for b in bodies for e in b.walk() if isinstance(e.op, Stop)]
    return any(s.level is not None and s.level <= depth for s in stops)


def _slice(b: Builder, losses: list[Var], wrt: list[Var], cut: frozenset[Eqn], inside: Inside) -> list[Eqn]:
    """Equations between ``wrt`` and ``losses``, stops on the way included."""
    back = _ancestors(b, losses, set())
    here = frozenset(e for e in back if isinstance(e.op, Stop) and e not in cut)
    active = active_vars(back, wrt, through_stops=Passing(here, inside))
    return [e for e in back if any(v in active for v in e.inputs)]


def lower_grad(b: Builder, rec: GradRecord) -> list[Var]:
    """The gradient as ordinary equations (first order); zeros where the loss does not depend on a value."""
    with _taking(b, rec.policy):
        found = pullback(b, rec.slice, _seeds(b, rec), rec.wrt, cut=rec.cut, inside=rec.policy.through)
    return [found[v] if v in found else b.zero(v.type) for v in rec.wrt]


def lower_grads(region: Region, policy: Policy) -> Region:
    """The region with every inner gradient lowered, loop bodies included."""
    b = Builder(policy=policy)
    env = {v: b.input(v.type, n) for v, n in zip(region.inputs, _names(region), strict=True)}
    source = region if policy.casts is None else policy.casts.values(region)
    Tape(b, source, env, Policy("reverse", policy.stop, casts=policy.casts))
    return map_bodies(b.region([env[v] for v in region.outputs]), lambda r: lower_grads(r, policy))


def _names(r: Region) -> tuple[str, ...]:
    return r.names or tuple("" for _ in r.inputs)
