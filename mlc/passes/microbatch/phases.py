"""Micro-batches of a region that works on its batch more than once.

An adjoint that makes its inner gradients again (:mod:`mlc.passes.remat.inlined`) takes a product at directions that
these gradients led to: the product reads sums over the batch that the gradient made, so one loop over the parts cannot
do both.  The region is cut where the sums are complete, and each phase is split alone.
"""

from __future__ import annotations

from collections.abc import Callable

from mlc.ir.builder import renamed
from mlc.ir.core import Eqn, Region, Var
from mlc.ir.lowered.contract import Refused
from mlc.passes.cost.equations import flops
from mlc.passes.microbatch.split import microbatch
from mlc.passes.remat.inlined import TAG

__all__ = ["in_phases"]


def in_phases(region: Region, parts: int, refused: Callable[[Refused], None]) -> Region:
    """The region with each of its phases as a loop over at most ``parts`` parts of the batch, where it can be.

    Args:
        region: Equations without inner gradients; results and inputs stay as they are.
        parts: Number of parts; half as many, and so on, where the batch cannot be divided so.
        refused: Told why a phase cannot be split.
    """
    cut = _cut(region)
    if cut is not None:
        first, second = [_phase(p, parts, refused) for p in cut]
        return _joined(region, first, second)
    return _phase(region, parts, refused)


def _phase(region: Region, parts: int, refused: Callable[[Refused], None]) -> Region:
    if not any(flops(e) for e in region.eqns):
        return region
    found = microbatch(region, parts)
    while isinstance(found, Refused) and found.divides and parts > 3:
        parts //= 2
        found = microbatch(region, parts)
    if isinstance(found, Refused):
        refused(found)
        return region
    return found


def _cut(region: Region) -> tuple[Region, Region] | None:
    """What leads to an adjoint's own inner gradients, and the rest; None when there are none."""
    early: set[Eqn] = set()
    needed: set[Var] = set()
    for e in reversed(region.eqns):
        if e.origin is TAG or any(v in needed for v in e.outs):
            early.add(e)
            needed.update(e.inputs)
    if not early or any(e.impure for e in region.eqns):
        return None
    before = tuple(e for e in region.eqns if e in early)
    behind = tuple(e for e in region.eqns if e not in early)
    made = {v for e in before for v in e.outs}
    leaving = dict.fromkeys(v for v in (*[v for e in behind for v in e.inputs], *region.outputs) if v in made)
    first = Region(region.inputs, before, tuple(leaving), region.names)
    return first, Region((*region.inputs, *leaving), behind, region.outputs)


def _joined(region: Region, first: Region, second: Region) -> Region:
    """Both phases in one region."""
    n = len(region.inputs)
    env = dict(zip(second.inputs[n:], first.outputs, strict=True))
    env = {v: x for v, x in env.items() if v is not x}
    eqns: list[Eqn] = [renamed(e, env) for e in second.eqns]
    outputs = tuple([env.get(v, v) for v in second.outputs])
    return Region(region.inputs, (*first.eqns, *eqns), outputs, region.names)
