"""Saving beside the training: a state is frozen at once, and written by a thread while the next steps run.

One write is under way at a time; a second one waits for the first.  What went wrong in the thread is raised where the
training asks next: at the following step, at the following save, or at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc.training.state.archive import Frozen
from mlc.training.state.checkpoints import Checkpoints

__all__ = ["Saver"]


class Saver:
    """Writes the checkpoints of one run."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._thread: threading.Thread | None = None
        self._done: list[tuple[int, Path]] = []
        self._failed: BaseException | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write a state that is the caller's no more.

        Raises:
            TrainingError: for a state that no file can hold; or when the write before failed.
        """
        frozen = Frozen.of(state)
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, frozen), name="mlc checkpoint")
        self._thread.start()

    def _write(self, step: int, frozen: Frozen) -> None:
        try:
            self._done.append((step, self.checkpoints.write(step, frozen)))
        except BaseException as e:
            self._failed = e

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            TrainingError: when the disk did not take it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def finished(self) -> list[tuple[int, Path]]:
        """Steps and files of what is on the disk since this was asked last.

        Raises:
            TrainingError: when the disk did not take one.
        """
        if self._thread is None or not self._thread.is_alive():
            self.wait()
        found = self._done[:]
        del self._done[: len(found)]
        return found

    def _raise(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def end(self, after: BaseException) -> None:
        """Wait after an error; what goes wrong now becomes a note of it."""
        try:
            self.wait()
        except Exception as e:
            after.add_note(str(e))
