"""Truncated: the run of a level is cut in two; the state between the halves is a constant for every derivative.

Before: a loop of T trips (and steps that were peeled off it).  After: a loop of T - k trips, a stop on each of its
results, a loop of k trips.  Of the first half nothing is kept, as no adjoint goes there (truncated backpropagation,
Williams and Peng 1990; for bilevel problems Shaban et al. 2019, whose error falls as (1 - rate * curvature)^k).
Sequences that the loop reads or emits are cut and joined; what it draws comes from two feeds, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlc.errors import PlanError
from mlc.ir.core import Draw, Effect, Eqn, Feed, Grad, Index, Loop, NestedEffects, Pack, Region, Var
from mlc.ir.lowered.responses import Truncated
from mlc.ir.program import Program
from mlc.ir.types import SeqType, Type
from mlc.passes.responses.rewrite import copied, holding, put
from mlc.passes.responses.site import Run, Site

__all__ = ["truncated"]


def truncated(program: Program, site: Site, response: Truncated) -> Program:
    """The program with every run of the level cut.

    Raises:
        PlanError: where a run cannot be cut there.
    """
    for run in sorted(site.runs, key=lambda r: (*r.path, r.items[-1]), reverse=True):
        here = replace(run, region=program.region_at(run.path))
        program = put(program, run.path, _cut(here, site, response.steps))
    return program


def _cut(run: Run, site: Site, keep: int) -> Region:
    """The region of a run, cut before its last ``keep`` steps."""
    left = keep
    for n in range(len(run.items) - 1, -1, -1):
        item = run.items[n]
        here = _steps(run, site, item)
        if here is None:
            raise PlanError(
                f"level {site.level.title}: Truncated({keep}) needs to know how many steps there are",
                loc=run.eqn(item).loc, advice="loop over a list or a range",
            )  # fmt: skip
        if left < here:
            return _cut_inside(run, site, n, left) if left else _constant(run, run.items[: n + 1])
        left -= here
        if left == 0:
            earlier = [i for i in run.items[:n] if run.group(i) != run.group(item)]
            return _constant(run, earlier) if earlier else run.region
    return run.region


def _steps(run: Run, site: Site, item: int) -> int | None:
    """Steps of the level in one equation of its run."""
    return _count(run.eqn(item), {id(s.site.eqn): s for s in run.updates})


def _count(e: Eqn, steps: dict[int, object]) -> int | None:
    if isinstance(e.op, Grad):
        return int(id(e) in steps)
    if not isinstance(e.op, Loop):
        return 0
    inside = [_count(x, steps) for x in e.op.body.eqns]
    if any(n is None for n in inside):
        return None
    total = sum(n for n in inside if n is not None)
    return 0 if not total else None if e.op.trips is None else total * e.op.trips


def _constant(run: Run, items: Sequence[int]) -> Region:
    """What these first items leave is constant for whatever comes behind them."""
    whole = set(items)
    zones = {v for s in run.steps if s.site.at[len(run.path)] in whole for v in s.zone}
    read_outside = _read_outside(run.region, zones)
    eqns: list[Eqn] = []
    for i, e in enumerate(run.region.eqns):
        if i in whole and isinstance(e.op, Loop):
            made, stops = holding(e, [v for v in e.outs if v.type.is_float])
        else:
            made, stops = holding(e, [v for v in e.outs if v in zones and v in read_outside and v.type.is_float])
        eqns += [made, *stops]
    return Region(run.region.inputs, tuple(eqns), run.region.outputs, run.region.names)


def _read_outside(region: Region, zone: set[Var]) -> set[Var]:
    """Values that something else reads than equations that make values of the zone."""
    found = set(region.outputs)
    for e in region.eqns:
        if not any(v in zone for v in e.outs):
            found.update(e.inputs)
    return found


# ---- inside a loop


def _cut_inside(run: Run, site: Site, n: int, keep: int) -> Region:
    """Cut the loop at item ``n`` of the run before its last ``keep`` steps."""
    item = run.items[n]
    loop = run.eqn(item)
    op = loop.op
    assert isinstance(op, Loop) and op.trips is not None
    each = (_steps(run, site, item) or 0) // op.trips
    if keep % each:
        raise PlanError(
            f"level {site.level.title}: its loop takes {each} steps a trip, and Truncated({keep}) ends inside of one",
            loc=loop.loc, advice=f"use a multiple of {each}, or one loop over all steps",
        )  # fmt: skip
    before = _constant(run, run.items[:n]) if n else run.region
    place = next(i for i, e in enumerate(before.eqns) if e.op is op)
    return _split(before, place, op.trips - keep // each)


def _split(region: Region, place: int, first: int) -> Region:
    """The loop at ``place`` as two, the first one of ``first`` trips, its results stopped."""
    loop = region.eqns[place]
    op = loop.op
    assert isinstance(op, Loop) and op.trips is not None
    nc, nk, trips = op.n_carry, op.n_const, op.trips
    early, head_seqs, tail_seqs, feeds = _sequences(region, loop, first)
    head_op = replace(op, body=copied(op.body), trips=first)
    tail_op = replace(op, trips=trips - first)
    plain = tuple(Var(v.type) for v in loop.outs[:nc])
    parts = [(Var(head_op.sequence(_elem(v))), Var(tail_op.sequence(_elem(v)))) for v in loop.outs[nc:]]
    head = loop.with_(op=head_op, args=(*loop.args[: nc + nk], *head_seqs), outs=(*plain, *[a for a, _ in parts]))
    head, stops = holding(head, [v for v in head.outs if v.type.is_float])
    tail = loop.with_(
        op=tail_op, args=(*plain, *loop.args[nc : nc + nk], *tail_seqs), outs=(*loop.outs[:nc], *[b for _, b in parts])
    )
    joined = [
        x for v, (a, b) in zip(loop.outs[nc:], parts, strict=True) if _is_read(region, v)
        for x in _join(v, a, first, b, trips - first)
    ]  # fmt: skip
    eqns: list[Eqn] = []
    for i, e in enumerate(region.eqns):
        if i == place:
            eqns += [*early, head, *stops, tail, *joined]
        else:
            eqns += feeds.get(i, [e])
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def _elem(v: Var) -> Type:
    assert isinstance(v.type, SeqType)
    return v.type.elem


def _is_read(region: Region, v: Var) -> bool:
    return v in region.outputs or any(v in e.inputs for e in region.eqns)


def _join(whole: Var, a: Var, n: int, b: Var, m: int) -> list[Eqn]:
    """A sequence from its two parts."""
    assert isinstance(whole.type, SeqType)
    picked = [(part, i, Var(whole.type.elem)) for part, k in ((a, n), (b, m)) for i in range(k)]
    eqns = [Eqn(Index(i), (part,), (v,)) for part, i, v in picked]
    return [*eqns, Eqn(Pack(), tuple(v for _, _, v in picked), (whole,))]


def _sequences(region: Region, loop: Eqn, first: int
               ) -> tuple[list[Eqn], list[Var], list[Var], dict[int, list[Eqn]]]:  # fmt: skip
    """What the two loops read trip by trip: equations for that, the parts, and what stands in the place of feeds."""
    op = loop.op
    assert isinstance(op, Loop) and op.trips is not None
    made = {v: i for i, e in enumerate(region.eqns) for v in e.outs}
    early: list[Eqn] = []
    feeds: dict[int, list[Eqn]] = {}
    parts: dict[Var, tuple[Var, Var]] = {}
    for s in loop.args[op.n_carry + op.n_const :]:
        if s in parts:
            continue
        at = made.get(s)
        if at is not None and isinstance(region.eqns[at].op, Feed) and _alone(region, region.eqns[at], loop):
            a, b = _fed(region.eqns[at], first)
            feeds[at] = [a, b]
            parts.update(zip(region.eqns[at].outs, zip(a.outs, b.outs, strict=True), strict=True))
        else:
            parts[s] = _halves(s, op.trips, first, early)
    given = [parts[s] for s in loop.args[op.n_carry + op.n_const :]]
    return early, [a for a, _ in given], [b for _, b in given], feeds


def _alone(region: Region, feed: Eqn, loop: Eqn) -> bool:
    """Whether nothing but this loop reads a feed."""
    return not any(v in e.inputs for e in region.eqns if e is not loop for v in feed.outs)


def _halves(s: Var, trips: int, first: int, into: list[Eqn]) -> tuple[Var, Var]:
    assert isinstance(s.type, SeqType)
    elems = [Var(s.type.elem) for _ in range(trips)]
    into += [Eqn(Index(i), (s,), (v,)) for i, v in enumerate(elems)]
    a, b = Var(SeqType(s.type.elem, first)), Var(SeqType(s.type.elem, trips - first))
    into += [Eqn(Pack(), tuple(elems[:first]), (a,)), Eqn(Pack(), tuple(elems[first:]), (b,))]
    return a, b


def _fed(feed: Eqn, first: int) -> tuple[Eqn, Eqn]:
    """A feed as two, the first one of ``first`` trips."""
    op = feed.op
    assert isinstance(op, Feed) and op.trips is not None

    def part(trips: int, effects: tuple[Effect, ...]) -> Eqn:
        outs = tuple(Var(SeqType(_elem(v), trips)) for v in feed.outs)
        return feed.with_(op=Feed(effects, trips), outs=outs)

    return part(first, op.effects), part(op.trips - first, tuple(_later(x, first) for x in op.effects))


def _later(x: Effect, trips: int) -> Effect:
    """An effect as it is ``trips`` trips later."""
    if isinstance(x, NestedEffects):
        return replace(x, effects=tuple(_later(y, trips) for y in x.effects))
    if not isinstance(x.op, Draw) or not x.op.steps:
        return x
    return replace(x, op=replace(x.op, visit=x.op.visit + x.op.steps[0] * trips))
