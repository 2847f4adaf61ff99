"""Micro-batches of both stages: in the bodies of loops and in the stage itself, where examples are independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from mlc.ir.core import Region
from mlc.ir.lowered.contract import Context, Graphs, Refused
from mlc.ir.lowered.nesting import map_bodies
from mlc.ir.lowered.stages import Stages
from mlc.passes.cost.memory import region_peak
from mlc.passes.microbatch.phases import in_phases

__all__ = ["MicroBatches"]


@dataclass(frozen=True)
class MicroBatches:
    """Loops over parts of a batch (``stages -> stages``); why a batch is not split goes into the findings."""

    name: ClassVar[str] = "micro-batches"
    takes: ClassVar[type[Stages]] = Stages
    ensures: ClassVar[str] = "the same sums over examples in another order, a part of the batch at a time"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """Into as many parts as the levers name."""
        assert isinstance(graphs, Stages)
        parts, refused = context.levers.parts, context.findings.refused.append
        if parts < 2:
            return graphs
        forward = map_bodies(graphs.forward, lambda body: _split(body, parts, refused))
        split = in_phases(forward, parts, refused)  # values kept for later are joined again: it may cost more
        backward = graphs.backward if graphs.backward is None else _split(graphs.backward, parts, refused)
        return replace(graphs, forward=min(forward, split, key=region_peak), backward=backward)


def _split(region: Region, parts: int, refused: Callable[[Refused], None]) -> Region:
    return in_phases(map_bodies(region, lambda body: _split(body, parts, refused)), parts, refused)
