"""A laid-out diagram as SVG, light or dark as the reader's system is, legible without colour.

Kinds of flows differ in width as well as colour, and a flow without derivative is dashed.  Colours are those of
Okabe and Ito, darkened or lightened until text in them has contrast on its ground.
"""

from __future__ import annotations

from html import escape

from mlc.view.diagram import Diagram
from mlc.view.fonts import FAMILY, text_width
from mlc.view.layout import HEAD, LABEL, NOTE, PAD, SPACE, TEXT, Layout, Placed, Route

__all__ = ["COLORS", "WIDTHS", "to_svg"]

COLORS = {"value": "#424a53", "response": "#0069a6", "gradient": "#00694f", "stop": "#b34700"}
DARK = {"value": "#b1bac4", "response": "#56b4e9", "gradient": "#3fc79a", "stop": "#f0883e"}
WIDTHS = {"value": 1.3, "response": 3.0, "gradient": 2.0, "stop": 1.6}
_INKS = ("back", "text", "note", "edge", "row", "meta")
_LIGHT_INK = ("#ffffff", "#1f2328", "#57606a", "#a9bdd0", "#ffffff", "#a3568c")
_DARK_INK = ("#0d1117", "#e6edf3", "#9aa4af", "#3c4c5c", "#0d1117", "#d18bbd")
_LIGHT_FILLS = ("#f5f9fc", "#e8f1f8", "#dbe8f3", "#cfe0ee")
_DARK_FILLS = ("#131a22", "#19242f", "#1f2e3c", "#263a4b")


def to_svg(d: Diagram, theme: str = "auto") -> str:
    """The SVG document.

    Args:
        d: What to draw.
        theme: ``"light"``, ``"dark"``, or ``"auto"``: as the reader's system prefers.
    """
    layout = Layout.of(d)
    w, h = f"{layout.width:.0f}", f"{layout.height:.0f}"
    after_title = PAD + text_width(d.title, HEAD, bold=True) + SPACE
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" '
        f'role="img" aria-label="levels and flows of {escape(d.title)}" '
        f'font-family="{FAMILY}, Arial, Helvetica, Liberation Sans, sans-serif">',
        f"<style>{_style(theme)}</style>",
        f'<rect class="back" width="{w}" height="{h}"/>',
        f'<text class="title" x="{PAD:g}" y="{PAD + 13:g}">{escape(d.title)}</text>',
        f'<text class="note" x="{after_title:.1f}" y="{PAD + 13:g}">{escape(d.note)}</text>',
        *[line for p in layout.placed.values() for line in _box(p)],
        *[_line(r) for r in layout.routes],
        *[line for r in layout.routes for line in _label(r)],
        "</svg>",
    ]) + "\n"  # fmt: skip


def _style(theme: str) -> str:
    fixed = (
        f".title{{font-size:{HEAD:g}px;font-weight:bold}}.name{{font-size:{TEXT:g}px;font-weight:bold}}"
        f".note{{font-size:{NOTE:g}px}}.label{{font-size:{LABEL:g}px}}.flow{{fill:none}}.cut{{stroke-dasharray:5 4}}"
        ".leader{fill:none;stroke-width:.8;stroke-opacity:.55}.more{stroke-dasharray:3 3}"
    )
    light, dark = _colours(COLORS, _LIGHT_INK, _LIGHT_FILLS), _colours(DARK, _DARK_INK, _DARK_FILLS)
    if theme == "auto":
        return f"{fixed}{light}@media (prefers-color-scheme:dark){{{dark}}}"
    return fixed + (dark if theme == "dark" else light)


def _colours(flows: dict[str, str], inks: tuple[str, ...], fills: tuple[str, ...]) -> str:
    ink = dict(zip(_INKS, inks, strict=True))
    rules = [f".back{{fill:{ink['back']}}}.title,.name{{fill:{ink['text']}}}.note{{fill:{ink['note']}}}"]
    rules.append(f".box{{stroke:{ink['edge']}}}.row{{fill:{ink['row']}}}.bar{{fill:{ink['meta']}}}")
    rules += [f".depth{i}{{fill:{c}}}" for i, c in enumerate(fills)]
    for kind, c in flows.items():
        rules.append(
            f".{kind}{{stroke:{c};stroke-width:{WIDTHS[kind]:g}}}.{kind}-ink{{fill:{c}}}.{kind}-leader{{stroke:{c}}}"
        )
    return "".join(rules)


def _box(p: Placed) -> list[str]:
    kind = "row" if p.is_row else f"depth{min(p.depth, len(_LIGHT_FILLS) - 1)}"
    more = " more" if p.box.kind == "more" else ""
    lines = [
        f'<rect class="box {kind}{more}" data-key="{p.box.key}" data-kind="{p.box.kind}" x="{p.x:.1f}" y="{p.y:.1f}" '
        f'width="{p.width:.1f}" height="{p.height:.1f}" rx="4"/>'
    ]
    if p.box.kind == "meta":
        lines.append(f'<rect class="bar" x="{p.x:.1f}" y="{p.y + 3:.1f}" width="4" height="{p.height - 6:.1f}"/>')
    y = p.y + p.head / 2 + 4.5
    tip = f"<title>{escape(' '.join([p.box.title, p.box.note]).strip())}</title>"
    lines.append(f'<text class="name" x="{p.x + PAD:.1f}" y="{y:.1f}">{escape(p.title)}{tip}</text>')
    if p.note:
        x = p.x + PAD + text_width(p.title, TEXT, bold=True) + SPACE
        lines.append(f'<text class="note" x="{x:.1f}" y="{y:.1f}">{escape(p.note)}</text>')
    return lines


def _line(r: Route) -> str:
    a = r.arrow
    x1, x2, radius = r.start.right, r.end.right, 4.0
    down = 1 if r.to_y > r.from_y else -1
    bend = min(radius, abs(r.to_y - r.from_y) / 2)
    path = (
        f"M{x1:.1f} {r.from_y:.1f}H{r.x - bend:.1f}Q{r.x:.1f} {r.from_y:.1f} {r.x:.1f} {r.from_y + down * bend:.1f}"
        f"V{r.to_y - down * bend:.1f}Q{r.x:.1f} {r.to_y:.1f} {r.x - bend:.1f} {r.to_y:.1f}H{x2 + 7:.1f}"
    )
    tip = f"<title>{escape(f'{a.label}: {a.detail}' if a.detail else a.label)}</title>"
    head = f"M{x2 + 1:.1f} {r.to_y:.1f}l8 -4v8z"
    return (
        f'<path class="flow {a.kind}{" cut" if a.dashed else ""}" data-from="{a.source}" data-to="{a.target}" '
        f'd="{path}">{tip}</path><path class="{a.kind}-ink head" d="{head}"/>'
    )


def _label(r: Route) -> list[str]:
    a = r.arrow
    leader = f"M{r.x:.1f} {r.anchor:.1f}H{r.label_x - 10:.1f}L{r.label_x - 3:.1f} {r.label_y:.1f}"
    return [
        f'<circle class="{a.kind}-ink" cx="{r.x:.1f}" cy="{r.anchor:.1f}" r="2.2"/>',
        f'<path class="leader {a.kind}-leader" d="{leader}"/>',
        f'<text class="label {a.kind}-ink" x="{r.label_x:.1f}" y="{r.label_y + 4:.1f}">{escape(a.label)}</text>',
    ]
