"""Rematerialisation inside a region: what is kept across its widest point, and what is computed again behind it.

The point is where most bytes are alive.  Values needed behind it that were computed before it are either kept or
made again from kept ones; which is the minimum cut of :mod:`mlc.passes.remat.mincut` at the price of a byte.  One cut
moves the widest point elsewhere, so it is done again, as long as the bytes saved are worth the seconds spent.  Exact:
the same operators on the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlc.ir.builder import dce, renamed
from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.opaque.call import once
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, resident
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.memory import Footprint, root_of
from mlc.passes.remat.mincut import Infeasible, choose, needed_for
from mlc.passes.remat.schedule import on_demand

__all__ = ["Trade", "rematerialise"]


@dataclass(frozen=True)
class Trade:
    """What rematerialisation may spend.

    Attributes:
        price: Seconds of a call that one byte of peak is worth.
        times: How often the region runs in a call.
        rounds: Most cuts.
    """

    price: float
    times: int = 1
    rounds: int = 4


def rematerialise(region: Region, anchor: Callable[[Eqn], bool], trade: Trade, meter: Meter) -> Region:
    """Reduce the peak of a region by cuts, as long as each is worth its price.

    Args:
        region: Equations in any order that respects their dependencies.
        anchor: Equations whose order is kept; the others run just before they are needed.
        trade: The price of a byte.
        meter: Cost of equations.
    """
    footprint = Footprint()
    now = _measured(on_demand(region, anchor), meter, footprint)
    if trade.price <= 0:
        return now.region
    unit = meter.rates.unit
    scales = tuple(k for k in _SCALES if k * unit * trade.times <= _SLACK * trade.price)
    for n in range(trade.rounds if scales else 0):
        found = [(_try(now, k * unit, n + 1, anchor, meter, footprint), k) for k in scales]
        best, scale = min(found, key=lambda x: x[0].worth(trade))
        if best.worth(trade) >= now.worth(trade):
            break
        now, scales = best, (scale, scale / 2)
    return _numbered(now.region)


def _numbered(region: Region) -> Region:
    """Segments are numbered as they are met: the tag is ``recomputed 1``, ``recomputed 2``."""
    again = dict.fromkeys(e.tag for e in region.eqns if e.origin is Origin.RECOMPUTED)
    order = {tag: i + 1 for i, tag in enumerate(again)}
    if not order:
        return region
    eqns = [e.with_(tag=f"{Origin.RECOMPUTED} {order[e.tag]}") if e.tag in order else e for e in region.eqns]
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


_SCALES = (5.0, 14.0, 28.0, 56.0)  # prices of a byte at a cut, in times of moving it
_SLACK = 4.0  # a cut may be so much cheaper than its price, per byte of peak


@dataclass(frozen=True)
class _Measured:
    """A region with its predicted peak (bytes) and time (seconds)."""

    region: Region
    peak: int
    where: int
    seconds: float

    def worth(self, trade: Trade) -> float:
        """What it costs, bytes at their price."""
        return trade.price * self.peak + self.seconds * trade.times


def _measured(region: Region, meter: Meter, footprint: Footprint) -> _Measured:
    profile = footprint.region(region)
    return _Measured(region, profile.peak, profile.where, meter.region(region).seconds)


def _try(now: _Measured, price: float, cut: int, anchor: Callable[[Eqn], bool], meter: Meter, footprint: Footprint
         ) -> _Measured:  # fmt: skip
    made = _once(now.region, now.where, price, cut, meter)
    return now if made is now.region else _measured(on_demand(made, anchor), meter, footprint)


def _once(region: Region, at: int, price: float, cut: int, meter: Meter) -> Region:
    """Cut number ``cut``, behind equation ``at`` at ``price`` seconds per byte."""
    before, behind = region.eqns[: at + 1], region.eqns[at + 1 :]
    made = {v: e for e in before for v in e.outs}
    needed = {v for e in behind for v in e.inputs if v in made} | {v for v in region.outputs if v in made}
    if not needed:
        return region

    def redo(e: Eqn) -> float | None:
        if once(e) or isinstance(e.op, Loop) or any(isinstance(v.type, SeqType) for v in (*e.inputs, *e.outs)):
            return None
        return meter(e).seconds

    def keep(v: Var) -> float | None:
        e = made.get(v)
        if e is None:
            return 0.0
        if redo(e) is not None and root_of(e) is not None:
            return None  # its base is kept, or nothing
        return price * resident(v.type)

    try:
        kept = choose(before, needed, keep, redo)
    except Infeasible:
        return region
    again = needed_for(before, needed, kept)
    return _rebuild(region, at, again, kept, cut) if again else region


def _rebuild(region: Region, at: int, again: list[Eqn], kept: set[Var], cut: int) -> Region:
    """The region with copies of ``again`` behind the point."""
    env: dict[Var, Var] = {}

    copies = []
    for e in again:
        outs = tuple([Var(v.type) for v in e.outs])
        copies.append(renamed(e, env).with_(outs=outs, tag=f"{Origin.RECOMPUTED} {cut}"))
        env.update((v, o) for v, o in zip(e.outs, outs, strict=True) if v not in kept)
    tail = [renamed(e, env) for e in region.eqns[at + 1 :]]
    outputs = tuple(env.get(v, v) for v in region.outputs)
    return dce(Region(region.inputs, (*region.eqns[: at + 1], *copies, *tail), outputs, region.names))
