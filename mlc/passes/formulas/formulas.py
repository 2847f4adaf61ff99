"""Formulas: time, arithmetic and peak memory of a plan in the numbers of trips of its loops, by sympy.

Time and arithmetic are polynomials, read off the nesting of loops (what is replayed from a few sets of states is the
function :class:`Replayed`, the count of the runtime's own schedule).  The peak is a maximum of linear pieces
(:mod:`mlc.passes.formulas.peaks`).  Formulas are those of the plan's own graphs: what a call of this plan costs at
other counts.  They are checked at counts that they were not made from; where they are off by more than a percent, none
is given.  Where examples are independent, the size of their batch is a symbol too (:mod:`mlc.passes.formulas.scaled`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import sympy
from torch._ops import OpOverload

from mlc.ir.core import Loop, Region
from mlc.ir.inplace import schema_of
from mlc.ir.lowered.slots import replayed_steps
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Program
from mlc.passes.cost.equations import Meter, device_of, flops
from mlc.passes.formulas.peaks import OFF, Expr, Peaks, affine
from mlc.passes.formulas.scaled import Batches
from mlc.passes.formulas.tangentcost import TangentMeter, columns_of, with_tangents
from mlc.passes.formulas.tripcounts import Group, Trips

__all__ = ["Expr", "Formula", "Replayed", "Symbols", "formula_of", "tangent_costs"]


class Replayed(sympy.Function):  # type: ignore[misc]
    """``Replayed(T, s)``: steps replayed by a backward sweep over T trips with s sets of states."""

    nargs: ClassVar[int] = 2

    @classmethod
    def eval(cls, trips: Expr, slots: Expr) -> Expr:
        """The number, where both are known."""
        if trips.is_Integer and slots.is_Integer:
            return sympy.Integer(cls.eval_number(int(trips), int(slots)))
        return None

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def eval_number(trips: int, slots: int) -> int:
        """The same on numbers."""
        return replayed_steps(trips, slots)


@dataclass(frozen=True)
class Formula:
    """What a plan costs, in the symbols of :class:`Symbols`.

    Attributes:
        seconds: Predicted time of forward and backward, seconds.
        flops: Floating point operations of matrix products, convolutions and attention.
        peak_bytes: Predicted peak beyond the inputs, bytes; None where no form holds within a percent.
        least: The smallest value for which they hold, by symbol. ``B`` is missing where the peak is known at the
            present size of the batch only.
        error: Largest relative error of the peak at counts that it was not made from.
    """

    seconds: Expr
    flops: Expr
    peak_bytes: Expr | None
    least: dict[Expr, int]
    error: float = 0.0


class Symbols:
    """Names of numbers of trips: ``T``, or ``T1``, ``T2``, ... after the levels that the loops train.

    Args:
        program: Names symbols by its levels.
        batches: Whether to look for the size of batches too: ``B``.

    Attributes:
        known: For each symbol of trips, the loop's place and its present count.
        batch: The symbol of the size of batches.
        examples: How many there are now; None when no formula has it.
    """

    def __init__(self, program: Program | None, batches: bool = True) -> None:
        self.levels = {} if program is None else _levels(program)
        self.known: dict[Expr, Group] = {}
        self.batch = sympy.Symbol("B", integer=True, positive=True)
        self.batches = batches
        self.examples: int | None = None

    def now(self) -> dict[Expr, int]:
        """Present counts of trips."""
        return {s: g.count for s, g in self.known.items()}

    def of(self, trips: Trips) -> dict[int, Expr]:
        """A symbol for every group of loops."""
        out: dict[int, Expr] = {}
        for key, g in trips.groups.items():
            level = self.levels.get((str(g.loc), g.depth), "")
            name = f"T{level.lstrip('L')}" if level else "N"
            name = "T" if len(trips.groups) == 1 else name
            taken = {s.name for s in out.values()}
            name = next(n for n in (name, *[f"{name}_{i}" for i in range(2, 99)]) if n not in taken)
            out[key] = sympy.Symbol(name, integer=True, positive=True)
            self.known.setdefault(out[key], g)
        return out

    def meaning(self, symbol: Expr) -> str:
        """``trips of L1``."""
        if symbol == self.batch:
            return "examples of a batch"
        g = self.known[symbol]
        level = self.levels.get((str(g.loc), g.depth))
        line = "a loop" if g.loc is None else f"the loop at line {g.loc.line}"
        return f"trips of {level or line}"


def _levels(program: Program) -> dict[tuple[str, int], str]:
    """The level that each loop trains, by the loop's place and its depth."""
    found: dict[tuple[str, int], str] = {}
    for level in program.levels[1:]:
        path = level.at[0][:-1] if level.at else ()
        eqns = program.region.eqns
        for depth, i in enumerate(path):
            e = eqns[i]
            assert isinstance(e.op, Loop)
            eqns = e.op.body.eqns
            if depth == len(path) - 1:
                found.setdefault((str(e.loc), depth), level.name)
    return found


