"""The level graph: meta-parameters and levels as nodes, flows as edges, questions about paths.

Which flows carry a derivative, along which paths a meta-parameter reaches a loss, what could be left out
without changing any hypergradient, and which paths are cut, by which stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from mlc.ir.problem import Flow, Problem

__all__ = ["Cut", "LevelGraph"]


@dataclass(frozen=True)
class Cut:
    """A path from a meta-parameter to the result that a stop cuts.

    Attributes:
        meta: Name of the meta-parameter.
        path: Names on the way, meta-parameter first.
        stop: The flow that is cut; its ``loc`` is the line.
    """

    meta: str
    path: tuple[str, ...]
    stop: Flow

    def __str__(self) -> str:
        where = f" at {self.stop.loc}" if self.stop.loc is not None else ""
        return f"{' -> '.join(self.path)} is cut by {self.stop.why}{where}"


class LevelGraph:
    """Paths between the meta-parameters and the levels of a program.

    Attributes:
        graph: ``networkx.MultiDiGraph``; the edges' ``flow`` is the :class:`~mlc.ir.program.Flow`, the
            nodes' ``role`` is ``"meta"`` or ``"level"``.
    """

    def __init__(self, program: Problem) -> None:
        self.program = program
        self.graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for i in program.metas:
            self.graph.add_node(program.inputs[i].name, role="meta")
        for level in program.levels:
            self.graph.add_node(level.name, role="level")
        for f in program.flows:
            self.graph.add_edge(f.source, f.target, flow=f)
        self._live = self._between(carrying=True)
        self._any = self._between(carrying=False)

    def _between(self, *, carrying: bool) -> nx.DiGraph[str]:
        """Values and responses alone; an entry node per level tells what comes through its gradient.

        What enters a level's loss goes on only if the level's gradient carries a derivative to what it
        trains.
        """
        g: nx.DiGraph[str] = nx.DiGraph()
        g.add_nodes_from(self.graph)
        blocked = {f.source for f in self.program.flows if f.kind == "gradient" and not f.carries}
        for f in self.program.flows:
            if f.source == f.target or f.kind == "gradient" or (carrying and not f.carries):
                continue
            entry = f.target
            if carrying and f.target in blocked and f.kind == "value" and f.why == "loss":
                entry = f"{f.target} (loss)"
            g.add_edge(f.source, entry)
        return g

    @property
    def carrying(self) -> tuple[Flow, ...]:
        """The flows along which a derivative flows."""
        return tuple(f for f in self.program.flows if f.carries)

    def paths(self, meta: str, level: str = "L0") -> list[tuple[str, ...]]:
        """Every path along which the loss of ``level`` depends differentiably on ``meta``, shortest first.

        Each is a tuple of names, ``("lr", "L1", "L0")``.
        """
        found: list[tuple[str, ...]] = []
        for end in (level, f"{level} (loss)"):
            if meta in self._live and end in self._live:
                found += [(*p[:-1], level) for p in nx.all_simple_paths(self._live, meta, end)]
        return sorted(found, key=lambda p: (len(p), p))

    def prunable(self) -> tuple[str, ...]:
        """Levels and meta-parameters that no hypergradient depends on.

        A level must run all the same where its values are used; only its derivatives can be left out.
        """
        useful = nx.ancestors(self._live, "L0") if "L0" in self._live else set()
        return tuple(n for n in self.graph if n != "L0" and n not in useful)

    def cuts(self, meta: str | None = None) -> list[Cut]:
        """Paths from a meta-parameter (None: from any) to the result that a stop cuts."""
        names = [meta] if meta is not None else [self.program.inputs[i].name for i in self.program.metas]
        stops = [f for f in self.program.flows if f.kind == "stop"]
        out: list[Cut] = []
        for name in names:
            for f in stops:
                head = self._path(name, f.source)
                tail = self._path(f.target, "L0")
                if head is not None and tail is not None:
                    out.append(Cut(name, (*head, *tail), f))
        return out

    def _path(self, start: str, end: str) -> list[str] | None:
        try:
            return nx.shortest_path(self._any, start, end)
        except (nx.NetworkXNoPath, nx.NodeNotFound):
            return None
