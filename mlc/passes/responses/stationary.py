"""The level's gradient at its final point, as a function: of what it trained, and of what its loss reads there.

:class:`Stationary` gives a region ``(theta..., given...) -> gradients, one per theta``, and the values of the program
that ``given`` are.  With ``data="last"`` it is the gradient of the last step: what that step alone read (a batch, a
mask) is handed out of the loop.  With ``data="all"`` it is the mean over all steps, a loop over what they read with
the parameters held fixed.  What does not depend on the parameters stays outside of the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlc.errors import PlanError
from mlc.ir.builder import Builder
from mlc.ir.core import Eqn, Index, Loop, Region, Var, map_vars
from mlc.ir.levels.steps import Step
from mlc.ir.types import SeqType
from mlc.passes.responses.fed import Fed
from mlc.passes.responses.rewrite import carrying, renamed_outs
from mlc.passes.responses.site import Run, Site, Trained

__all__ = ["Place", "Stationary", "at_last", "last_gradient", "refuse_state", "refused", "slice_of", "steps_of"]


@dataclass
class Stationary:
    """The gradient as a function.

    Attributes:
        region: ``(theta..., given...) -> gradients``.
        given: Values in the run's region.
        sources: The values of the program as it was that these come from.
        items: What stands in the place of equations of the run's region, by position.
        behind: Equations to be put behind the run.
    """

    region: Region
    given: tuple[Var, ...]
    sources: tuple[Var, ...]
    items: dict[int, list[Eqn]] = field(default_factory=dict)
    behind: list[Eqn] = field(default_factory=list)


@dataclass
class Place:
    """Where a run trains something.

    Attributes:
        item: Position in the run's region of the equation that holds it (the last of them).
        loops: From that region's loop inwards, those that lead to it.
        body: The region in which its update is made.
        roots: What it trains there, before it.
        fed: The gradients that its update is fed, one per root.
        trained: Which parameter of the run each is.
        also: Positions of further gradients that the same update, in straight code, is fed.
    """

    item: int
    loops: tuple[Eqn, ...]
    body: Region
    roots: list[Var]
    fed: list[Var]
    trained: list[Trained]
    also: list[int] = field(default_factory=list)

    @property
    def items(self) -> tuple[int, ...]:
        """Positions of everything that its update is fed by."""
        return (*self.also, self.item)


def steps_of(run: Run, site: Site, fed: Fed) -> list[Place]:
    """The places of a run where something is trained, in order."""
    found: dict[tuple[int, int], Place] = {}
    for step, k, trained in run.links:
        _, after, _, _ = step.trained[k]
        body = site.graph.home[after]
        item = step.site.at[len(run.path)]
        place = found.get((item, id(body))) or _together(list(found.values()), run, item)
        if place is None:
            loops = step.site.loops[len(run.path) :]
            depth = next((j + 1 for j, x in enumerate(loops) if _body(x) is body), 0)
            place = found[item, id(body)] = Place(item, loops[:depth], body, [], [], [])
        if item > place.item:
            place.also.append(place.item)
            place.item = item
        if not any(t is trained for t in place.trained):
            place.roots.append(_root(site, step, k))
            place.fed.append(fed.of(step, k))
            place.trained.append(trained)
    return list(found.values())


def _together(found: Sequence[Place], run: Run, item: int) -> Place | None:
    """The place of an update in straight code that is fed by one more gradient."""
    return next((p for p in found if not p.loops and run.group(p.item) == run.group(item)), None)


def _root(site: Site, step: Step, k: int) -> Var:
    before, after, loop, i = step.trained[k]
    return _body(loop).inputs[i] if loop is not None else site.root(before, after)


def _body(e: Eqn) -> Region:
    assert isinstance(e.op, Loop)
    return e.op.body


def last_gradient(run: Run, site: Site, place: Place, what: str) -> Stationary:
    """The gradient of the last step of a run at its final point.

    Raises:
        PlanError: where that is no function of what the level trained.
    """
    return at_last(run, site, place, what, place.fed)


def at_last(run: Run, site: Site, place: Place, what: str, wanted: Sequence[Var]) -> Stationary:
    """Values of the last step of a run at its final point (see :func:`last_gradient`).

    Args:
        run: The run.
        site: Its level.
        place: Where its last step stands.
        what: The response, for messages.
        wanted: Values there: the gradients, in the order of ``place.trained``, or any others.
    """
    missing = [t for t in run.trained if not any(t is x for x in place.trained)]
    if missing:
        raise refused(site, what, run.eqn(place.item), "its last step trains only a part of what it trains")
    order = [next(i for i, x in enumerate(place.trained) if x is t) for t in run.trained]
    roots = [place.roots[i] for i in order]
    fed = [place.fed[i] for i in order] if wanted is place.fed else list(wanted)
    inside, read = slice_of(place.body, roots, fed)
    refuse_state(run, site, place, what, read)
    ends = _Ends(run, site, place, what, set(roots))
    given = tuple(ends.value(v, len(place.loops)) for v in read)
    region = Region((*roots, *read), tuple(inside), tuple(fed))
    return Stationary(region, given, tuple(read), ends.items(), ends.behind)


def refuse_state(run: Run, site: Site, place: Place, what: str, read: Sequence[Var]) -> None:
    """In straight code: what the gradient reads besides the parameters must not come from the level's own steps.

    Raises:
        PlanError: where it does (a moving average as a teacher).
    """
    if place.loops:
        return  # there it is a carry, and found out as such
    reached = {v for i in run.items for v in place.body.eqns[i].outs}
    for e in place.body.eqns:
        if any(v in reached for v in e.inputs):
            reached.update(v for v in e.outs if v not in place.roots)
    if any(v in reached for v in read):
        raise refused(site, what, run.eqn(place.item), "its loss reads state that its steps change besides")


def slice_of(body: Region, roots: Sequence[Var], fed: Sequence[Var]) -> tuple[list[Eqn], list[Var]]:
    """Equations between ``roots`` and ``fed``, and what else they read."""
    reached = set(roots)
    for e in body.eqns:
        if any(v in reached for v in e.inputs):
            reached.update(e.outs)
    needed, inside = set(fed), list[Eqn]()
    for e in reversed(body.eqns):
        if any(v in needed for v in e.outs) and any(v in reached for v in e.inputs) and not set(e.outs) & set(roots):
            inside.append(e)
            needed.update(e.inputs)
    inside.reverse()
    made = {v for e in inside for v in e.outs}
    read = dict.fromkeys(v for v in (*[v for e in inside for v in e.inputs], *fed) if v not in made and v not in roots)
    return inside, list(read)


def refused(site: Site, what: str, e: Eqn, why: str) -> PlanError:
    """A response cannot apply to a level, and why."""
    return PlanError(
        f"level {site.level.title}: {what} cannot apply, {why}", loc=e.loc or site.level.loc,
        advice="use mlc.Unroll() or mlc.Truncated(steps)",
    )  # fmt: skip


class _Ends:
    """Values of loop bodies as they are in the last trip, in the run's region."""

    def __init__(self, run: Run, site: Site, place: Place, what: str, roots: set[Var]) -> None:
        self.run, self.site, self.place, self.what = run, site, place, what
        self.roots = roots
        self.behind: list[Eqn] = []
        self._known: dict[Var, Var] = {}
        self._made = {v: e for x in place.loops for e in _body(x).eqns for v in e.outs}
        self._kept: list[tuple[Var, Var]] = []  # elements that the outermost loop hands out: in its body, behind it

    def value(self, v: Var, depth: int) -> Var:
        """The last value of ``v``, which is one of the region that ``depth`` of the loops lead to."""
        if depth == 0:
            return v
        if v not in self._known:
            self._known[v] = self._value(v, depth)
        return self._known[v]

    def _value(self, v: Var, depth: int) -> Var:
        loop = self.place.loops[depth - 1]
        op = loop.op
        assert isinstance(op, Loop)
        if v in op.body.inputs:
            i = op.body.inputs.index(v)
            if i < op.n_carry and op.body.outputs[i] is not v:
                raise self._carried(loop, v)
            if i < op.n_carry + op.n_const:
                return self.value(loop.args[i], depth - 1)
            return self._element(v, loop.args[i], depth)
        e = self._made[v]
        if e.impure:
            raise refused(self.site, self.what, e, "its loss reads what is drawn inside the loop")
        args = map_vars(e.args, lambda x: self.value(x, depth))
        kwargs = tuple((k, map_vars(a, lambda x: self.value(x, depth))) for k, a in e.kwargs)
        outs = tuple(Var(x.type, x.mask) for x in e.outs)
        self._known.update(zip(e.outs, outs, strict=True))
        self.behind.append(e.with_(args=args, kwargs=kwargs, outs=outs))
        return self._known[v]

    def _carried(self, loop: Eqn, v: Var) -> PlanError:
        if v in self.roots:
            return refused(self.site, self.what, loop, "its loss reads its parameters as they were before")
        op = loop.op
        assert isinstance(op, Loop)
        name = op.body.names[op.body.inputs.index(v)] if op.body.names else ""
        called = f" ({name})" if name else ""
        return refused(self.site, self.what, loop, f"its loss reads state that its steps change besides{called}")

    def _element(self, v: Var, seq: Var, depth: int) -> Var:
        """The last element of what a loop reads trip by trip."""
        if depth > 1 or isinstance(v.type, SeqType):
            whole = self.value(seq, depth - 1)
            if depth == 1:  # drawn only when the loop runs: what it hands out comes behind it
                whole = Var(seq.type)
                self._kept.append((v, whole))
            (out,) = (Var(v.type),)
            self.behind.append(Eqn(Index(-1), (whole,), (out,)))
            return out
        out = Var(v.type)
        self._kept.append((v, out))
        return out

    def items(self) -> dict[int, list[Eqn]]:
        """The run's last loop with what it hands out."""
        if not self._kept:
            return {}
        loop = self.place.loops[0]
        op = loop.op
        assert isinstance(op, Loop)
        last = [(v, o) for v, o in self._kept if not isinstance(v.type, SeqType)]
        every = [(v, o) for v, o in self._kept if isinstance(v.type, SeqType)]
        start = Builder()
        zeros = [start.zero(v.type) for v, _ in last]
        names = [Var(v.type) for v, _ in last]
        item, after, whole = carrying(loop, zeros, op.body, [v for v, _ in last], names, [v for v, _ in every])
        called = dict(zip((*after, *whole), [o for _, o in (*last, *every)], strict=True))
        return {self.place.item: [*start.eqns, renamed_outs(item, called)]}
