"""What notebooks show of an object: its text and its picture.

Drawing is far from here; the front door says how (:mod:`mlc.notebook`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["HOW", "Shown"]

HOW: dict[str, Callable[..., Any]] = {}  # "bundle" and "frame", set by mlc.notebook


class Shown:
    """Objects that a notebook shows as a picture."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Text, and the levels as SVG, for IPython."""
        found: dict[str, str] = HOW["bundle"](self)
        return found

    def show(self, height: int = 640) -> Any:
        """The page (levels that open, memory, search) in a sandboxed frame, for a notebook.

        Args:
            height: Of the frame, pixels.

        Raises:
            PlanError: for a plan that was loaded without its program.
        """
        return HOW["frame"](self, height)
