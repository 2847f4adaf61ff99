"""Switching paths off: which flows to cut so that the gradient loses these paths and nothing else.

A flow that is on no cycle of the level graph, and whose every path is switched off, can be cut: all walks through it
belong to those paths.  When each of the paths goes through such a flow, the gradient with these flows cut is exactly
the gradient without the paths.  Otherwise it shares every flow with a path that stays on, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, TypeAlias

import networkx as nx

from mlc.errors import PlanError
from mlc.ir.levels.paths import Path, paths_of, text_of
from mlc.ir.lowered.decision import Decision
from mlc.ir.program import Program

__all__ = ["check_paths", "cut_flows", "decided_paths", "switched_off"]

Edge: TypeAlias = tuple[str, str]
_USE = 'write paths={"w -> L1 -> L0": False}; print(program) and plan.explain() list the paths'


def check_paths(paths: Any) -> None:
    """Refuse what is no dict of switches.

    Raises:
        PlanError: naming what is wrong.
    """
    if paths is None:
        return
    if not isinstance(paths, Mapping):
        raise PlanError(f"paths={paths!r}", advice=_USE)
    for name, on in paths.items():
        if not isinstance(name, str) or not isinstance(on, bool):
            raise PlanError(f"paths[{name!r}]={on!r}", advice=_USE)


def switched_off(program: Program, paths: Mapping[str, bool] | None, stop: str) -> tuple[str, ...]:
    """The paths that are off, as ``plan.explain()`` writes them.

    Args:
        program: The program.
        paths: False (off) or True by name of a path; later entries go before earlier ones. Each part is a name, a
            declared name of a level, or a pattern with ``*`` for one of these.
        stop: Meaning of ``stop_gradient``.

    Raises:
        PlanError: for a name that is no path, and where nothing would be left.
    """
    check_paths(paths)
    every = paths_of(program)
    off: dict[Path, bool] = {}
    for name, on in (paths or {}).items():
        found = [p for p in every if _matches(program, name, p)]
        if not found:
            there = ", ".join(text_of(p) for p in every[:8]) + (", ..." if len(every) > 8 else "")
            raise PlanError(f"paths names {name!r}, which is no path of this program", loc=program.loc,
                            advice=f"there are {there}" if every else "it has none")  # fmt: skip
        off.update((p, not on) for p in found)
    gone = [p for p in every if off.get(p)]
    if not gone:
        return ()
    if len(gone) == len(every):
        raise PlanError("paths switches every path off: no gradient is left", loc=program.loc,
                        advice="leave one of them on")  # fmt: skip
    if stop == "inner":
        raise PlanError('paths= beside stop_gradient="inner": cuts that only some gradients see are no flows',
                        loc=program.loc, advice='use stop_gradient="all"')  # fmt: skip
    names = tuple(text_of(p) for p in gone)
    cut_flows(program, names)
    return names


def _matches(program: Program, name: str, path: Path) -> bool:
    parts = [x.strip() for x in name.split("->")]
    declared = {x.name: x.declared for x in program.levels}
    return len(parts) == len(path) and all(
        any(n and (n == part or fnmatchcase(n, part)) for n in (x, declared.get(x, "")))
        for part, x in zip(parts, path, strict=True)
    )


def cut_flows(program: Program, off: Sequence[str]) -> frozenset[Edge]:
    """The flows to cut, as (source, target), so that exactly these paths are off.

    Raises:
        PlanError: where one of them has no flow of its own, naming a path that shares them.
    """
    every = paths_of(program)
    gone = {p for p in every if text_of(p) in off}
    staying = {e for p in every if p not in gone for e in pairwise(p)}
    cycles = _cycles(program)
    own = {e for p in gone for e in pairwise(p) if e not in staying and (e[0], e[1]) not in cycles}
    for p in gone:
        if not any(e in own for e in pairwise(p)):
            other = next((q for q in every if q not in gone and set(pairwise(q)) & set(pairwise(p))), None)
            shares = "every flow of it is on a cycle of levels" if other is None else (
                f"it shares its flows with {text_of(other)}, among others, which stays on"
            )  # fmt: skip
            raise PlanError(
                f"the path {text_of(p)} cannot be switched off alone: {shares}", loc=program.loc,
                advice="switch off those, too, or compile once for each meta-parameter",
            )  # fmt: skip
    return frozenset(own)


def _cycles(program: Program) -> set[Edge]:
    """Flows between levels that depend on each other."""
    g: Any = nx.DiGraph()
    g.add_edges_from((f.source, f.target) for f in program.flows if f.kind in ("value", "response"))
    home = {n: k for k, part in enumerate(nx.strongly_connected_components(g)) for n in part}
    return {(a, b) for a, b in g.edges if home[a] == home[b]}


def decided_paths(program: Program, off: Sequence[str]) -> list[Decision]:
    """A decision for every path that is off."""
    cut = cut_flows(program, off) if off else ()
    out = []
    for p in paths_of(program):
        if text_of(p) in off:
            at = next(e for e in pairwise(p) if e in cut)
            reason = f"asked for: nothing passes from {at[0]} to {at[1]}"
            out.append(Decision(subject=f"path {text_of(p)}", choice="off", reason=reason, runner_up="on: exact"))
    return out
