"""What the sweep keeps for the adjoint: residuals of each step, and which of the loops' states.

Two passes over the joint graph.  Both go from the outermost loops to those inside their bodies, where a byte is kept as
often as the body runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mlc.ir.core import Region
from mlc.ir.lowered.contract import Context, Graphs, Levers
from mlc.ir.lowered.nesting import bodies
from mlc.ir.lowered.stages import Joint
from mlc.passes.cost.equations import Meter, device_of
from mlc.passes.remat.residuals import keep_residuals
from mlc.passes.remat.states import sparse_states

__all__ = ["Residuals", "States"]


@dataclass(frozen=True)
class Residuals:
    """Values of a step that its adjoint had better read than make again (``joint -> joint``)."""

    name: ClassVar[str] = "residuals"
    takes: ClassVar[type[Joint]] = Joint
    ensures: ClassVar[str] = "each loop emits what its adjoint reads, by the minimum cut at the price of a byte"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """At the price of a byte that the levers name."""
        assert isinstance(graphs, Joint)
        meter = Meter(device_of(graphs.region))
        return replace(graphs, region=_residuals(graphs.region, context.levers, meter, 1))


@dataclass(frozen=True)
class States:
    """States of a loop in so many sets, the others replayed from what is kept of each step (``joint -> joint``)."""

    name: ClassVar[str] = "states"
    takes: ClassVar[type[Joint]] = Joint
    ensures: ClassVar[str] = "states are kept in as many sets as the levers say; a body replays the others"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """As many sets as the levers name; all states where they name none."""
        assert isinstance(graphs, Joint)
        if context.levers.slots is None:
            return graphs
        meter = Meter(device_of(graphs.region))
        return replace(graphs, region=_states(graphs.region, context.levers, meter, 1))


def _residuals(region: Region, levers: Levers, meter: Meter, times: int) -> Region:
    region = keep_residuals(region, levers.price / times, meter)
    return bodies(region, lambda body, n: _residuals(body, levers, meter, times * n))


def _states(region: Region, levers: Levers, meter: Meter, times: int) -> Region:
    assert levers.slots is not None
    region = sparse_states(region, levers.slots, levers.price / times, meter)
    return bodies(region, lambda body, n: _states(body, levers, meter, times * n))
