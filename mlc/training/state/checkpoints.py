"""Checkpoints: files that are whole or not there, and hold no code.

A state is written beside its final name, flushed to the disk and renamed, so a process that is killed while it writes
leaves the older files as they were.  The newest readable file counts; one that cannot be read is named in a warning and
passed over.  Of several processes that train together each writes a file of its own (their data, generators and inner
problems differ), and the newest step counts that all of them can read: no process has to wait for another's write, and
a process that dies while it writes takes no state of the others with it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlc.errors import MlcWarning, TrainingError
from mlc.training.state.archive import Frozen, read, write
from mlc.units import size_text

__all__ = ["Checkpoints", "Place", "Talk"]

_NAME = re.compile(r"step-(\d+)(?:\.rank-(\d+)-of-(\d+))?\.mlc")
_KEPT = 3


class Talk(Protocol):
    """Processes that train together (:class:`mlc.runtime.circle.Circle`)."""

    def told(self, text: str) -> list[str]:
        """A text of every process."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""


@dataclass(frozen=True)
class Place:
    """Which process writes.

    Attributes:
        rank: Its rank in the world.
        world: Processes in the world.
        ranks: Those that train together, and continue at the same step.
        talk: With these; None where there are no others.
    """

    rank: int = 0
    world: int = 1
    ranks: tuple[int, ...] = (0,)
    talk: Talk | None = None

    def name(self, step: int) -> str:
        """The file of a step."""
        part = f".rank-{self.rank}-of-{self.world}" if self.world > 1 else ""
        return f"step-{step:010d}{part}.mlc"


class Checkpoints:
    """The checkpoints of one folder; the newest three are kept."""

    def __init__(self, folder: str | os.PathLike[str], place: Place | None = None) -> None:
        """Make the folder, and see that it can be written to.

        Raises:
            TrainingError: when that is not possible.
        """
        self.folder = Path(folder)
        self.place = place or Place()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as f:
                f.write(b"mlc")
            for left in self.folder.glob(f"{self.place.name(0).replace('0000000000', '*')}.*.new"):
                left.unlink(missing_ok=True)  # by a process that was killed while it wrote
        except OSError as e:
            raise TrainingError(
                f"checkpoint={os.fspath(folder)!r} cannot be written to: {_why(e)}", advice="another folder"
            ) from e

    def files(self) -> list[tuple[int, Path]]:
        """Steps and files of this process, the oldest first."""
        found = [(_NAME.fullmatch(f.name), f) for f in self.folder.iterdir()]
        return sorted((int(m[1]), f) for m, f in found if m and f.name == self.place.name(int(m[1])))

    def write(self, step: int, frozen: Frozen) -> Path:
        """Write a state; older files go once it is there.

        Raises:
            TrainingError: when the disk does not take it; what was there before is still there.
        """
        path = self.folder / self.place.name(step)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with new.open("wb") as f:
                write(f, frozen, {"step": step, "rank": self.place.rank, "world": self.place.world})
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, path)
            _sync_folder(self.folder)
        except OSError as e:
            _remove(new)
            last = [k for k, _ in self.files()]
            stands = f"the one after step {last[-1]} stands" if last else "there is none yet"
            raise TrainingError(
                f"the checkpoint after step {step} could not be written to {self.folder}: {_why(e)} (it needs "
                f"{size_text(frozen.nbytes())}); {stands}",
                advice="make room, and run the same program again: it goes on from there",
            ) from e
        except BaseException:
            _remove(new)
            raise
        self._drop()
        return path

    def _drop(self) -> None:
        """All but the newest three that every process has go, and whatever is older."""
        mine, everybody = self.files(), self._everybody()
        whole = [k for k, _ in mine if k in everybody] or [k for k, _ in mine]
        for step, old in mine:
            if len(whole) >= _KEPT and step < whole[-_KEPT]:
                _remove(old)

    def _everybody(self) -> set[int]:
        """Steps that all processes have a file of, as far as this one sees the others' files."""
        ranks: dict[int, set[int]] = {}
        for f in self.folder.iterdir():
            m = _NAME.fullmatch(f.name)
            if m and int(m[3] or 1) == self.place.world:
                ranks.setdefault(int(m[2] or 0), set()).add(int(m[1]))
        mine = ranks.get(self.place.rank, set())
        together = [ranks[r] for r in self.place.ranks if r in ranks]
        return mine.intersection(*together) if len(together) == len(self.place.ranks) else mine

    # ---- reading

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest state that can be read (on every process), with its file; None where there is none at all.

        Raises:
            TrainingError: when there are files and none can be read, or they are of another number of processes.
        """
        files = {step: path for step, path in self.files()}
        self._check_world(bool(files))
        bad: list[str] = []
        while True:
            step = self._common(files, bad)
            if step is None:
                return None
            path, state, why = files[step], None, ""
            try:
                state = read(path)
            except (OSError, ValueError) as e:
                why = f"the checkpoint {path} cannot be read ({str(e).splitlines()[0][:200]})"
            said = self._told(why)
            if not any(said):
                assert state is not None
                return path, state
            bad += [s for s in said if s]
            del files[step]
            if files:
                warnings.warn(MlcWarning(f"{bad[-1]}: the one before it is used"), stacklevel=4)

    def _told(self, x: Any) -> list[Any]:
        """What every process says."""
        return [x] if self.place.talk is None else [json.loads(t) for t in self.place.talk.told(json.dumps(x))]

    def _common(self, files: Mapping[int, Path], bad: list[str]) -> int | None:
        """The newest step that every process has a file of."""
        steps: list[list[int]] = self._told(sorted(files))
        both = set.intersection(*map(set, steps))
        if both:
            step = max(both)
            lacking = [max(s) for s in steps if s and max(s) > step]
            if lacking and not bad:
                said = f"the checkpoint after step {max(lacking)} lacks the file of a process"
                warnings.warn(MlcWarning(f"{said}: the one after step {step} is used"), stacklevel=5)
            return step
        if not bad and any(steps) and max(map(len, steps)) == 1:  # killed while the first one was written
            said = f"the first checkpoint in {self.folder} was not written by every process: the training begins anew"
            warnings.warn(MlcWarning(said), stacklevel=5)
            return None
        if any(steps) or bad:
            why = bad[-1] if bad else "no step is there of all processes"
            raise TrainingError(
                f"no checkpoint in {self.folder} can be read: {why}", advice="another folder, to begin anew"
            )
        return None

    def _check_world(self, any_of_mine: bool) -> None:
        found = [_NAME.fullmatch(f.name) for f in self.folder.iterdir()]
        others = {int(m[3] or 1) for m in found if m} - {self.place.world}
        if any(self._told(bool(others) and not any_of_mine)):
            said = ", ".join(map(str, sorted(others))) or "another number of"
            raise TrainingError(
                f"the checkpoints in {self.folder} are of {said} processes, and this training runs on "
                f"{self.place.world}: data and generators of each process are part of them",
                advice="as many processes as before, or another folder; mlc.training.load_checkpoint reads one file",
            )


def _why(e: OSError) -> str:
    return e.strerror or str(e)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a file too many harms nobody
        return


def _sync_folder(folder: Path) -> None:
    """The new name itself is on the disk, where the system can say so."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
