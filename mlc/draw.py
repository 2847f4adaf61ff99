"""Pictures of programs and plans: levels as nested boxes with what they train, flows as typed arrows.

``.mmd`` (Mermaid) and ``.dot`` (Graphviz) are text for other tools; ``.svg`` is laid out here, ``.html`` is
a page around it, and ``.png`` is rendered from it by resvg.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from mlc.diagram import Box, Diagram, diagram_of
from mlc.errors import MlcError, PlanError
from mlc.ir.program import Program
from mlc.passes.plan import Plan
from mlc.svg import COLORS, to_svg

__all__ = ["draw"]


def draw(obj: Program | Plan, path: str | Path) -> Path:
    """Draw the levels and flows of a program.

    Args:
        obj: A program, or a plan that was made in this process (a plan from a file has no program to draw).
        path: Where to write; the suffix says what: ``.svg``, ``.png``, ``.html``, ``.dot`` or ``.mmd``.

    Returns:
        The path.

    Raises:
        PlanError: for a plan without its program.
        MlcError: for another suffix, or when a renderer is missing.
    """
    path = Path(path)
    program = _program(obj)
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise MlcError(f"cannot draw {path.suffix or 'a file without suffix'}", advice=f"use {', '.join(_WRITERS)}")
    data = write(diagram_of(program))
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def _program(obj: Program | Plan) -> Program:
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
    def text(s: str) -> str:
        return '"' + escape(s, quote=False).replace('"', "#quot;") + '"'

    def box(b: Box, pad: str) -> Iterator[str]:
        node = f"{pad}{b.key}[{text('<br/>'.join([b.title, *b.lines]) if b.meta else b.title)}]"
        if b.meta:
            yield node.replace("&lt;br/&gt;", "<br/>")
            return
        yield f"{pad}subgraph {b.key}_box[{text(', '.join(b.lines) or ' ')}]"
        yield f"  {node}"
        for x in b.inside:
            yield from box(x, pad + "  ")
        yield f"{pad}end"

    lines = ["---", f"title: {json.dumps(d.title)}", "---", "flowchart TB", *box(d.top, "  ")]
    for i, a in enumerate(d.arrows):
        lines.append(f"  {a.source} {'-.->' if a.dashed else '-->'}|{text(a.label)}| {a.target}")
        lines.append(f"  linkStyle {i} stroke:{COLORS[a.kind]}")
    return "\n".join(lines) + "\n"


def _dot(d: Diagram) -> str:
    def box(b: Box, pad: str) -> Iterator[str]:
        if b.meta:
            yield f'{pad}{b.key} [label={json.dumps(b.title)}, style=filled, fillcolor="#fff8e6"];'
            return
        yield f"{pad}subgraph cluster_{b.key} {{"
        yield f"{pad}  label={json.dumps(b.title)}; labeljust=l; style=rounded;"
        yield f"{pad}  {b.key} [label={json.dumps(chr(10).join(b.lines) or 'result')}];"
        for x in b.inside:
            yield from box(x, pad + "  ")
        yield f"{pad}}}"

    lines = [
        f"digraph {json.dumps(d.title)} {{",
        "  node [shape=box, fontname=Helvetica];",
        *box(d.top, "  "),
    ]
    for a in d.arrows:
        style = "dashed" if a.dashed else "solid"
        color = COLORS[a.kind]
        what = f'label={json.dumps(a.label)}, style={style}, color="{color}", fontcolor="{color}"'
        lines.append(f"  {a.source} -> {a.target} [{what}];")
    return "\n".join([*lines, "}"]) + "\n"


def _html(d: Diagram) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(d.title)}</title>\n<style>body {{ margin: 2rem; }}"
        " svg { max-width: 100%; height: auto; }"
        f"</style>\n</head>\n<body>\n{to_svg(d)}</body>\n</html>\n"
    )


def _png(d: Diagram) -> bytes:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise MlcError("drawing .png needs resvg-py", advice="pip install 'mlc[draw]', or draw an .svg") from None
    return bytes(svg_to_bytes(svg_string=to_svg(d), zoom=2))


_WRITERS: dict[str, Callable[[Diagram], str | bytes]] = {
    ".svg": to_svg, ".png": _png, ".html": _html, ".dot": _dot, ".mmd": _mermaid,
}  # fmt: skip
