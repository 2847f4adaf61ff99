"""A diagram as SVG: levels nested by indentation, one under the other, and arrows in channels at the right.

Every arrow leaves its box at the right edge, runs to a channel of its own, up or down in it, and back;
short arrows get the inner channels, so that few cross. The size follows from the number of boxes and
arrows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from mlc.diagram import Arrow, Box, Diagram

__all__ = ["COLORS", "to_svg"]

COLORS = {"value": "#1f5fbf", "response": "#1a7f4b", "gradient": "#6b7280", "stop": "#c0392b"}
FILLS = ("#ffffff", "#f5f7fa", "#ebeff5", "#e1e7f0")
CHAR, LINE, PORT, PAD, GAP, CHANNEL, LABEL = 7.2, 18, 18, 12, 14, 18, 11


@dataclass
class _Placed:
    box: Box
    depth: int
    x: float
    y: float
    height: float = 0
    right: float = 0
    ports: list[tuple[Arrow, bool]] = field(default_factory=list)
    first_port: float = 0


class _Layout:
    """Places boxes top-down, ports on their right edges, arrows in channels."""

    def __init__(self, d: Diagram) -> None:
        self.d = d
        self.placed: dict[str, _Placed] = {}
        self.order: list[_Placed] = []
        arrows = sorted(d.arrows, key=lambda a: (a.kind == "stop", a.kind == "gradient"))
        self.ports: dict[str, list[tuple[Arrow, bool]]] = {}
        for a in arrows:
            self.ports.setdefault(a.target, []).append((a, True))
            self.ports.setdefault(a.source, []).append((a, False))
        self.width = self._width(d.top, 0)
        self.bottom = self._place(d.top, 0, PAD, PAD + 30)

    def _width(self, box: Box, depth: int) -> float:
        own = max(len(t) for t in (box.title, *box.lines)) * CHAR + 2 * PAD + depth * 2 * PAD
        return max([own, *[self._width(b, depth + 1) for b in box.inside]])

    def _place(self, box: Box, depth: int, x: float, y: float) -> float:
        p = _Placed(box, depth, x, y, ports=self.ports.get(box.key, []))
        self.placed[box.key] = p
        self.order.append(p)
        text = PAD + LINE * (1 + len(box.lines))
        head = max(text, PAD + PORT * len(p.ports))
        p.first_port = y + PAD
        at = y + head + PAD / 2
        for b in box.inside:
            at = self._place(b, depth + 1, x + PAD, at) + GAP
        p.height = at - y
        p.right = PAD + self.width - PAD * depth
        return at

    def port(self, key: str, arrow: Arrow, arriving: bool) -> tuple[float, float]:
        """Where an arrow touches a box."""
        p = self.placed[key]
        return p.right, p.first_port + PORT * p.ports.index((arrow, arriving))

    def channels(self) -> list[tuple[Arrow, int]]:
        """Arrows with their channels, shortest first; a channel is free again below an arrow."""
        taken: list[list[tuple[float, float]]] = []
        out = []
        for a in sorted(self.d.arrows, key=self.span):
            low, high = sorted((self.port(a.source, a, False)[1], self.port(a.target, a, True)[1]))
            k = next(
                (i for i, rows in enumerate(taken) if all(high < lo - 4 or low > hi + 4 for lo, hi in rows)),
                len(taken),
            )
            if k == len(taken):
                taken.append([])
            taken[k].append((low, high))
            out.append((a, k))
        return out

    def span(self, a: Arrow) -> float:
        """Vertical length of an arrow."""
        return abs(self.port(a.source, a, False)[1] - self.port(a.target, a, True)[1])


def to_svg(d: Diagram) -> str:
    """The SVG document."""
    layout = _Layout(d)
    channels = layout.channels()
    base = PAD + layout.width + 10 + max(len(a.label) for a in d.arrows) * LABEL * 0.58 + 10 if d.arrows else 0
    width = (
        (base + CHANNEL * (max((k for _, k in channels), default=0) + 1) + PAD) if d.arrows else layout.width + 2 * PAD
    )
    height = layout.bottom + PAD
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
        "<defs>",
        *[
            f'<marker id="{k}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{c}"/></marker>'
            for k, c in COLORS.items()
        ],
        "</defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="{PAD}" y="{PAD + 14}" font-size="15" font-weight="bold" fill="#111827">{escape(d.title)}</text>',
    ]
    out += [line for p in layout.order for line in _box(p)]
    out += [line for a, k in channels for line in _arrow(layout, a, base + CHANNEL * k)]
    return "\n".join([*out, "</svg>"]) + "\n"


def _box(p: _Placed) -> list[str]:
    fill, edge = ("#fff8e6", "#c98a12") if p.box.meta else (FILLS[min(p.depth, len(FILLS) - 1)], "#4b5563")
    lines = [
        f'<rect x="{p.x:.1f}" y="{p.y:.1f}" width="{p.right - p.x:.1f}" height="{p.height:.1f}" rx="5" '
        f'fill="{fill}" stroke="{edge}"/>',
        f'<text x="{p.x + PAD:.1f}" y="{p.y + PAD + 6:.1f}" font-size="13" font-weight="bold" '
        f'fill="#111827">{escape(p.box.title)}</text>',
    ]
    for i, text in enumerate(p.box.lines):
        lines.append(
            f'<text x="{p.x + PAD:.1f}" y="{p.y + PAD + 6 + LINE * (i + 1):.1f}" font-size="12" '
            f'fill="#374151">{escape(text)}</text>'
        )
    return lines


def _arrow(layout: _Layout, a: Arrow, x: float) -> list[str]:
    (x1, y1), (x2, y2) = layout.port(a.source, a, False), layout.port(a.target, a, True)
    color = COLORS[a.kind]
    dash = ' stroke-dasharray="5 4"' if a.dashed else ""
    path = f"M{x1:.1f} {y1:.1f}H{x:.1f}V{y2:.1f}H{x2 + 1:.1f}"
    return [
        f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.4"{dash} marker-end="url(#{a.kind})"/>',
        f'<text x="{layout.width + PAD + 12:.1f}" y="{y2 - 3:.1f}" font-size="{LABEL}" '
        f'fill="{color}">{escape(a.label)}</text>',
    ]