def formula_of(stages: Stages, symbols: Symbols, inductor: float | None = None) -> Formula:
    """Time, arithmetic and peak of lowered stages.

    Args:
        stages: Of a plan.
        symbols: Names; shared between the formulas that are to be compared.
        inductor: Share of the time of fusible operators that is left when they are compiled; None: interpreted.
    """
    made = _in_trips(stages, symbols, inductor)
    batches = Batches.of(stages) if symbols.batches else None
    return made if batches is None else _in_batch(made, batches, symbols, inductor)


def _in_trips(stages: Stages, symbols: Symbols, inductor: float | None) -> Formula:
    trips = Trips.of(stages)
    names = symbols.of(trips)
    reader = _Reader(trips, names, Meter(device_of(stages.forward)), 1.0 if inductor is None else inductor)
    total = _sum(reader.region(r) for r in trips.regions)
    peaks = Peaks(stages, trips, list(names))
    form, error = peaks.form([names[k] for k in names])
    least = {names[k]: g.least for k, g in trips.groups.items()}
    return Formula(total[0], total[1], form, least, error)


# ---- tangents


def tangent_costs(stages: Stages, symbols: Symbols, inductor: float | None, k: int
                  ) -> Callable[[int], tuple[float, int]]:  # fmt: skip
    """Seconds and peak of forward-mode stages with ``k`` tangents, for any number of them at the present trips.

    There is no formula: with the number of tangents operators leave the cache one by one.
    """
    meter, columns, now = Meter(device_of(stages.forward)), columns_of(stages, k), symbols.now()

    @functools.cache
    def at(number: int) -> tuple[float, int]:
        times = Fraction(number, k)
        held = with_tangents(stages, columns, times)
        cost = _Cost(stages, 0, symbols, inductor, TangentMeter(meter, columns, float(times)), held)
        return float(cost.seconds.subs(now)), cost.peak(now)

    return at


# ---- batches


