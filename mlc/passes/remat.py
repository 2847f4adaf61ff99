"""Rematerialisation inside a product: what is kept across its widest point, and what is computed again behind it.

The point is where most bytes are alive.  Values needed behind it that were computed before it are either kept or
recomputed from kept ones; which is a minimum cut (Boykov-Kolmogorov through networkx) on the graph of equations
before the point: capacities are bytes, operators with much arithmetic per byte (matrix products, convolutions)
and impure ones are never run twice.  Exact: the same operators on the same values.
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov
from torch._ops import OpOverload

from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Eqn, Index, Primitive, Region, SafeSqrt, Stop, Var, map_vars
from mlc.ir.types import SeqType, TensorType, nbytes
from mlc.passes.memory import liveness, region_peak
from mlc.passes.schedule import on_demand

__all__ = ["rematerialise"]

_HEAVY = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_fft_c2c", "linalg_solve", "svd"}
_FLOPS_PER_BYTE = 20.0


def rematerialise(region: Region, anchor: Callable[[Eqn], bool], rounds: int) -> Region:
    """Reduce the peak of a region by up to ``rounds`` cuts; stops where one gains less than 2 percent."""
    region = on_demand(region, anchor)
    best = region_peak(region)
    for _ in range(rounds):
        new = on_demand(_once(region), anchor)
        peak = region_peak(new)
        if peak >= best * 0.98:
            break
        region, best = new, peak
    return region


def _light(e: Eqn) -> bool:
    """Whether an equation may run twice."""
    if e.impure or any(isinstance(v.type, SeqType) for v in (*e.inputs, *e.outs)):
        return False
    if isinstance(e.op, Primitive):
        return isinstance(e.op, (Alias, Stop, SafeSqrt, Index))
    name = e.op._schema.name.split("::")[1] if isinstance(e.op, OpOverload) else ""
    if name not in _HEAVY and not name.startswith("linalg_"):
        return True
    if name not in ("mm", "bmm"):
        return False
    a, out = e.args[0].type, e.outs[0].type
    assert isinstance(a, TensorType) and isinstance(out, TensorType)
    return 2.0 * a.shape[-1] / out.dtype.itemsize <= _FLOPS_PER_BYTE


def _once(region: Region) -> Region:
    """One cut at the present peak."""
    at = liveness(region)[1]
    before, behind = region.eqns[: at + 1], region.eqns[at + 1 :]
    made = {v: e for e in before for v in e.outs}
    needed = {v for e in behind for v in e.inputs if v in made} | {v for v in region.outputs if v in made}
    if not needed:
        return region
    kept = _cut(before, made, needed)
    return _rebuild(region, at, made, needed, kept)


def _cut(before: tuple[Eqn, ...], made: dict[Var, Eqn], needed: set[Var]) -> set[Var]:
    """Values to keep: a minimum cut between what cannot be recomputed and what is needed."""
    g: nx.DiGraph[object] = nx.DiGraph()
    reach: set[Var] = set()
    todo = list(needed)
    while todo:
        v = todo.pop()
        if v in reach or v not in made:
            continue
        reach.add(v)
        if _light(made[v]):
            todo.extend(made[v].inputs)
    for v in reach:
        g.add_edge((v, 0), (v, 1), capacity=max(nbytes(v.type), 1))
        if not _light(made[v]):
            g.add_edge("source", (v, 0))
        else:
            for u in made[v].inputs:
                if u in reach:
                    g.add_edge((u, 1), (v, 0))
        if v in needed:
            g.add_edge((v, 1), "sink")
    if "source" not in g or "sink" not in g:
        return set()
    _, (left, _) = nx.minimum_cut(g, "source", "sink", flow_func=boykov_kolmogorov)
    return {v for v in reach if (v, 0) in left and (v, 1) not in left}


def _rebuild(region: Region, at: int, made: dict[Var, Eqn], needed: set[Var], kept: set[Var]) -> Region:
    """The region with copies of what is not kept behind the point."""
    b = Builder(merge=False)
    env: dict[Var, Var] = {}
    where = {v: i for i, e in enumerate(region.eqns[: at + 1]) for v in e.outs}
    again: set[int] = set()
    todo = [v for v in needed if v not in kept]
    while todo:
        v = todo.pop()
        if v in kept or v not in made or where[v] in again:
            continue
        again.add(where[v])
        todo.extend(made[v].inputs)
    for i in sorted(again):
        e = region.eqns[i]
        outs = tuple([Var(v.type) for v in e.outs])
        args = map_vars(e.args, lambda v: env.get(v, v))
        kwargs = tuple((k, map_vars(x, lambda v: env.get(v, v))) for k, x in e.kwargs)
        b.append(Eqn(e.op, args, outs, kwargs, e.loc, "recomputed"))
        env.update((v, o) for v, o in zip(e.outs, outs, strict=True) if v not in kept)
    tail = [
        e.with_(args=map_vars(e.args, lambda v: env.get(v, v)),
                kwargs=tuple((k, map_vars(x, lambda v: env.get(v, v))) for k, x in e.kwargs))
        for e in region.eqns[at + 1 :]
    ]  # fmt: skip
    outputs = tuple(env.get(v, v) for v in region.outputs)
    eqns = (*region.eqns[: at + 1], *b.eqns, *tail)
    from mlc.ir.builder import dce

    return dce(Region(region.inputs, eqns, outputs, region.names))
