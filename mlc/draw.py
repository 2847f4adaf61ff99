"""Pictures of programs and plans: levels as nested boxes with what they train, flows as typed arrows.

``.mmd`` (Mermaid) and ``.dot`` (Graphviz) are text for other tools; ``.svg`` is laid out here, ``.png`` is rendered
from it by resvg with the font of :mod:`mlc.view.fonts`, and ``.html`` is the page of :mod:`mlc.view.page`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from mlc.errors import MlcError, PlanError
from mlc.ir.program import Program
from mlc.view.diagram import Box, Diagram, diagram_of
from mlc.view.dot import dot_svg, to_dot
from mlc.view.fonts import FAMILY, font_files
from mlc.view.modelexplorer import graphs_of
from mlc.view.page import Measured, content, html
from mlc.view.plan import Plan
from mlc.view.svg import COLORS, to_svg

__all__ = ["draw", "program_of"]


def draw(
    obj: Program | Plan, path: str | Path, *, sweep: Sequence[Plan] = (), measured: Measured | None = None,
    layout: str = "levels",
) -> Path:  # fmt: skip
    """Draw the levels and flows of a program.

    Args:
        obj: A program, or a plan that was made in this process (a plan from a file has no program to draw).
        path: Where to write; the suffix says what: ``.svg``, ``.png``, ``.html``, ``.dot`` or ``.mmd``;
            ``.graph.json`` for Model Explorer.
        sweep: For ``.html``: plans of the program under several budgets, drawn as a time-memory curve.
        measured: For ``.html``: what a run measured (``report.measured``), drawn over what was predicted.
        layout: Of ``.svg`` and ``.png``: ``"levels"``, boxes one under the other as levels nest; or ``"dot"``,
            Graphviz's: along the flows, with labels on the arrows (needs ``mlc[draw]``).

    Returns:
        The path.

    Raises:
        PlanError: for a plan without its program.
        MlcError: for another suffix or layout, or when a renderer is missing.
    """
    path = Path(path)
    if layout not in ("levels", "dot"):
        raise MlcError(f"there is no layout {layout!r}", advice="levels or dot")
    program, plan = program_of(obj), obj if isinstance(obj, Plan) else None
    suffix = path.suffix.lower()
    if layout == "dot" and suffix not in _BY_DOT:
        raise MlcError(f"dot lays out pictures, not {path.name}", advice=f"use {' or '.join(_BY_DOT)}")
    if path.name.lower().endswith(".graph.json"):
        data: str | bytes = json.dumps(graphs_of(content(program, plan)))
    elif suffix == ".html":
        data = html(content(program, plan, measured, sweep))
    elif suffix in _WRITERS:
        data = (_BY_DOT if layout == "dot" else _WRITERS)[suffix](diagram_of(program, plan))
    else:
        known = ", ".join([*_WRITERS, ".html", ".graph.json"])
        raise MlcError(f"cannot draw {path.suffix or 'a file without suffix'}", advice=f"use {known}")
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def program_of(obj: Program | Plan) -> Program:
    """The program that is meant.

    Raises:
        PlanError: for a plan without its program.
        MlcError: for anything else.
    """
    if isinstance(obj, Program):
        return obj
    if isinstance(obj, Plan):
        if obj.bound is None:
            raise PlanError(
                "this plan has no program to draw",
                advice="draw the program, or load the plan with it: mlc.Plan.load(path, program)",
            )
        return obj.bound
    raise MlcError(f"cannot draw a {type(obj).__name__}", advice="pass a Program (cf.program) or a Plan (cf.plan)")


# ---- formats


def _mermaid(d: Diagram) -> str:
    def text(*lines: str) -> str:
        return '"' + "<br/>".join(escape(s, quote=False).replace('"', "#quot;") for s in lines if s) + '"'

    def box(b: Box, pad: str) -> Iterator[str]:
        if b.kind != "level":
            yield f"{pad}{b.key}[{text(b.title, b.note)}]"
            return
        yield f"{pad}subgraph {b.key}[{text(' '.join([b.title, b.note]).strip())}]"
        for x in b.inside:
            yield from box(x, pad + "  ")
        yield f"{pad}end"

    lines = ["---", f"title: {json.dumps(d.title)}", "---", "flowchart TB", *box(d.top, "  ")]
    for i, a in enumerate(d.arrows):
        lines.append(f"  {a.source} {'-.->' if a.dashed else '-->'}|{text(a.label)}| {a.target}")
        lines.append(f"  linkStyle {i} stroke:{COLORS[a.kind]}")
    return "\n".join(lines) + "\n"


def _png(d: Diagram) -> bytes:
    return _rendered(to_svg(d, "light"))


def _rendered(svg: str) -> bytes:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise MlcError("drawing .png needs resvg-py", advice="pip install 'mlc[draw]', or draw an .svg") from None
    return bytes(
        svg_to_bytes(
            svg_string=svg, zoom=2, skip_system_fonts=True, font_files=font_files(), font_family=FAMILY,
        )
    )  # fmt: skip


_WRITERS: dict[str, Callable[[Diagram], str | bytes]] = {
    ".svg": to_svg, ".png": _png, ".dot": to_dot, ".mmd": _mermaid,
}  # fmt: skip
_BY_DOT: dict[str, Callable[[Diagram], str | bytes]] = {
    ".svg": dot_svg, ".png": lambda d: _rendered(dot_svg(d)),
}  # fmt: skip
