"""Keep or recompute: which values to hold for later, at what price in seconds per byte.

A later part of the computation demands values of an earlier one.  Each is either kept (it costs its bytes) or made
again (it costs the seconds of its equation, and demands that equation's inputs).  The cheapest choice is a minimum
cut: a project selection problem (Picard 1976) on the graph of equations, solved by maximum flow (Dinic's,
from SciPy).  From price 0 (everything demanded is kept) to infinity (only what cannot be made again is) it walks along
the whole trade of memory for time; every choice is exact, as the same operators run on the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from mlc.ir.core import Eqn, Var

__all__ = ["Infeasible", "choose", "needed_for"]

_MOST = 2**30  # capacities are integers of 32 bits; this is that of all limited edges together


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
    node = {v: made[v] if c.again else v for v, c in costs.items()}
    net = _Network()
    for v in demanded:
        net.edge(_SOURCE, node[v], None)
    seen: set[Var] = set()
    done: set[Eqn] = set()
    todo = list(demanded)
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        maker, c = made.get(v), costs[v]
        if maker is None or c.seconds is None or c.kept:
            net.edge(v, _SINK, c.price)
            continue
        if not c.again:
            net.edge(v, maker, c.price)
        if maker not in done:
            done.add(maker)
            net.edge(maker, _SINK, c.seconds)
            for u in dict.fromkeys(maker.inputs):
                net.edge(maker, node[u], None)
                todo.append(u)
    needed = net.cut()
    return {v for v in seen if node[v] is v and v in needed and made.get(v) not in needed}


_SOURCE, _SINK = "source", "sink"


class _Network:
    """A flow network whose edges are seconds; None is without limit."""

    def __init__(self) -> None:
        self.index: dict[object, int] = {_SOURCE: 0, _SINK: 1}
        self.tails: list[int] = []
        self.heads: list[int] = []
        self.seconds: list[float] = []

    def edge(self, a: object, b: object, seconds: float | None) -> None:
        """An edge between two nodes that have none yet."""
        self.tails.append(self.index.setdefault(a, len(self.index)))
        self.heads.append(self.index.setdefault(b, len(self.index)))
        self.seconds.append(math.inf if seconds is None else seconds)

    def cut(self) -> set[object]:
        """Nodes on the source's side of a minimum cut.

        Raises:
            Infeasible: when every cut has an edge without limit.
        """
        n = len(self.index)
        seconds = np.array(self.seconds)
        finite = np.isfinite(seconds)
        scale = _MOST / max(float(seconds[finite].sum()), 1e-30)
        limit = np.full(len(seconds), _MOST + _MOST // 2, np.int32)
        limit[finite] = np.maximum(seconds[finite] * scale, 1).astype(np.int32)
        graph = csr_array((limit, (self.tails, self.heads)), shape=(n, n))
        result = maximum_flow(graph, 0, 1)
        if result.flow_value > _MOST + len(seconds):
            raise Infeasible
        left = graph - result.flow
        left.eliminate_zeros()
        reached = breadth_first_order(left, 0, return_predecessors=False)
        nodes = list(self.index)
        return {nodes[i] for i in reached}


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


def needed_for(eqns: Sequence[Eqn], demanded: Iterable[Var], kept: set[Var]) -> list[Eqn]:
    """The equations that make ``demanded`` from ``kept``, in order."""
    need = {v for v in demanded if v not in kept}
    out = []
    for e in reversed(eqns):
        if any(v in need for v in e.outs):
            out.append(e)
            need.update(v for v in e.inputs if v not in kept)
    return out[::-1]
