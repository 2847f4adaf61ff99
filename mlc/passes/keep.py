"""Keep or recompute: which values to hold for later, at what price in seconds per byte.

A later part of the computation demands values of an earlier one.  Each is either kept (it costs its bytes) or made
again (it costs the seconds of its equation, and demands that equation's inputs).  The cheapest choice is a minimum
cut: a project selection problem (Picard 1976) on the graph of equations, solved with Boykov-Kolmogorov through
networkx.  From price 0 (everything demanded is kept) to infinity (only what cannot be made again is) it walks along
the whole trade of memory for time; every choice is exact, as the same operators run on the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

from mlc.ir.core import Eqn, Var

__all__ = ["Infeasible", "choose", "needed_for"]

_SCALE = 1e12  # capacities are integers: picoseconds


class Infeasible(Exception):
    """A demanded value can be neither kept nor made again."""


def choose(eqns: Sequence[Eqn], demanded: Iterable[Var], keep: Callable[[Var], float | None],
           redo: Callable[[Eqn], float | None]) -> set[Var]:  # fmt: skip
    """Values to keep.

    Args:
        eqns: The earlier part, in order.
        demanded: Values that the later part reads.
        keep: Seconds that keeping a value is worth avoiding (price times bytes); None: it cannot be kept.
        redo: Seconds of running an equation again; None: it must not.

    Returns:
        The values kept (equations' results and inputs alike); everything else demanded follows from them.

    Raises:
        Infeasible: when there is no choice.
    """
    made = {v: e for e in eqns for v in e.outs}
    g: nx.DiGraph[object] = nx.DiGraph()
    g.add_nodes_from(("source", "sink"))
    seen: set[Var] = set()
    todo = list(dict.fromkeys(demanded))
    for v in todo:
        g.add_edge("source", v)
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        price = keep(v)
        maker = made.get(v)
        seconds = redo(maker) if maker is not None else None
        if maker is None or seconds is None:
            _edge(g, v, "sink", price)
            continue
        _edge(g, v, maker, price)
        if maker not in g or "sink" not in g[maker]:
            _edge(g, maker, "sink", seconds)
            for u in maker.inputs:
                g.add_edge(maker, u)
                todo.append(u)
    try:
        _, (needed, _) = nx.minimum_cut(g, "source", "sink", flow_func=boykov_kolmogorov)
    except nx.NetworkXUnbounded:
        raise Infeasible from None
    return {v for v in seen if v in needed and made.get(v) not in needed}


def _edge(g: nx.DiGraph[object], a: object, b: object, seconds: float | None) -> None:
    if seconds is None:
        g.add_edge(a, b)
    else:
        g.add_edge(a, b, capacity=max(int(seconds * _SCALE), 1))


def needed_for(eqns: Sequence[Eqn], demanded: Iterable[Var], kept: set[Var]) -> list[Eqn]:
    """The equations that make ``demanded`` from ``kept``, in order."""
    need = {v for v in demanded if v not in kept}
    out = []
    for e in reversed(eqns):
        if any(v in need for v in e.outs):
            out.append(e)
            need.update(v for v in e.inputs if v not in kept)
    return out[::-1]
