"""The font of the pictures, and how wide text is in it.

``mlc Sans`` is a subset of Liberation Sans 2.1, which has the metrics of Arial and Helvetica: a width computed here
holds in a browser with any of the three.  It is shipped so that a ``.png`` has labels on a machine without fonts.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

__all__ = ["FAMILY", "font_files", "text_width"]

FAMILY = "mlc Sans"
_UNITS = 2048  # of an em


def font_files() -> list[str]:
    """Paths of the font's files, regular and bold."""
    return [str(Path(str(files("mlc.view.fonts") / f"{weight}.ttf"))) for weight in ("regular", "bold")]


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of a line of text in pixels, ``size`` pixels high; unknown characters count as the widest letter."""
    widths = _widths()["bold" if bold else "regular"]
    return sum(widths.get(c, widths["W"]) for c in text) * size / _UNITS


@cache
def _widths() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads((files("mlc.view.fonts") / "widths.json").read_text("utf-8"))
    return found
