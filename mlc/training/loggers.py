"""Where values go: standard output, a CSV file, TensorBoard, or anything with ``log(step, values)``.

A run that is continued writes some steps again, those after the checkpoint: each logger replaces them.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mlc.errors import TrainingError

__all__ = ["CSV", "Logger", "Stdout", "TensorBoard"]


@runtime_checkable
class Logger(Protocol):
    """The interface of a logger: one method."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of an outer step: losses by level, validated values under ``"valid"``."""


class Stdout:
    """One line of text for every so many steps."""

    def __init__(self, every: int = 1) -> None:
        """Say how often.

        Args:
            every: Steps from line to line; validations are always printed.
        """
        self.every = every

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Print a line."""
        if step % self.every and not any(k.split(".")[0] == "valid" for k in values):
            return
        print(f"step {step}  " + "  ".join(f"{k} {v:.6g}" for k, v in values.items()), file=sys.stdout, flush=True)


class CSV:
    """A file with a row for each step: ``step``, then a column for each value, empty where there was none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Say where; nothing is written yet.

        Args:
            path: Of the file; rows that it has are kept up to the first step that is logged.
        """
        self.path = Path(path)
        self._columns: list[str] | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        if self._columns is None:
            rows = self._rows()
            self._columns = list(rows[0]) if rows else ["step"]
            self._write([r for r in rows if int(r["step"]) < step])
        new = [k for k in values if k not in self._columns]
        if new:
            rows = self._rows()
            self._columns += new
            self._write(rows)
        self._append(step, values)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as f:
            rows = list(csv.DictReader(f))
        if rows and "step" not in rows[0]:
            raise TrainingError(f"{self.path} is a table without a column 'step'", advice="another file")
        return rows

    def _write(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w", newline="") as f:
            out = csv.DictWriter(f, self._columns, restval="")
            out.writeheader()
            out.writerows(rows)
        os.replace(new, self.path)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        assert self._columns is not None
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self._columns, restval="").writerow({"step": step, **values})


class TensorBoard:
    """Event files for TensorBoard; needs the package ``tensorboard``."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Say where; nothing is written yet.

        Args:
            folder: For the event files.

        Raises:
            TrainingError: when the package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise TrainingError("TensorBoard is not installed", advice="pip install tensorboard") from e
        self._make: Any = lambda step: SummaryWriter(os.fspath(folder), purge_step=step)
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars."""
        if self._writer is None:
            self._writer = self._make(step)  # what an earlier run wrote from this step on is hidden
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def loggers(given: Any) -> list[Logger]:
    """One logger, several or none, as a list.

    Raises:
        TrainingError: for what has no ``log``.
    """
    found = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for x in found:
        if isinstance(x, type) or not isinstance(x, Logger):
            name = x.__name__ if isinstance(x, type) else f"a {type(x).__name__}"
            raise TrainingError(
                f"logger is {name}, without log(step, values)", advice='mlc.training.CSV("losses.csv"), or your own'
            )
    return found
