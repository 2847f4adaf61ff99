"""Options of the compiled steps, from those of a training and its levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlc.compiled.compiled import compile
from mlc.training.level import Level

__all__ = ["options_of"]


def options_of(levels: Sequence[Level], memory: Any, precision: Any, mesh: Any) -> dict[str, Any]:
    """What :func:`mlc.compile` takes; a level's own precision goes by its name.

    Raises:
        PlanError: for options that make no sense.
    """
    own = {x.name: x.precision for x in levels if x.precision is not None}
    if own and precision is not None:
        own = {**{x.name: precision for x in levels}, **own}
    return compile(memory=memory, precision=own or precision, mesh=mesh)(_nothing).options


def _nothing() -> None:
    """In the place of a loop: only the options are looked at."""
