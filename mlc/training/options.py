"""Options of the compiled steps, and the processes of a training, from what its levels say and read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlc.compiled.compiled import compile
from mlc.compiled.together import world_now
from mlc.runtime.circle import circle_of
from mlc.training.level import Level
from mlc.training.order.reading import Reading
from mlc.training.state.checkpoints import Place

__all__ = ["options_of", "place_of"]


def options_of(levels: Sequence[Level], memory: Any, precision: Any, mesh: Any, nonfinite: Any) -> dict[str, Any]:
    """What :func:`mlc.compile` takes; a level's own precision goes by its name.

    Raises:
        PlanError: for options that make no sense.
    """
    own = {x.name: x.precision for x in levels if x.precision is not None}
    if own and precision is not None:
        own = {**{x.name: precision for x in levels}, **own}
    guarded = None if nonfinite is None else "raise"
    return compile(memory=memory, precision=own or precision, mesh=mesh, nonfinite=guarded)(_nothing).options


def place_of(readings: Iterable[Reading], mesh: Any) -> Place:
    """Which process this is, and which ones train together: those that losses communicate with, and those of a mesh."""
    rank, world = world_now() or (0, 1)
    ranks = {r for x in readings for r in x.ranks} | set([] if mesh is None else mesh.mesh.flatten().tolist())
    together = tuple(sorted(ranks | {rank}))
    return Place(rank, world, together, circle_of(together))


def _nothing() -> None:
    """In the place of a loop: only the options are looked at."""
