"""SIGTERM during a run: the step under way is finished, its state is saved, and the process ends.

Batch systems and ``torchrun`` send it some time before they kill.  The signal sets a mark alone; the run looks at it
between steps.  A handler of the user's own (a Python function) is called once the state is saved, and then decides what
happens; a signal that is ignored stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interruption", "watched"]


class Interruption:
    """Whether the process was asked to end.

    Attributes:
        asked: Whether it was.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._frame: FrameType | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self._frame = True, frame

    def answer(self) -> None:
        """The state is saved: end the process, unless a handler of the user's decides otherwise.

        Raises:
            SystemExit: with 143, as shells number a process that SIGTERM ended.
        """
        self.asked = False
        if callable(self._before):
            self._before(signal.SIGTERM, self._frame)
            return
        print("mlc: SIGTERM: the training is saved and ends here", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def watched(wanted: bool) -> Iterator[Interruption]:
    """Watch for SIGTERM inside, on the main thread, where ``wanted``."""
    found = Interruption()
    now = signal.getsignal(signal.SIGTERM)
    if not wanted or threading.current_thread() is not threading.main_thread() or now in (signal.SIG_IGN, None):
        yield found
        return
    found._before = signal.signal(signal.SIGTERM, found._note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGTERM, now)
