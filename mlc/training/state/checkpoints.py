"""Checkpoints: files that are whole or not there, and hold no code.

A state is written beside its final name, flushed to the disk and renamed, so a process that is killed while it writes
leaves the older files as they were.  The format is PyTorch's, read with ``weights_only=True``: tensors, numbers and
text alone.  The newest readable file counts; one that cannot be read is named in a warning and passed over.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlc.errors import MlcWarning, TrainingError

__all__ = ["Checkpoints"]

_NAME = re.compile(r"step-(\d+)\.pt")
_KEPT = 3


class Checkpoints:
    """The checkpoints of one folder; the newest three are kept."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Make the folder.

        Raises:
            TrainingError: when that is not possible.
        """
        self.folder = Path(folder)
        self._tried = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise TrainingError(f"checkpoint={os.fspath(folder)!r} cannot be made a folder: {e}") from e
        for left in self.folder.glob("step-*.pt.*.new"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)

    def files(self) -> list[tuple[int, Path]]:
        """Steps and files, the oldest first."""
        found = [(_NAME.fullmatch(f.name), f) for f in self.folder.iterdir()]
        return sorted((int(m[1]), f) for m, f in found if m)

    def write(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a state; older files go once it is there.

        Raises:
            TrainingError: when the state holds what a file without code cannot hold.
        """
        path = self.folder / f"step-{step:010d}.pt"
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with new.open("wb") as f:
                torch.save(dict(state), f)
                f.flush()
                os.fsync(f.fileno())
            if not self._tried:
                _load(new)
                self._tried = True
            os.replace(new, path)
        except Exception as e:
            new.unlink(missing_ok=True)
            if isinstance(e, OSError):
                raise
            raise TrainingError(
                f"the state cannot be saved: {str(e).splitlines()[0]}",
                advice="tensors, numbers and text alone in the states of callbacks, optimizers and schedulers",
            ) from e
        _sync_folder(self.folder)
        for _, old in self.files()[:-_KEPT]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest state that can be read, with its file; None where there is none at all.

        Raises:
            TrainingError: when there are files and none can be read.
        """
        files = self.files()
        for k, (_, path) in enumerate(reversed(files)):
            try:
                return path, _load(path)
            except Exception as e:
                why = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
                if k + 1 == len(files):
                    raise TrainingError(
                        f"no checkpoint in {self.folder} can be read ({why})", advice="another folder, to begin anew"
                    ) from e
                said = f"the checkpoint {path} cannot be read ({why}): the one before it is used"
                warnings.warn(MlcWarning(said), stacklevel=4)
        return None


def _load(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("it is no state of a training")
    return state


def _sync_folder(folder: Path) -> None:
    """The new name itself is on the disk, where the system can say so."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
