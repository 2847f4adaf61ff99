"""Order of equations: every value as late as its first use, which is what keeps a mixed product small.

The tangent of an equation should follow the equation at once: then the values of the forward region are needed
together with their tangents, and neither a whole primal sweep nor a whole primal backward waits in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from mlc.ir.core import Eqn, Region

__all__ = ["on_demand"]


def on_demand(region: Region, anchor: Callable[[Eqn], bool]) -> Region:
    """Reorder: anchors in their order, every other equation just before the first that needs it.

    Regions with impure equations keep their order.  O(equations + uses).
    """
    if any(e.impure for e in region.eqns) or not any(anchor(e) for e in region.eqns):
        return region
    where = {v: i for i, e in enumerate(region.eqns) for v in e.outs}
    done = [False] * len(region.eqns)
    order: list[Eqn] = []

    def visit(root: int) -> None:
        todo = [(root, False)]
        while todo:
            i, ready = todo.pop()
            if done[i]:
                continue
            e = region.eqns[i]
            if ready:
                done[i] = True
                order.append(e)
                continue
            todo.append((i, True))
            needs = sorted({where[v] for v in e.inputs if v in where}, reverse=True)
            todo.extend((j, False) for j in needs if not done[j])

    for i, e in enumerate(region.eqns):
        if anchor(e):
            visit(i)
    for v in region.outputs:
        if v in where:
            visit(where[v])
    for i in range(len(region.eqns)):
        if not done[i]:
            visit(i)
    return Region(region.inputs, tuple(order), region.outputs, region.names)
