"""Folders of checkpoints that are given from outside of the program: ``mlc run --checkpoint DIR --every N``.

Inside of :func:`checkpoints_in` every run of a training that names no folder of its own gets one: the first training
DIR itself, the ones after it ``DIR/2``, ``DIR/3`` and so on in the order in which they run first.  A program that is
started again makes its trainings in the same order, so each finds its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Folders", "checkpoints_in", "given"]


class Folders:
    """Folders of trainings.

    Attributes:
        folder: Of the first.
        every: Steps from checkpoint to checkpoint, or None.
        trainings: Those that have run, in order.
    """

    def __init__(self, folder: Path, every: int | None) -> None:
        self.folder, self.every = folder, every
        self.trainings: list[Any] = []

    def of(self, training: Any) -> Path:
        """The folder of a training."""
        if not any(t is training for t in self.trainings):
            self.trainings.append(training)
        k = next(i for i, t in enumerate(self.trainings) if t is training)
        return self.folder / str(k + 1) if k else self.folder


_now: Folders | None = None


@contextlib.contextmanager
def checkpoints_in(folder: Path, every: int | None) -> Iterator[Folders]:
    """Give runs of trainings folders for their checkpoints."""
    global _now
    before, _now = _now, Folders(folder, every)
    try:
        yield _now
    finally:
        _now = before


def given(training: Any, checkpoint: Any, every: Any) -> tuple[Any, Any]:
    """Folder and interval of a run: its own, or those given from outside."""
    if checkpoint is not None or _now is None:
        return checkpoint, every
    return _now.of(training), every if every is not None else _now.every
