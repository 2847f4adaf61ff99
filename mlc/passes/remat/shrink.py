"""Order and rematerialisation of both stages and of the bodies of their loops, at the price of a byte.

The forward stage gives way only as far as it is the larger one: where the backward stage has the peak, time spent on a
smaller forward stage would buy nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from mlc.ir.core import Eqn, Region
from mlc.ir.lowered.contract import Context, Graphs, Levers
from mlc.ir.lowered.nesting import bodies
from mlc.ir.lowered.stages import Stages
from mlc.ir.origin import Origin
from mlc.passes.cost.equations import Meter, device_of
from mlc.passes.cost.memory import Footprint
from mlc.passes.remat.inlined import TAG as INNER
from mlc.passes.remat.segments import Trade, rematerialise

__all__ = ["Rematerialise"]

_ORDERED = (Origin.TANGENT, Origin.FUSED, INNER)


@dataclass(frozen=True)
class Rematerialise:
    """Every value as late as its first use, and what is alive at the widest points kept or made again."""

    name: ClassVar[str] = "rematerialise"
    takes: ClassVar[type[Stages]] = Stages
    ensures: ClassVar[str] = "the same operators on the same values, ordered and repeated so that less memory is needed"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """At the price of a byte that the levers name."""
        assert isinstance(graphs, Stages)
        levers, meter = context.levers, Meter(device_of(graphs.forward))
        free = replace(levers, price=0.0)
        forward = _shrink(graphs.forward, free, meter, 1, levers)
        footprint = Footprint()
        first = footprint.region(forward)
        backward, peak = graphs.backward, 0
        if backward is not None:
            backward = _shrink(backward, levers, meter, 1)
            owned, results = footprint.hand_over(first.book, replace(graphs, forward=forward, backward=backward))
            peak = results + footprint.region(backward, owned).peak
        if first.peak > peak:
            forward = _shrink(forward, levers, meter, 1, free)
        return replace(graphs, forward=forward, backward=backward)


def _shrink(region: Region, levers: Levers, meter: Meter, times: int, replays: Levers | None = None) -> Region:
    """Order and rematerialise a stage and the bodies of its loops; ``replays`` are the levers of their replays.

    A replay runs while the other stage does, so its memory is that stage's.
    """
    again = replays or levers

    def body(region: Region, n: int) -> Region:
        return _shrink(region, levers, meter, times * n, again)

    region = bodies(region, body, lambda region, n: _shrink(region, again, meter, times * n))
    return rematerialise(region, _anchors(region), Trade(levers.price, times, levers.rounds), meter)


def _anchors(region: Region) -> Callable[[Eqn], bool]:
    """Equations whose order says in which the others run: those of products, else all but copies."""
    if any(e.origin in _ORDERED for e in region.eqns):
        return lambda e: e.origin in _ORDERED
    return lambda e: e.origin is not Origin.RECOMPUTED
