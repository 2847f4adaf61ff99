"""What the gradients of a root did last.  It is no state of the user's: compiled functions leave this module alone."""

from __future__ import annotations

from mlc.linear.solve import Solve

__all__ = ["Log"]


class Log:
    """The last linear solve."""

    def __init__(self) -> None:
        self.last: Solve | None = None
