"""Paths: every way by which a change of a meta-parameter comes to the result, through whatever flows.

A path is a list of names, ``w -> L1 -> L0``: the meta-parameter, the levels on the way, the result.  The derivative of
the result is a sum over all walks through the level graph, each a product of what its flows carry; a walk that returns
to a level belongs to the path that is left when the loops are taken out of it.  Meta-parameters with the same paths
are shown together, and a beginning that several paths share is shown once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

from mlc.ir.levels.graph import LevelGraph
from mlc.ir.problem import Flow, Problem

__all__ = ["Path", "paths_of", "text_of", "tree"]

Path: TypeAlias = tuple[str, ...]
_MOST = 60  # lines


def paths_of(program: Problem) -> list[Path]:
    """Every path from a meta-parameter to the result that carries a derivative, by meta-parameter, shortest first."""
    graph = LevelGraph(program)
    return [p for i in program.metas for p in graph.paths(program.inputs[i].name)]


def text_of(path: Sequence[str]) -> str:
    """``w -> L1 -> L0``."""
    return " -> ".join(path)


def tree(program: Problem, *, off: Collection[Path] = (), told: Callable[[Flow], str] = lambda f: "") -> list[str]:
    """Lines of all paths: one line where they do not branch, branches on lines of their own below.

    Args:
        program: With its levels and flows.
        off: Paths that are switched off.
        told: What else to say of a flow.
    """
    ways: dict[tuple[tuple[Path, bool], ...], list[str]] = {}
    by_meta: dict[str, list[Path]] = {}
    for p in paths_of(program):
        by_meta.setdefault(p[0], []).append(p)
    for meta, paths in by_meta.items():
        ways.setdefault(tuple((p[1:], p in off) for p in paths), []).append(meta)
    lines: list[str] = []
    for rest, metas in ways.items():
        lines += _Branches(program, metas[0], dict(rest), told).lines(_names(metas))
    more = len(lines) - _MOST
    return [*lines[:_MOST], f"and {more} more lines"] if more > 0 else lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


class _Branches:
    """The paths of one meta-parameter as a tree; ``ends``: levels behind it, and whether the path is off."""

    def __init__(self, program: Problem, meta: str, ends: dict[Path, bool], told: Callable[[Flow], str]) -> None:
        self.meta, self.ends, self.told = meta, ends, told
        self.titles = {x.name: f"{x.name} {x.declared}".rstrip() for x in program.levels}
        self.flows = {(f.source, f.target): f for f in program.flows if f.kind in ("value", "response")}

    def lines(self, head: str, path: Path = (), pad: str = "") -> Iterator[str]:
        """A line with ``head`` and whatever follows without branching, then the branches."""
        after = self._after(path)
        while len(after) == 1 and path not in self.ends:
            path = (*path, after[0])
            head = f"{head} {self._flow(path)}".lstrip()
            after = self._after(path)
        yield pad + head
        for name in after:
            yield from self.lines(self._flow((*path, name)), (*path, name), pad + "  ")

    def _after(self, path: Path) -> list[str]:
        n = len(path)
        return list(dict.fromkeys(p[n] for p in self.ends if p[:n] == path and len(p) > n))

    def _flow(self, path: Path) -> str:
        """``-> L1 (value: loss)``: the last flow of a path."""
        flow = self.flows.get(((self.meta, *path)[-2], path[-1]))
        said = "" if flow is None else _how(flow, self.told(flow))
        return f"-> {self.titles.get(path[-1], path[-1])}{said}{'  [off]' if self.ends.get(path) else ''}"


def _how(f: Flow, more: str) -> str:
    kind = f.kind if f.kind == "response" or not f.why else f"value: {f.why}"
    return f" ({kind}{', ' * bool(more)}{more})"
