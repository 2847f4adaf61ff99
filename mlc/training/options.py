"""Options of the compiled steps, from those of a training and its levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlc.passes.planning.options import check_options
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
    options: dict[str, Any] = {"memory": memory, "backend": "auto", "stop_gradient": "all", "flows": None}
    options |= {"precision": own or precision, "mesh": mesh, "levers": None}
    check_options(options)
    return {**options, "verify": "values"}