def _in_batch(whole: Formula, batches: Batches, symbols: Symbols, inductor: float | None) -> Formula:
    """The formula with the size of the batch in it: a line from the present size to twice it, confirmed at thrice.

    Half the size tells whether it holds below the present one as well.
    """
    n = batches.n
    sizes = (2 * n, 3 * n, n // 2)
    found = [batches.at(size) for size in sizes if size]
    if len(found) < 3 or None in found:
        return whole
    costs = [_Cost(x[0], x[1], symbols, inductor) for x in found if x is not None]
    step = (symbols.batch - n) / sympy.Integer(n)
    seconds, flops = (sympy.expand(a + (b - a) * step) for a, b in ((whole.seconds, costs[0].seconds),
                                                                   (whole.flops, costs[0].flops)))  # fmt: skip
    now = symbols.now()
    ok = [max(_off(seconds, float(c.seconds.subs(now)), {**now, symbols.batch: size}),
              _off(flops, float(c.flops.subs(now)), {**now, symbols.batch: size})) <= OFF
          for c, size in zip(costs, sizes, strict=True)]  # fmt: skip
    if not all(ok[:2]):
        return whole
    symbols.examples = n
    made = replace(whole, seconds=seconds, flops=flops)
    here = _Cost(batches.stages, 0, symbols, inductor)
    known = {n: here, **dict(zip(sizes, costs, strict=True))}
    peak = _peak_in_batch(batches, known, symbols, inductor)
    if peak is None:
        return made
    low = max(1, n // 2) if ok[2] and _agrees(peak, known[n // 2], n // 2, symbols) else n
    floors = {s: x if _off(peak, here.peak({**now, s: x}), {**now, s: x, symbols.batch: n}) <= OFF else now[s]
              for s, x in whole.least.items()}  # fmt: skip
    return replace(made, peak_bytes=peak, least={**floors, symbols.batch: low})


def _peak_in_batch(batches: Batches, known: dict[int, _Cost], symbols: Symbols, inductor: float | None) -> Expr | None:
    """The peak in the size of the batch: one piece from the present size on, or two where that is not enough."""
    n = batches.n

    def right(e: Expr) -> bool:
        return all(_agrees(e, known[size], size, symbols) for size in known if size >= n)

    one = _plane(known, n, 2 * n, symbols)
    if right(one):
        return one
    for size in (n + 1, n + n // 2):
        found = batches.at(size)
        if found is None:
            return None
        known[size] = _Cost(*found, symbols, inductor)
    two = sympy.Max(_plane(known, n, n + 1, symbols), _plane(known, 2 * n, 3 * n, symbols))
    return two if right(two) else None


def _plane(known: dict[int, _Cost], low: int, high: int, symbols: Symbols) -> Expr:
    """The piece of the peak that goes through two sizes of the batch at the present counts of trips."""
    a, b = (known[x].piece() for x in (low, high))
    return sympy.expand(a + (b - a) * (symbols.batch - low) / sympy.Integer(high - low))


def _agrees(e: Expr, cost: _Cost, size: int, symbols: Symbols) -> bool:
    """Whether an expression of the peak is right at a size, at the present counts of trips and at larger ones."""
    now = symbols.now()
    far = {s: 3 * x + 2 for s, x in now.items()}
    fine = all(_off(e, cost.peak(at), {**at, symbols.batch: size}) <= OFF for at in (now, far))
    return fine and cost.over <= OFF * cost.peak(now)


class _Cost:
    """Costs of stages at one size of the batch."""

    def __init__(self, stages: Stages, over: int, symbols: Symbols, inductor: float | None,
                 meter: Meter | None = None, held: Stages | None = None) -> None:  # fmt: skip
        trips = Trips.of(stages)
        self.names = symbols.of(trips)
        self.over = over
        meter = Meter(device_of(stages.forward)) if meter is None else meter
        reader = _Reader(trips, self.names, meter, 1.0 if inductor is None else inductor)
        self.seconds, self.flops = _sum(reader.region(r) for r in trips.regions)
        if held is not None:
            stages, trips = held, Trips.of(held)
            self.names = symbols.of(trips)
        self._peaks = Peaks(stages, trips, list(self.names))

    def peak(self, at: dict[Expr, int]) -> int:
        """Predicted peak at counts, bytes."""
        return self._peaks(*[at[s] for s in self.names.values()])

    def piece(self) -> Expr:
        """The piece of the peak that holds at the present counts."""
        return affine(self._peaks, tuple(self._peaks.usual), list(self.names.values()))


def _off(e: Expr, expected: float, at: dict[Expr, int]) -> float:
    """Relative error of an expression."""
    return abs(float(e.subs(at)) - expected) / max(abs(expected), 1e-12)


# ---- time


class _Reader:
    """Sums costs over a region; loops multiply."""

    def __init__(self, trips: Trips, names: dict[int, Expr], meter: Meter, left: float) -> None:
        self.trips, self.names, self.meter, self.left = trips, names, meter, left

    def region(self, region: Region) -> tuple[Expr, Expr]:
        """Seconds and flops of running a region once."""
        seconds = work = 0.0
        loops: list[tuple[Expr, Expr]] = []
        for e in region.eqns:
            if isinstance(e.op, Loop):
                key = self.trips.group(e)
                n = sympy.Integer(e.op.count) if key is None else self.names[key]
                once = self.region(e.op.body)
                loops.append((n * once[0], n * once[1]))
                if e.op.replay is not None:
                    again = self.replayed(e.op.replay.body)
                    times = Replayed(n, sympy.Integer(e.op.replay.slots))
                    loops.append((times * again[0], times * again[1]))
                continue
            cost = self.meter(e)
            fusible = isinstance(e.op, OpOverload) and not schema_of(e.op).view and not flops(e)
            seconds += cost.seconds * (self.left if fusible else 1.0)
            work += cost.flops
        return _sum([(sympy.Float(seconds), sympy.Float(work)), *loops])

    def replayed(self, body: Region) -> tuple[Expr, Expr]:
        """Replays are not compiled."""
        left, self.left = self.left, 1.0
        found = self.region(body)
        self.left = left
        return found


def _sum(parts: Any) -> tuple[Expr, Expr]:
    rows = list(parts)
    return sympy.expand(sum(r[0] for r in rows)), sympy.expand(sum(r[1] for r in rows))
