"""What stands where in an SVG of ours, from the font's own metrics: for tests that nothing overlaps."""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import cache

from PIL import ImageFont

from mlc.view.fonts import font_files

SVG = "{http://www.w3.org/2000/svg}"
SIZES = {"title": (15, True), "name": (13, True), "note": (12, False), "label": (12, False)}


@dataclass(frozen=True)
class Rect:
    what: str
    left: float
    top: float
    right: float
    bottom: float

    def inside(self, other: "Rect", by: float = 0.0) -> bool:
        return (
            other.left + by <= self.left
            and self.right <= other.right - by
            and other.top + by <= self.top
            and self.bottom <= other.bottom - by
        )

    def touches(self, other: "Rect") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@cache
def font(bold: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_files()[bold], 1000)


def boxes(root: ET.Element) -> list[Rect]:
    found = []
    for r in root.iter(f"{SVG}rect"):
        if r.get("data-key"):
            x, y, w, h = (float(r.get(k)) for k in ("x", "y", "width", "height"))
            found.append(Rect(r.get("data-key"), x, y, x + w, y + h))
    return found


def texts(root: ET.Element) -> list[Rect]:
    """Every text with its ink: width by the font file itself, height from ascent to descent of its letters."""
    found = []
    for t in root.iter(f"{SVG}text"):
        if not t.text:
            continue
        size, bold = SIZES[t.get("class").split()[0]]
        x, y = float(t.get("x")), float(t.get("y"))
        width = font(bold).getlength(t.text) * size / 1000
        found.append(Rect(t.text, x, y - 0.75 * size, x + width, y + 0.22 * size))
    return found


def segments(d: str) -> list[tuple[float, float, float, float]]:
    """Straight parts of a path of ours (M, H, V, Q), its bends left out."""
    out, x, y = [], 0.0, 0.0
    for letter, rest in re.findall(r"([MHVQ])([^MHVQ]*)", d):
        n = [float(v) for v in re.findall(r"-?[\d.]+", rest)]
        to = {"H": (n[0], y), "V": (x, n[0])}.get(letter, (n[-2] if len(n) > 1 else x, n[-1]))
        if letter in "HV":
            out.append((x, y, *to))
        x, y = to
    return out
