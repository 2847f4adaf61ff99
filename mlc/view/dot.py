"""A diagram in Graphviz's language, and laid out by Graphviz's ``dot`` where pygraphviz is installed.

Its layout puts what flows from where to where first and nesting second, the other way round than
:mod:`mlc.view.layout`; long labels stand on their arrows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlc.errors import MlcError
from mlc.view.diagram import Box, Diagram
from mlc.view.fonts import FAMILY
from mlc.view.svg import COLORS, WIDTHS

__all__ = ["dot_svg", "to_dot"]

_PAPER = {"level": "#f5f9fc", "meta": "#f7ecf4"}


def to_dot(d: Diagram) -> str:
    """The diagram as Graphviz text."""
    lines = [
        f"digraph {_quoted(d.title)} {{",
        "  node [shape=box, fontname=Helvetica]; edge [fontname=Helvetica]; graph [fontname=Helvetica];",
        *_box(d.top, "  "),
    ]
    for a in d.arrows:
        style = "dashed" if a.dashed else "solid"
        color = COLORS[a.kind]
        ink = f'color="{color}", fontcolor="{color}", penwidth={WIDTHS[a.kind]:g}'
        lines.append(f"  {a.source} -> {a.target} [label={_quoted(a.label)}, style={style}, {ink}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    """A string of the language, which knows no escapes of characters."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _box(b: Box, pad: str) -> Iterator[str]:
    if b.kind != "level":
        fill = f', style=filled, fillcolor="{_PAPER["meta"]}"' if b.kind == "meta" else ""
        yield f"{pad}{b.key} [label={_quoted(chr(10).join(t for t in (b.title, b.note) if t))}{fill}];"
        return
    yield f"{pad}subgraph cluster_{b.key} {{"
    yield f"{pad}  label={_quoted(' '.join([b.title, b.note]).strip())}; labeljust=l; style=rounded;"
    for x in b.inside:
        yield from _box(x, pad + "  ")
    yield f"{pad}}}"


def dot_svg(d: Diagram) -> str:
    """The SVG document that Graphviz makes of the diagram.

    Raises:
        MlcError: when pygraphviz is not installed.
    """
    try:
        from pygraphviz import AGraph
    except ImportError:
        raise MlcError("layout by dot needs pygraphviz", advice="pip install 'mlc[draw]', or leave dot out") from None
    graph = AGraph(string=to_dot(d))
    title = " · ".join(t for t in (d.title, d.note) if t)
    graph.graph_attr.update(label=title, labelloc="t", fontsize="14", nodesep="0.3", ranksep="0.45", color="#a9bdd0")
    graph.node_attr.update(fontsize="13", height="0.4", margin="0.14,0.06", color="#a9bdd0")
    graph.edge_attr.update(fontsize="12", arrowsize="0.7")
    svg: str = graph.draw(format="svg", prog="dot").decode()
    svg = re.sub('font-family="[^"]*"', f'font-family="{FAMILY}, Helvetica, Arial, sans-serif"', svg)
    return re.sub(r'<svg width="(\d+)pt" height="(\d+)pt"', r'<svg width="\1" height="\2"', svg, count=1)
