"""Which values leave an inner loop, decided alike for every trip of the loops around it.

An inner loop hands out what is read behind it.  In the last trip of an outer loop that may be more than in the others
(final states, a batch used after training), and then the trips would differ and could not be rolled.  So what leaves
the inner loop in one trip counts as leaving it in all of them.  Linear in the recording.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch._ops import OpOverload

from mlc.ir.core import Eqn, Var

__all__ = ["even_exits"]

Path = tuple[tuple[int, int], ...]


def even_exits(eqns: Sequence[Eqn], results: Sequence[Var], paths: dict[int, Path]) -> dict[Var, set[int]]:
    """Depths (0 is the outermost) of the inner loops that each value leaves in this trip or in another one.

    Args:
        eqns: The recording.
        results: What the program returns.
        paths: Loop instances and iterations around each equation, by its identity.
    """
    if all(len(p) < 2 for p in paths.values()):
        return {}
    shared = _shared(eqns, results, paths)
    keys = _keys(eqns, paths)
    left = {
        (*k, o) for e in eqns for o, v in enumerate(e.outs) if v in shared for k in keys[id(e)][max(shared[v], 1) :]
    }
    out: dict[Var, set[int]] = {}
    for e in eqns:
        for o, v in enumerate(e.outs):
            depths = {d for d, k in enumerate(keys[id(e)]) if d and (*k, o) in left}
            if depths:
                out[v] = depths
    return out


def _shared(eqns: Sequence[Eqn], results: Sequence[Var], paths: dict[int, Path]) -> dict[Var, int]:
    """For each value, how many of its loop instances all of its readers are in."""
    made = {v: paths[id(e)] for e in eqns for v in e.outs}
    out: dict[Var, int] = {v: 0 for v in results}
    for e in eqns:
        reader = paths[id(e)]
        for v in e.inputs:
            home = made.get(v, ())
            n = 0
            while n < len(home) and n < len(reader) and home[n][0] == reader[n][0]:
                n += 1
            if n < len(home):
                out[v] = min(out.get(v, n), n)
    return out


def _keys(eqns: Sequence[Eqn], paths: dict[int, Path]) -> dict[int, list[Any]]:
    """For each equation and depth, its place without the iterations of the loops further out than that."""
    counts: dict[Any, int] = defaultdict(int)
    out: dict[int, list[Any]] = {}
    for e in eqns:
        path = paths[id(e)]
        op: Any = id(e.op) if isinstance(e.op, OpOverload) else type(e.op)
        here = (e.site.key if e.site is not None else None, op)
        counts[(path, *here)] += 1
        n = counts[(path, *here)]
        trips = tuple(i for _, i in path)
        out[id(e)] = [(path[0][0], d, trips[d:], *here, n) for d in range(len(path))]
    return out
