"""Programs, plans and reports in notebooks: text, the level graph as SVG, the page in a sandboxed frame.

The frame may run the page's own script and nothing else: no access to the notebook, no network.
"""

from __future__ import annotations

from html import escape
from typing import Any

from mlc.compiled.report import Report
from mlc.draw import program_of
from mlc.ir.program import Program
from mlc.shown import HOW
from mlc.view.diagram import diagram_of
from mlc.view.page import content, html
from mlc.view.plan import Plan
from mlc.view.svg import to_svg

__all__ = ["Frame"]


class Frame:
    """A page in a frame; notebooks show it, elsewhere it says how to get the page."""

    def __init__(self, page: str, height: int) -> None:
        self.page = page
        self.height = height

    def __repr__(self) -> str:
        return f"a page of {len(self.page) // 1024} KiB for a notebook; mlc.draw(plan, 'page.html') writes it to a file"

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.height}px;border:1px solid #8884;border-radius:6px"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(self.page)}"></iframe>'


def frame(x: Program | Plan | Report, height: int) -> Frame:
    """The page of an object, a report's with what it measured."""
    subject, measured = (x.plan, x.measured) if isinstance(x, Report) else (x, None)
    assert subject is not None
    program = program_of(subject)
    return Frame(html(content(program, subject if isinstance(subject, Plan) else None, measured)), height)


def bundle(x: Program | Plan | Report) -> dict[str, str]:
    """Text, and the picture when the program is known."""
    text = x.explain() if isinstance(x, Plan) else str(x)
    out: dict[str, Any] = {"text/plain": text}
    subject = x.plan if isinstance(x, Report) else x
    if subject is not None and (isinstance(subject, Program) or subject.bound is not None):
        plan = subject if isinstance(subject, Plan) else None
        out["image/svg+xml"] = to_svg(diagram_of(program_of(subject), plan))
    return out


HOW.update(bundle=bundle, frame=frame)
