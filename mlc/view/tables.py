"""Tables and lines of the explanations; drawn with rich, in colour only where the output is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlc.ir.program import Flow

__all__ = ["bundle", "names_text", "printed", "table"]

WIDTH = 120
NUMBERS = {
    "trips",
    "state",
    "time",
    "memory",
    "before",
    "after",
    "change",
    "ops",
    "flops",
    "moved",
    "peak",
    "share",
    "runs",
}


def printed(*parts: object) -> str:
    """Text and tables as lines: coloured and as wide as the terminal, or plain and WIDTH wide."""
    terminal = sys.stdout.isatty()
    out = StringIO()
    console = Console(
        file=out,
        force_terminal=terminal,
        width=None if terminal else WIDTH,
        highlight=False,
        legacy_windows=False,
    )
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns in which nothing stands."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for c in (columns[i] for i in kept):
        made.add_column(c, justify="right" if c in NUMBERS else "left")
    for row in rows:
        made.add_row(*[Text(row[i]) for i in kept])
    return made


def bundle(flows: Iterable[Flow]) -> list[tuple[list[str], Flow]]:
    """Flows that differ in their source only, together: ``(sources, one of them)``."""
    found: dict[tuple[object, ...], tuple[list[str], Flow]] = {}
    for f in flows:
        key = (f.kind, f.target, f.carries, f.why, str(f.loc), f.source if f.kind == "gradient" else "")
        found.setdefault(key, ([], f))[0].append(f.source)
    return list(found.values())


def names_text(names: Sequence[str], most: int = 2) -> str:
    """``a, b and 3 more``."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
