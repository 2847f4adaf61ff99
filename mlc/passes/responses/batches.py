"""The level's gradient over all of its steps: the mean of what each would take at one point.

A copy of the run's loops, nested as they are, that holds the parameters fixed and adds up the gradients that the steps
are fed.  Its derivative is that of any loop: the adjoint of a sum is the same cotangent at every trip, so a product
with the Hessian of the whole data costs one sweep over them and the memory of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.passes.responses.site import Run, Site
from mlc.passes.responses.stationary import Place, Stationary, refuse_state, refused, slice_of

__all__ = ["mean_gradient", "unpaired"]


_LABEL, _AGAIN = "gradients", "products"


def mean_gradient(run: Run, site: Site, places: Sequence[Place], what: str) -> Stationary:
    """The mean over all steps of a run of the gradient that their update is fed, at its final point.

    Raises:
        PlanError: where that is no function of what the level trained.
    """
    b = Builder()
    thetas = [b.input(t.end.type) for t in run.trained]
    given: dict[Var, Var] = {}
    kind = thetas[0].type
    assert isinstance(kind, TensorType)
    number = TensorType(kind.dtype, (), (), kind.device)
    sums: list[Var] = [b.zero(contiguous_type(v.type)) for v in thetas]
    count = b.zero(number)
    for place in places:
        at = [next(i for i, t in enumerate(run.trained) if t is x) for x in place.trained]
        level = _Level(b, run.region, thetas, given=given)
        copy = _Sum(run, site, place, what, at)
        found = copy.into(level, 0, [sums[i] for i in at], count)
        for i, v in zip(at, found[:-1], strict=True):
            sums[i] = v
        count = found[-1]
    means = [b.emit(aten("div", "Tensor"), (s, count), (s.type,))[0] for s in sums]
    region = b.region(means)
    return Stationary(region, tuple(given), tuple(given))


def unpaired(region: Region) -> Region:
    """The same without values that sweeps over all steps keep for their adjoint: memory that grows with the steps."""
    eqns = []
    for e in region.eqns:
        if isinstance(e.op, Loop):
            op = replace(e.op, body=unpaired(e.op.body))
            again = op.label == _LABEL and op.derived == (Origin.ADJOINT,)
            e = e.with_(op=replace(op, label=_AGAIN, derived=()) if again else op)
        eqns.append(e)
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


class _Level:
    """A region that is copied, equation by equation, as far as it is asked for.

    Args:
        b: Where to.
        region: The region.
        thetas: The parameters there.
        given: For the run's own region: values that are asked for, and the inputs that they became.
    """

    def __init__(
        self, b: Builder, region: Region, thetas: Sequence[Var], *, given: dict[Var, Var] | None = None
    ) -> None:
        self.b, self.thetas, self.given = b, list(thetas), given
        self.env: dict[Var, Var] = {}
        self.odd: dict[Var, str] = {}  # inputs that must not be asked for, and why
        self.made = {v: e for e in region.eqns for v in e.outs}


class _Sum:
    """Adds up the gradients of one place of the run."""

    def __init__(self, run: Run, site: Site, place: Place, what: str, at: Sequence[int]) -> None:
        self.run = run
        self.site, self.place, self.what = site, place, what
        self.at = list(at)  # which parameters of the run this place trains

    def value(self, level: _Level, v: Var, loop: Eqn) -> Var:
        """A value of a region in the copy of it."""
        if v in level.env:
            return level.env[v]
        if level.given is not None:
            if v not in level.given:
                level.given[v] = level.b.input(v.type)
            return level.given[v]
        if v in level.odd:
            raise refused(self.site, self.what, loop, level.odd[v])
        e = level.made[v]
        if e.impure:
            raise refused(self.site, self.what, e, "its loss reads what is drawn inside the loop")
        for x in e.inputs:
            self.value(level, x, loop)
        level.b.copy_eqn(e, level.env)
        return level.env[v]

    def into(self, level: _Level, depth: int, sums: Sequence[Var], count: Var) -> list[Var]:
        """The sums and the count after this place, in the region that ``depth`` of its loops lead to."""
        if depth == len(self.place.loops):
            return self._one(level, sums, count)
        loop = self.place.loops[depth]
        op = loop.op
        assert isinstance(op, Loop)
        inner = Builder()
        carries = [inner.input(contiguous_type(v.type)) for v in (*sums, count)]
        thetas = [inner.input(v.type) for v in level.thetas]
        below = _Level(inner, op.body, thetas)
        fixed: list[Var] = []
        each: list[tuple[Var, Var]] = []
        for i, v in enumerate(op.body.inputs):
            if i < op.n_carry and op.body.outputs[i] is not v:
                continue
            if i >= op.n_carry + op.n_const:
                each.append((v, loop.args[i]))
            else:
                below.env[v] = inner.input(v.type)
                fixed.append(self.value(level, loop.args[i], loop))
        self._carried(below, loop, depth)
        seqs = [self.value(level, s, loop) for _, s in each]
        below.env.update((v, inner.input(v.type)) for v, _ in each)
        found = self.into(below, depth + 1, carries[:-1], carries[-1])
        body = Region(tuple(inner.inputs), tuple(inner.eqns), tuple(found))
        n = len(carries)
        made = Loop(body, n, len(thetas) + len(fixed), op.trips, label=_LABEL, usual=op.usual)
        types = [contiguous_type(v.type) for v in carries]
        return list(level.b.emit(made, (*sums, count, *level.thetas, *fixed, *seqs), types, loc=loop.loc))

    def _carried(self, below: _Level, loop: Eqn, depth: int) -> None:
        """What the loop carries: the parameters stand still, anything else must not be read."""
        op = loop.op
        assert isinstance(op, Loop)
        last = depth == len(self.place.loops) - 1
        for i, v in enumerate(op.body.inputs[: op.n_carry]):
            if op.body.outputs[i] is v:
                continue
            if last and v in self.place.roots:
                below.env[v] = below.thetas[self.at[self.place.roots.index(v)]]
            elif not last and self._leads_to_root(v, depth):
                below.odd[v] = "its loss reads its parameters as they were before"
            else:
                name = op.body.names[i] if op.body.names else ""
                below.odd[v] = f"its loss reads state that its steps change besides{f' ({name})' if name else ''}"

    def _leads_to_root(self, v: Var, depth: int) -> bool:
        inner = self.place.loops[depth + 1]
        return v in inner.args[: inner.op.n_carry]  # type: ignore[union-attr]

    def _one(self, level: _Level, sums: Sequence[Var], count: Var) -> list[Var]:
        """One step: its gradients are added."""
        place = self.place
        where = place.loops[-1] if place.loops else self.site.steps[0].site.eqn
        if not place.loops:  # straight code in the run's region: copied as far as it depends on the parameters
            level = self._straight(level)
        grads = [self.value(level, v, where) for v in place.fed]
        b = level.b
        out = [b.emit(aten("add", "Tensor"), (s, g), (contiguous_type(s.type),))[0] for s, g in
               zip(sums, grads, strict=True)]  # fmt: skip
        (more,) = b.emit(aten("add", "Scalar"), (count, 1), (count.type,))
        return [*out, more]

    def _straight(self, level: _Level) -> _Level:
        inside, read = slice_of(self.place.body, self.place.roots, self.place.fed)
        refuse_state(self.run, self.site, self.place, self.what, read)
        here = _Level(level.b, self.place.body, level.thetas)
        here.env = {v: self.value(level, v, inside[0]) for v in read}
        here.env.update((r, level.thetas[i]) for r, i in zip(self.place.roots, self.at, strict=True))
        for e in inside:
            level.b.copy_eqn(e, here.env)
        return here
