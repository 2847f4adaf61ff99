"""Loops inside loops: a region with other bodies, made from the old ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlc.ir.core import Loop, Region
from mlc.ir.lowered.slots import replayed_steps

__all__ = ["bodies", "map_bodies"]


def bodies(region: Region, f: Callable[[Region, int], Region], replay: Callable[[Region, int], Region] | None = None
            ) -> Region:  # fmt: skip
    """The region with other bodies of its loops (and of their replays), made from them and how often they run."""
    eqns = []
    for e in region.eqns:
        if isinstance(e.op, Loop):
            op = replace(e.op, body=f(e.op.body, e.op.count))
            if op.replay is not None and replay is not None:
                often = max(replayed_steps(op.count, op.replay.slots), 1)
                op = replace(op, replay=replace(op.replay, body=replay(op.replay.body, often)))
            e = e.with_(op=op)
        eqns.append(e)
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def map_bodies(region: Region, f: Callable[[Region], Region]) -> Region:
    """Apply ``f`` to the bodies of the region's loops and of their replays (not recursively)."""
    return bodies(region, lambda body, n: f(body), lambda body, n: f(body))
