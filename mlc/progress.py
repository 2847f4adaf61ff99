"""Progress of long work: one line on standard error while it lasts, nothing when that is not a terminal.

Work shorter than a second shows nothing either.  A thread of rich's draws the line, so that nothing has to be called
while the work goes on; at the end the line is taken away.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

PATIENCE = 1.0  # seconds of work before anything is shown
_busy = False


class _Line:
    """A spinner, what is done, and for how long."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self.what = what
        self.bar = Progress(  # what the user prints is left alone
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.task = self.bar.add_task(what)
        self.timer = threading.Timer(PATIENCE, self.bar.start)
        self.timer.daemon = True
        self.timer.start()

    def say(self, text: str) -> None:
        """Where the work is now."""
        self.bar.update(self.task, description=f"{self.what}: {text}")

    def end(self) -> None:
        self.timer.cancel()
        self.timer.join()
        self.bar.stop()


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show that ``what`` is being done; what it gives is called with where the work is, if there is more to say.

    Example::

        with progress("sweeping budgets") as say:
            for budget in budgets:
                say(f"{budget} bytes")
    """
    global _busy
    if _busy or not sys.stderr.isatty():  # work inside work has no line of its own
        yield lambda text: None
        return
    line, _busy = _Line(what), True
    try:
        yield line.say
    finally:
        _busy = False
        line.end()
