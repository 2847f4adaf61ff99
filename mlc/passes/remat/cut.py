"""The cut: the joint graph becomes two stages, forward and backward.

What does not depend on a cotangent runs at the call, what does runs at ``backward()``.  Which values are kept between
the two, and which the backward stage makes again, is a minimum cut at the price of a byte (:mod:`.mincut`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlc.ir.builder import dce
from mlc.ir.call import once
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.lowered.contract import Context, Graphs
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.types import SeqType, resident
from mlc.passes.cost.equations import Meter, device_of
from mlc.passes.cost.memory import root_of
from mlc.passes.remat.mincut import choose, needed_for

__all__ = ["Cut"]


@dataclass(frozen=True)
class Cut:
    """Forward and backward stage (``joint -> stages``)."""

    name: ClassVar[str] = "cut"
    takes: ClassVar[type[Joint]] = Joint
    ensures: ClassVar[str] = "the forward stage reads no cotangent, the backward stage only what was kept"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """At the price of a byte that the levers name."""
        assert isinstance(graphs, Joint)
        forward, backward, saved = _cut(graphs, context.levers.price, Meter(device_of(graphs.region)))
        return Stages(forward, backward, graphs.n_results, saved, graphs.cotangents, graphs.gradients, graphs.handed)


def _cut(joint: Joint, price: float, meter: Meter) -> tuple[Region, Region | None, tuple[tuple[str, int], ...]]:
    """Forward and backward stage, and where the backward stage's saved inputs come from."""
    region, n = joint.region, joint.n_results
    outs, grads = region.outputs[:n], region.outputs[n:]
    inputs, ct_vars = region.inputs[: joint.n_inputs], region.inputs[joint.n_inputs :]
    names = region.names[: joint.n_inputs]
    late: set[Var] = set(ct_vars)
    before: list[Eqn] = []
    behind: list[Eqn] = []
    for e in region.eqns:
        if any(v in late for v in e.inputs):
            late.update(e.outs)
            behind.append(e)
        else:
            before.append(e)
    if not grads:
        return dce(Region(inputs, tuple(before), outs, names)), None, ()
    read = dict.fromkeys(v for v in (*[v for e in behind for v in e.inputs], *grads) if v not in late)
    kept = choose(before, read, *_prices(inputs, before, price, meter))
    again = needed_for(before, read, kept)
    used = {v for e in (*again, *behind) for v in e.inputs} | set(grads)
    saved = [v for v in (*inputs, *[v for e in before for v in e.outs]) if v in kept and v in used]
    position = {v: i for i, v in enumerate(inputs)}
    results = [*outs, *[v for v in saved if v not in position]]
    where = [("in", position[v]) if v in position else ("out", results.index(v, n)) for v in saved]
    forward = dce(Region(inputs, tuple(before), tuple(results), names))
    backward = dce(Region((*saved, *ct_vars), (*again, *behind), tuple(grads)))
    return forward, backward, tuple(where)


def _prices(inputs: Sequence[Var], before: Sequence[Eqn], price: float, meter: Meter
            ) -> tuple[Callable[[Var], float | None], Callable[[Eqn], float | None]]:  # fmt: skip
    """What keeping and making again costs between the stages; constants are always made again, loops never."""
    made = {v: e for e in before for v in e.outs}

    def keep(v: Var) -> float | None:
        e = made.get(v)
        if e is None or isinstance(v.type, SeqType):
            return 0.0
        if redo(e) is not None and (root_of(e) is not None or not e.inputs):
            return None
        return price * resident(v.type)

    def redo(e: Eqn) -> float | None:
        if once(e) or any(isinstance(v.type, SeqType) for v in (*e.inputs, *e.outs)) or isinstance(e.op, Loop):
            return None
        return meter(e).seconds

    return keep, redo
