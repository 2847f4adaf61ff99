"""Where everything in a picture stands: boxes nested by indentation, arrows in channels at the right of them.

Every arrow leaves its row at the right edge, runs to a channel of its own, up or down in it, and back; short arrows
get the inner channels.  At a row, arrows to what is above come first, the shortest on top, then arrows to what is
below, the longest on top: so two arrows of one row never cross.  Labels stand in one column with leaders.  Widths
of text are those of :mod:`mlc.view.fonts`.  O(boxes + arrows^2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlc.view.diagram import Arrow, Box, Diagram
from mlc.view.fonts import text_width

__all__ = ["HEAD", "LABEL", "NOTE", "PAD", "SPACE", "TEXT", "Layout", "Placed", "Route", "clipped"]

HEAD, TEXT, NOTE, LABEL = 15.0, 13.0, 12.0, 12.0  # sizes of type
PAD, GAP, TITLE, ROW, STEP = 12.0, 7.0, 30.0, 27.0, 14.0
PORT, CHANNEL, LINE, SPACE = 9.0, 14.0, 18.0, 10.0  # SPACE: between title and note
WIDEST = 430.0  # text of a row, before it is shortened


@dataclass(eq=False)
class Placed:
    """A box with its rectangle and its two texts, shortened to fit."""

    box: Box
    depth: int
    x: float
    y: float
    width: float = 0
    height: float = 0
    title: str = ""
    note: str = ""

    @property
    def right(self) -> float:
        """Right edge."""
        return self.x + self.width

    @property
    def head(self) -> float:
        """Height of the part with the text."""
        return self.height if self.is_row else TITLE

    @property
    def is_row(self) -> bool:
        """Whether it is a row, which arrows may touch anywhere."""
        return self.box.kind != "level"


@dataclass(eq=False)
class Route:
    """An arrow: from and to which height, in which channel, and where its label stands."""

    arrow: Arrow
    start: Placed
    end: Placed
    from_y: float = 0
    to_y: float = 0
    x: float = 0
    label_x: float = 0
    label_y: float = 0

    @property
    def anchor(self) -> float:
        """Where the leader begins: beside the label if the arrow passes there."""
        low, high = sorted((self.from_y, self.to_y))
        room = min(6.0, (high - low) / 2)
        return min(max(self.label_y, low + room), high - room)

    @property
    def middle(self) -> float:
        """Height of the middle of the arrow."""
        return (self.from_y + self.to_y) / 2


def clipped(text: str, size: float, width: float, bold: bool = False) -> str:
    """The text, or as much of it as fits into ``width`` pixels with an ellipsis."""
    if text_width(text, size, bold) <= width:
        return text
    while text and text_width(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip() + "…"


@dataclass
class Layout:
    """A laid-out diagram."""

    diagram: Diagram
    placed: dict[str, Placed] = field(default_factory=dict)
    routes: list[Route] = field(default_factory=list)
    width: float = 0
    height: float = 0

    @staticmethod
    def of(d: Diagram) -> Layout:
        """Lay a diagram out."""
        out = Layout(d)
        ports = _Ports(d)
        inner = _width(d.top, 0)
        bottom = out._place(d.top, 0, PAD, PAD + TITLE - 4, inner, ports)
        for route in ports.routes(out.placed):
            out.routes.append(route)
        out._channels(PAD + inner + 14)
        out._labels(bottom)
        ends = [r.label_x + text_width(r.arrow.label, LABEL) for r in out.routes]
        out.width = (
            max([PAD + inner, PAD + text_width(d.title, HEAD, True) + SPACE + text_width(d.note, NOTE), *ends]) + PAD
        )
        out.height = max([bottom, *[r.label_y + 8 for r in out.routes]]) + PAD
        return out

    def _place(self, box: Box, depth: int, x: float, y: float, width: float, ports: _Ports) -> float:
        """Place a box and what is in it; returns its lower edge."""
        p = self.placed[box.key] = Placed(box, depth, x, y, width)
        room = width - 2 * PAD
        p.title, p.note = _shortened(box, room)
        if p.is_row:
            p.height = max(ROW, PORT * (ports.count(box.key) + 1))
            return y + p.height
        at = y + TITLE
        for b in box.inside:
            nested = b.kind == "level"
            left, right = (STEP, 8.0) if nested else (PAD, PAD)
            at = self._place(b, depth + 1, x + left, at, width - left - right, ports) + GAP
        p.height = at + PAD / 2 - y
        return y + p.height

    def _channels(self, base: float) -> None:
        taken: list[list[tuple[float, float]]] = []
        for r in sorted(self.routes, key=lambda r: (abs(r.from_y - r.to_y), r.from_y)):
            low, high = sorted((r.from_y, r.to_y))
            free = (i for i, rows in enumerate(taken) if all(high < lo - 5 or low > hi + 5 for lo, hi in rows))
            k = next(free, len(taken))
            if k == len(taken):
                taken.append([])
            taken[k].append((low, high))
            r.x = base + CHANNEL * k
        for r in self.routes:
            r.label_x = base + CHANNEL * len(taken) + 14

    def _labels(self, bottom: float) -> None:
        """As near to their anchors as they can be without touching each other."""
        blocks: list[list[Route]] = []
        for r in sorted(self.routes, key=lambda r: (r.middle, r.x)):
            blocks.append([r])
            while len(blocks) > 1 and _top(blocks[-1]) < _top(blocks[-2]) + LINE * len(blocks[-2]):
                last = blocks.pop()
                blocks[-1] += last
        for block in blocks:
            for i, r in enumerate(block):
                r.label_y = _top(block) + LINE * i


def _top(block: list[Route]) -> float:
    """Height of the first label of a block whose labels stand as near to their anchors as possible."""
    middle = sum(r.middle for r in block) / len(block)
    return max(middle - LINE * (len(block) - 1) / 2, PAD + 10)


def _shortened(box: Box, room: float) -> tuple[str, str]:
    """Title and note on one line; the note gives way first, down to 60 pixels."""
    title, note = text_width(box.title, TEXT, True), text_width(box.note, NOTE)
    if title + note + SPACE <= room or not note:
        return clipped(box.title, TEXT, room, bold=True), box.note
    short = clipped(box.title, TEXT, room - min(note, 60.0) - SPACE, bold=True)
    return short, clipped(box.note, NOTE, room - text_width(short, TEXT, True) - SPACE)


def _width(box: Box, depth: int) -> float:
    """Width that a box needs, its nested boxes included."""
    text = text_width(box.title, TEXT, True) + (text_width(box.note, NOTE) + SPACE if box.note else 0)
    own = min(text, WIDEST) + 2 * PAD + 2
    inside = [_width(b, depth + 1) + (STEP + 8 if b.kind == "level" else 2 * PAD) for b in box.inside]
    return max([own, 150.0 if box.kind == "level" else 0.0, *inside])


class _Ports:
    """Where arrows touch rows."""

    def __init__(self, d: Diagram) -> None:
        self.order = {b.key: i for i, b in enumerate(d.top.all())}
        self.arrows = d.arrows
        self.number = {id(a): i for i, a in enumerate(d.arrows)}
        self.at: dict[str, list[tuple[Arrow, bool]]] = {}
        for a in d.arrows:
            self.at.setdefault(a.source, []).append((a, False))
            self.at.setdefault(a.target, []).append((a, True))
        for key, ports in self.at.items():
            ports.sort(key=lambda p, key=key: self._rank(key, *p))  # type: ignore[misc]

    def count(self, key: str) -> int:
        return len(self.at.get(key, ()))

    def _rank(self, key: str, a: Arrow, arriving: bool) -> tuple[int, int, int]:
        far = self.order[a.source if arriving else a.target] - self.order[key]
        if not far:
            return 1, 0, int(arriving)
        turn = self.number[id(a)]  # arrows between the same two rows nest as well
        return (0, -far, -turn) if far < 0 else (1, -far, turn)

    def routes(self, placed: dict[str, Placed]) -> list[Route]:
        found = {id(a): Route(a, placed[a.source], placed[a.target]) for a in self.arrows}
        for key, ports in self.at.items():
            p = placed[key]
            for i, (a, arriving) in enumerate(ports):
                y = p.y + p.head * (i + 1) / (len(ports) + 1)
                if arriving:
                    found[id(a)].to_y = y
                else:
                    found[id(a)].from_y = y
        return list(found.values())
