"""Peak memory of a region by liveness over its types.

Views share the storage of their base; a value is freed after its last use, as the interpreter does.  Inputs are
counted by the caller, except those that die inside (their storage belongs to the caller too).  O(equations).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mlc.ir.core import Alias, Custom, Eqn, Feed, Index, Loop, Pack, Region, Stop, Var
from mlc.ir.inplace import schema_of
from mlc.ir.types import SeqType, Type, nbytes

__all__ = ["liveness", "loop_peak", "region_peak", "root_of"]


def root_of(e: Eqn) -> Var | None:
    """The input whose storage the result of ``e`` shares, if it does."""
    op = e.op
    if isinstance(op, (Alias, Stop, Index)):
        return e.args[0]  # type: ignore[no-any-return]
    if isinstance(op, torch._ops.OpOverload) and schema_of(op).view and e.args and type(e.args[0]) is Var:
        return e.args[0]
    return None


def _size(t: Type, trips: Callable[[SeqType], int]) -> int:
    if isinstance(t, SeqType):
        return _size(t.elem, trips) * trips(t)
    return nbytes(t)


def region_peak(region: Region, trips: Callable[[SeqType], int] = lambda s: s.length or 1) -> int:
    """Largest number of bytes that running the region adds to its inputs."""
    return liveness(region, trips)[0]


def liveness(region: Region, trips: Callable[[SeqType], int] = lambda s: s.length or 1) -> tuple[int, int]:
    """The peak in bytes, and the position of the equation at which it is reached."""
    last: dict[Var, int] = {}
    for i, e in enumerate(region.eqns):
        for v in e.inputs:
            last[v] = i
    n = len(region.eqns)
    for v in region.outputs:
        last[v] = n
    owner: dict[Var, Var] = {v: v for v in region.inputs}
    outside = set(region.inputs)
    holders: dict[Var, int] = {}
    size: dict[Var, int] = {}
    live = peak = where = 0
    for i, e in enumerate(region.eqns):
        inner = loop_peak(e.op, trips) if isinstance(e.op, Loop) else 0
        for k, v in enumerate(e.outs):
            base = root_of(e)
            shared = e.args[k] if isinstance(e.op, (Alias,)) and k < len(e.args) else base
            if isinstance(e.op, Custom):
                shared = e.args[e.op.n_in + k]
            if isinstance(e.op, (Feed, Pack)):
                shared, size_v = None, 0
            else:
                size_v = _size(v.type, trips)
            root = owner.get(shared, shared) if shared is not None else v
            owner[v] = root
            holders[root] = holders.get(root, 0) + 1
            if root is v:
                size[v] = size_v
                live += size_v
        if live + inner > peak:
            peak, where = live + inner, i
        for v in dict.fromkeys([*e.inputs, *e.outs]):
            if last.get(v, i) == i and v not in outside:
                root = owner[v]
                holders[root] -= 1
                if holders[root] == 0 and root not in outside:
                    live -= size.get(root, 0)
    return peak, where


def loop_peak(op: Loop, trips: Callable[[SeqType], int]) -> int:
    """Bytes that one trip needs beyond the loop's arguments and results."""
    carried = sum(_size(v.type, trips) for v in op.body.inputs[: op.n_carry])
    return region_peak(op.body, trips) + carried
