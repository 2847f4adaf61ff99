"""Scenes of the page: a region as nested groups of operators, with what a reader asks about each.

A scene is made of groups (a level, a loop, a module, a line) that nest, operators that stand in one group each,
and edges between operators.  Derivative operators carry the place of the operator that they come from, so they
stand in its module.  Columns instead of rows: the data is embedded as JSON and compressed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.literals import type_text
from mlc.ir.types import Loc
from mlc.passes.cost.facts import Fact, any_number, op_name, work
from mlc.view.page.crowds import parts_of

__all__ = ["Scene", "Table"]

FLAT = 40  # operators of one region without a module, from which on they are grouped by line
CROWD = 120  # operators of one group, from which on its connected parts become groups


class Table:
    """Values that occur often, each once."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._at: dict[Any, int] = {}

    def add(self, row: Any) -> int:
        """The position of a row."""
        at = self._at.get(row)
        if at is None:
            at = self._at[row] = len(self.rows)
            self.rows.append(row)
        return at


class Scene:
    """One graph to look at.

    Args:
        key: Identifier.
        title: What the reader chooses it by.
        tables: Shared tables ``strings``, ``locs``, ``fates``.
        facts: What is known of each equation.
        place: Group names of an equation inside its region's group; None for its module or line.
    """

    def __init__(self, key: str, title: str, tables: dict[str, Table], facts: dict[Eqn, Fact],
                 place: Callable[[Eqn], tuple[int, tuple[str, ...]] | None] = lambda e: None) -> None:  # fmt: skip
        self.key, self.title, self.tables, self.facts, self.place = key, title, tables, facts, place
        self.groups: list[tuple[int, str, str, str]] = []
        self._group_of: dict[tuple[int, str], int] = {}
        self.columns: dict[str, list[Any]] = {
            k: [] for k in ("op", "group", "out", "bytes", "flops", "work", "times", "loc", "fate", "tag", "reads")
        }
        self.edges: list[int] = []
        self.flows: list[list[Any]] = []
        self.node_of: dict[Eqn, int] = {}
        self._made: dict[Var, int] = {}
        self._names: dict[Var, str] = {}

    # ---- groups

    def group(self, parent: int, title: str, kind: str, tip: str = "") -> int:
        """The group of this title inside ``parent`` (-1: at the top)."""
        key = (parent, f"{kind}:{title}")
        at = self._group_of.get(key)
        if at is None:
            at = self._group_of[key] = len(self.groups)
            self.groups.append((parent, title, kind, tip))
        return at

    def _inside(self, base: int, names: Iterable[tuple[str, str]]) -> int:
        for kind, name in names:
            base = self.group(base, name, kind)
        return base

    # ---- regions

    def name(self, values: Iterable[tuple[Var, str]]) -> None:
        """Names of values that come from outside."""
        self._names.update((v, n) for v, n in values if n)

    def add(self, region: Region, base: int, times: int = 1, locs: dict[Var, Loc] | None = None) -> None:
        """Every equation of a region, bodies of loops as groups."""
        locs = {} if locs is None else locs
        crowded = sum(map(_bare, region.eqns)) > FLAT
        for e in region.eqns:
            loc = e.loc or self._inherited(e, locs)
            if loc is not None:
                locs.update((v, loc) for v in e.outs)
            if isinstance(e.op, Loop):
                self._loop(e, e.op, base, times, loc, locs)
                continue
            placed = self.place(e)
            if placed is not None:
                at = self._inside(placed[0], [("module", n) for n in placed[1]])
            else:
                at = self._inside(base, _names_of(e, loc, crowded))
            self.node(e, at, times, loc)

    def _inherited(self, e: Eqn, locs: dict[Var, Loc]) -> Loc | None:
        """The place of what was computed last among the inputs (sums of derivatives have none of their own)."""
        known = [v for v in e.inputs if v in locs]
        return locs[max(known, key=lambda v: self._made.get(v, -1))] if known else None

    def _loop(self, e: Eqn, op: Loop, base: int, times: int, loc: Loc | None, locs: dict[Var, Loc]) -> None:
        title = f"loop {op.title}".strip()
        while (base, f"loop:{title}") in self._group_of:
            title += "'"
        trips = f"{op.trips} trip{'s' * (op.trips != 1)}" if op.trips is not None else any_number("trips", op.usual)
        what = trips + (", last to first" if op.reverse else "")
        placed = self.place(e)
        inside = placed[0] if placed is not None else self.group(base, title, "loop", what)
        for v, a in zip(op.body.inputs, e.args, strict=True):
            if type(a) is not Var:
                continue
            if a in self._made:
                self._made[v] = self._made[a]
            if a in self._names:
                self._names[v] = self._names[a]
            if a in locs:
                locs[v] = locs[a]
        self.add(op.body, inside, times * op.count, locs)
        for out, v in zip(e.outs, op.body.outputs, strict=True):
            if v in self._made:
                self._made[out] = self._made[v]
            elif v in self._names:
                self._names[out] = self._names[v]

    def node(self, e: Eqn, group: int, times: int, loc: Loc | None) -> None:
        """One operator."""
        at = self.node_of[e] = len(self.columns["op"])
        text, fact = self.tables["strings"].add, self.facts.get(e)
        reads = list(dict.fromkeys(self._names[v] for v in e.inputs if v in self._names))
        row = {
            "op": text(op_name(e)), "group": group, "times": times, "tag": text(e.tag or "forward"),
            "out": text(", ".join(type_text(v.type) for v in e.outs[:4]) + (", ..." if len(e.outs) > 4 else "")),
            "bytes": fact.bytes if fact else 0, "flops": fact.flops if fact else 0,
            "work": round(work(e, fact.flops)) if fact else 0,
            "fate": self.tables["fates"].add((fact.fate.kind, fact.fate.text)) if fact else -1,
            "loc": -1 if loc is None else self.tables["locs"].add((loc.file, loc.line, loc.function, loc.source())),
            "reads": text(", ".join(reads[:6])),
        }  # fmt: skip
        for k, v in row.items():
            self.columns[k].append(v)
        sources = dict.fromkeys(self._made[v] for v in e.inputs if v in self._made)
        self.edges += [x for s in sources for x in (s, at)]
        self._made.update((v, at) for v in e.outs)

    def split_crowds(self) -> None:
        """Give the connected parts of very full groups groups of their own, named by what they read or make."""
        direct: dict[int, list[int]] = {}
        for i, g in enumerate(self.columns["group"]):
            direct.setdefault(g, []).append(i)
        edges = list(zip(self.edges[::2], self.edges[1::2], strict=True))
        for g, nodes in direct.items():
            for k, part in enumerate(parts_of(nodes, edges) if len(nodes) > CROWD else ()):
                inner = self.group(g, f"{self._title(part, self.groups[g][2])} #{k}", "part")
                for i in part:
                    self.columns["group"][i] = inner

    def _title(self, nodes: Sequence[int], kind: str) -> str:
        """A name that an operator reads, else (in a module) the commonest line, else the type of the largest result."""
        text = self.tables["strings"].rows
        named = [
            n for i in nodes for n in text[self.columns["reads"][i]].split(", ") if n and not n.startswith("kept ")
        ]
        if named:
            return str(Counter(named).most_common(1)[0][0])
        places = Counter(at for i in nodes if (at := self.columns["loc"][i]) >= 0)
        if kind == "module" and places:
            return str(self.tables["locs"].rows[places.most_common(1)[0][0]][3])[:48]
        largest = max(nodes, key=lambda i: self.columns["bytes"][i])
        return str(text[self.columns["out"][largest]])

    def data(self) -> dict[str, Any]:
        """For JSON."""
        self.split_crowds()
        return {
            "key": self.key, "title": self.title, "groups": self.groups, "columns": self.columns,
            "edges": self.edges, "flows": self.flows,
        }  # fmt: skip


def _bare(e: Eqn) -> bool:
    return not isinstance(e.op, Loop) and (e.loc is None or not e.loc.module)


def _names_of(e: Eqn, loc: Loc | None, crowded: bool) -> list[tuple[str, str]]:
    """Groups of an equation by its module, else (in a crowd) by its line."""
    if loc is not None and loc.module:
        return [("module", n) for n in loc.module.split(".")]
    if loc is None or not crowded:
        return []
    return [("line", f"line {loc.line}: {loc.source()[:60]}".rstrip(": "))]
