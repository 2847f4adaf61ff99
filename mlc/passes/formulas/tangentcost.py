"""Forward mode with more or fewer tangents: what its stages would cost for another number of meta-parameter elements.

Everything that a tangent enters works on all of them at once, in a leading dimension: its bytes, operations and
elements are proportional to their number, its start is not.  So the cost of every equation at another number follows
from its types, without building the stages again.  The program is taken to be the same otherwise.  O(equations).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from mlc.ir.builder import renamed
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.lowered.stages import Stages
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, TensorType, Type, nbytes
from mlc.passes.cost.equations import Cost, Meter

__all__ = ["TangentMeter", "columns_of", "with_tangents"]

_TAGS = (Origin.TANGENT, Origin.FUSED)


def columns_of(stages: Stages, k: int) -> set[Var]:
    """Values of forward-mode stages that hold all ``k`` tangents: what depends on the seeds."""
    found: set[Var] = set()
    _spread(stages.forward, found, k)
    if stages.backward is not None:
        pairs = zip(stages.backward.inputs, stages.saved, strict=False)
        found.update(v for v, (kind, i) in pairs if kind == "out" and stages.forward.outputs[i] in found)
        _spread(stages.backward, found, k)
    return found


def _seed(e: Eqn, k: int) -> bool:
    """Whether an equation makes tangents from nothing; a single one has no dimension of its own."""
    t = e.outs[0].type if e.outs else None
    if e.origin not in _TAGS or not isinstance(t, TensorType):
        return False
    return k == 1 or (not e.inputs and t.shape[:1] == (k,))


def _spread(region: Region, found: set[Var], k: int) -> None:
    for e in region.eqns:
        if not isinstance(e.op, Loop):
            if any(v in found for v in e.inputs) or _seed(e, k):
                found.update(e.outs)
            continue
        op = e.op
        found.update(v for v, a in zip(op.body.inputs, e.args, strict=True) if a in found)
        before = -1
        while before != len(found):  # a carry may become one in the body
            before = len(found)
            _spread(op.body, found, k)
            carries = zip(op.body.inputs[: op.n_carry], op.body.outputs, strict=False)
            found.update(v for v, o in carries if o in found)
        found.update(o for o, v in zip(e.outs, op.body.outputs, strict=True) if v in found)


class TangentMeter(Meter):
    """Costs of equations with ``times`` as many tangents."""

    def __init__(self, like: Meter, columns: set[Var], times: float) -> None:
        super().__init__(like.rates)
        self.like, self.columns, self.times = like, columns, times

    def __call__(self, e: Eqn) -> Cost:
        """Cost of one equation that is no loop."""
        cost = self.like(e)
        wide = sum(nbytes(v.type) for v in (*dict.fromkeys(e.inputs), *e.outs) if v in self.columns)
        if not wide or not cost.bytes:
            return cost
        r = self.rates
        # above its start an operator takes time for what it does most of; all of that grows when a tangent is in it
        moved = cost.bytes + (self.times - 1) * wide
        base = cost.seconds / r.strain - r.start
        traffic = cost.bytes / (r.near if cost.bytes <= r.cache else r.far)
        other = base * self.times if base > 1.0001 * traffic else 0.0
        now = max(moved / (r.near if moved <= r.cache else r.far), other, self.times * cost.flops / r.flops[4])
        return Cost(cost.flops * self.times, moved, (r.start + now) * r.strain)


def with_tangents(stages: Stages, columns: set[Var], times: Fraction) -> Stages:
    """The stages with types for ``times`` as many tangents: only for predictions of memory."""
    env = {v: Var(_wider(v.type, times)) for v in columns}
    backward = None if stages.backward is None else _region(stages.backward, env)
    return replace(stages, forward=_region(stages.forward, env), backward=backward)


def _region(r: Region, env: dict[Var, Var]) -> Region:
    eqns = []
    for e in r.eqns:
        if isinstance(e.op, Loop):
            e = e.with_(op=replace(e.op, body=_region(e.op.body, env)))
        eqns.append(renamed(e, env).with_(outs=tuple(env.get(v, v) for v in e.outs)))
    inputs, outputs = (tuple(env.get(v, v) for v in x) for x in (r.inputs, r.outputs))
    return Region(inputs, tuple(eqns), outputs, r.names)


def _wider(t: Type, times: Fraction) -> Type:
    if isinstance(t, SeqType):
        return replace(t, elem=_wider(t.elem, times))
    assert isinstance(t, TensorType)
    first = t.shape[0] * times if t.shape else Fraction(1, 3)
    if first.denominator == 1:
        return replace(t, shape=(int(first), *t.shape[1:]))
    return replace(t, shape=(round(t.numel * times),), stride=(1,))
