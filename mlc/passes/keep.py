"""Keep or recompute: which values to hold for later, at what price in seconds per byte.

A later part of the computation demands values of an earlier one.  Each is either kept (it costs its bytes) or made
again (it costs the seconds of its equation, and demands that equation's inputs).  The cheapest choice is a minimum
cut: a project selection problem (Picard 1976) on the graph of equations, solved with Boykov-Kolmogorov through
networkx.  From price 0 (everything demanded is kept) to infinity (only what cannot be made again is) it walks along
the whole trade of memory for time; every choice is exact, as the same operators run on the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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
    demanded = list(dict.fromkeys(demanded))
    costs = _costs(needed_for(eqns, demanded, set()), demanded, keep, redo)
    g: nx.DiGraph[object] = nx.DiGraph()
    g.add_nodes_from(("source", "sink"))
    node = {v: made[v] if c.again else v for v, c in costs.items()}
    for v in demanded:
        g.add_edge("source", node[v])
    seen: set[Var] = set()
    todo = list(demanded)
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        maker, c = made.get(v), costs[v]
        if maker is None or c.seconds is None or c.kept:
            _edge(g, v, "sink", c.price)
            continue
        if not c.again:
            _edge(g, v, maker, c.price)
        if maker not in g or "sink" not in g[maker]:
            _edge(g, maker, "sink", c.seconds)
            for u in maker.inputs:
                g.add_edge(maker, node[u])
                todo.append(u)
    try:
        _, (needed, _) = nx.minimum_cut(g, "source", "sink", flow_func=boykov_kolmogorov)
    except nx.NetworkXUnbounded:
        raise Infeasible from None
    return {v for v in seen if node[v] is v and v in needed and made.get(v) not in needed}


class _Choice(NamedTuple):
    """What is known of a value before the cut.

    Attributes:
        price: Seconds that keeping it costs; None: it cannot be kept.
        seconds: Seconds of its equation; None: it must not run again.
        kept: Keeping costs no more than its equation alone.
        again: Making it, with all that it may need for that, costs no more than keeping it.
    """

    price: float | None
    seconds: float | None
    kept: bool = False
    again: bool = False


def _costs(eqns: Sequence[Eqn], demanded: Sequence[Var], keep: Callable[[Var], float | None],
           redo: Callable[[Eqn], float | None]) -> dict[Var, _Choice]:  # fmt: skip
    """Costs of values; most choices follow from bounds, and only the others need the cut."""
    costs: dict[Var, _Choice] = {}
    most: dict[Var, float] = {}  # an upper bound of what having a value costs
    made = {v for e in eqns for v in e.outs}
    for v in dict.fromkeys((*demanded, *[u for e in eqns for u in e.inputs])):
        if v not in made:
            costs[v] = _Choice(keep(v), None)
            most[v] = _infinite(costs[v].price)
    for e in eqns:
        seconds = redo(e)
        making = math.inf if seconds is None else seconds + sum([most[u] for u in dict.fromkeys(e.inputs)])
        for v in e.outs:
            price = keep(v)
            alone = len(e.outs) == 1 and seconds is not None
            kept = alone and price is not None and price <= seconds  # type: ignore[operator]
            costs[v] = _Choice(price, seconds, kept, alone and not kept and making <= _infinite(price))
            most[v] = min(making, _infinite(price))
    return costs


def _infinite(price: float | None) -> float:
    return math.inf if price is None else price


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
