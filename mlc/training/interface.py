"""What runs and callbacks see of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mlc.training.level import Level
from mlc.training.loggers import Logger
from mlc.training.nonfinite import Guard
from mlc.training.state.checkpoints import Place
from mlc.training.state.snapshot import Snapshots

__all__ = ["Trained"]


class Trained(Protocol):
    """A :class:`~mlc.training.engine.Training`, as far as it is run.

    Attributes:
        levels: Bottom to top.
        callbacks: Functions of an event.
        loggers: Where values go.
        step: Outer steps done so far.
        until: The outer step at which the run so far was to end.
        stopped: Why the last run ended before its time, or None.
        validates: Whether the present run validates.
        warned: Whether it was told that steps are recorded anew.
        snapshots: Takes its state.
        place: Which process this is, and which ones train together.
        guard: What becomes of steps that are not finite.
    """

    levels: list[Level]
    callbacks: list[Callable[[Any], None]]
    loggers: list[Logger]
    step: int
    until: int
    stopped: str | None
    validates: bool
    warned: bool
    snapshots: Snapshots
    place: Place
    guard: Guard

    @property
    def recordings(self) -> int:
        """How often a step ran as Python, to be recorded."""

    def advance(self) -> dict[str, Any]:
        """One outer step; losses by level."""

    def stop(self, why: str = "stopped") -> None:
        """End the run after this step."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go to a state in the middle of its run."""
