"""Formulas: time, arithmetic and peak memory of a plan in the numbers of trips of its loops, by sympy.

Time and arithmetic are polynomials, read off the nesting of loops (what is replayed from a few sets of states is the
function :class:`Replayed`, the count of the runtime's own schedule).  The peak is a maximum of linear pieces: it is
measured by liveness at a few counts, each gives the piece that holds there, and new ones are added where two pieces
meet until the measured peak lies on them (for one loop exact: the peak is convex and piecewise linear in its trips).
Formulas are those of the plan's own graphs: what a call of this plan costs at other counts.  They are checked at
counts that they were not made from; where the peak is off by more than a percent, none is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import sympy
from torch._ops import OpOverload

from mlc.ir.core import Loop, Region, Var
from mlc.ir.inplace import schema_of
from mlc.ir.program import Program
from mlc.ir.slots import replayed_steps
from mlc.passes.cost import Meter, device_of, flops
from mlc.passes.lower import Stages
from mlc.passes.memory import Footprint, Profile
from mlc.passes.retrip import Group, Trips
from mlc.passes.search import peak_bytes

__all__ = ["Expr", "Formula", "Replayed", "Symbols", "formula_of"]

Expr = Any  # a sympy expression
FAR = 1 << 16  # trips up to which pieces of the peak are looked for
_PIECES, _OFF = 8, 0.01


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
        least: Fewest trips for which they hold, by symbol.
        error: Largest relative error of the peak at counts that it was not made from.
    """

    seconds: Expr
    flops: Expr
    peak_bytes: Expr | None
    least: dict[Expr, int]
    error: float = 0.0


class Symbols:
    """Names of numbers of trips: ``T``, or ``T1``, ``T2``, ... after the levels that the loops train.

    Attributes:
        known: For each symbol, the loop's place and its present count.
    """

    def __init__(self, program: Program | None) -> None:
        self.levels = {} if program is None else _levels(program)
        self.known: dict[Expr, Group] = {}

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
    trips = Trips.of(stages)
    names = symbols.of(trips)
    reader = _Reader(trips, names, Meter(device_of(stages.forward)), 1.0 if inductor is None else inductor)
    total = _sum(reader.region(r) for r in trips.regions)
    peaks = _Peaks(stages, trips, list(names))
    form, error = peaks.form([names[k] for k in names])
    least = {names[k]: g.least for k, g in trips.groups.items()}
    return Formula(total[0], total[1], form, least, error)


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


# ---- memory


class _Known(Footprint):
    """A footprint that measures equal regions once: at other counts only what holds a sequence is new."""

    def __init__(self) -> None:
        super().__init__()
        self._profiles: dict[Any, tuple[Region, Profile]] = {}

    def region(self, region: Region, owned: Collection[Var] = ()) -> Profile:
        key = (id(region), tuple([(v, self.sizes.get(v)) for v in owned]))
        found = self._profiles.get(key)
        if found is None:
            found = self._profiles[key] = (region, super().region(region, owned))
        return found[1]


class _Peaks:
    """The peak of stages as a function of trip counts."""

    def __init__(self, stages: Stages, trips: Trips, keys: Sequence[int]) -> None:
        self.stages, self.trips, self.keys = stages, trips, list(keys)
        self.least = [trips.groups[k].least for k in keys]
        self.usual = [max(trips.groups[k].count, low) for k, low in zip(keys, self.least, strict=True)]
        self._footprint = _Known()
        self._seen: dict[tuple[int, ...], int] = {}

    def __call__(self, *counts: int) -> int:
        """The predicted peak at these counts, bytes."""
        if counts not in self._seen:
            regions = self.trips.at(dict(zip(self.keys, counts, strict=True)))
            backward = regions[1] if len(regions) > 1 else None
            made = replace(self.stages, forward=regions[0], backward=backward)
            self._seen[counts] = peak_bytes(made, self._footprint)
        return self._seen[counts]

    def form(self, names: Sequence[Expr]) -> tuple[Expr | None, float]:
        """An expression of the peak, and how far it is off where it was not measured before."""
        if not names:
            return sympy.Integer(self()), 0.0
        made = _convex(self, self.least[0], names[0]) if len(names) == 1 else self._corners(names)
        error = max(abs(float(made.subs(dict(zip(names, p, strict=True)))) / max(self(*p), 1) - 1)
                    for p in self._further())  # fmt: skip
        return (made, error) if error <= _OFF else (None, error)

    def _further(self) -> list[tuple[int, ...]]:
        """Counts to check at: the present ones, and some between and beyond."""
        return [tuple(self.usual), tuple(2 * x + 3 for x in self.usual), tuple(7 * x + 5 for x in self.usual),
                tuple(low + 1 + 2 * i for i, low in enumerate(self.least))]  # fmt: skip

    def _corners(self, names: Sequence[Expr]) -> Expr:
        """For several loops: the pieces that hold at the present counts and at the corners of a box around them."""
        sides = [(low, 40 * now) for low, now in zip(self.least, self.usual, strict=True)]
        points = [tuple(self.usual), *list(product(*sides))[: _PIECES - 1]]
        pieces = list(dict.fromkeys(_affine(self, p, names) for p in points))
        return pieces[0] if len(pieces) == 1 else sympy.Max(*pieces)


def _convex(f: Callable[[int], int], low: int, name: Expr) -> Expr:
    """A convex function with linear pieces on the integers from ``low``, exactly: where pieces meet, look again."""

    def piece(x: int) -> tuple[int, int]:
        slope = f(x + 1) - f(x)
        return f(x) - slope * x, slope

    def between(a: tuple[int, int], b: tuple[int, int], room: int) -> list[tuple[int, int]]:
        if a[1] == b[1] or room <= 0:
            return []
        at = (a[0] - b[0]) // (b[1] - a[1])  # where both are equal, rounded down
        if f(at) <= max(a[0] + a[1] * at, b[0] + b[1] * at):
            return []
        c = piece(at)
        return [*between(a, c, room - 1), c, *between(c, b, room - 1)] if c not in (a, b) else []

    first, last = piece(low), piece(FAR)
    found = list(dict.fromkeys([first, *between(first, last, 3), last]))
    made = [a + b * name for a, b in found]
    return made[0] if len(made) == 1 else sympy.Max(*made)


def _affine(f: Callable[..., int], at: tuple[int, ...], names: Sequence[Expr]) -> Expr:
    """The piece at a point: linear in each count, products of nested ones included."""
    subsets = list(product((0, 1), repeat=len(at)))
    out: Expr = sympy.Integer(0)
    for s in subsets:  # forward differences, by inclusion and exclusion
        parts = [t for t in subsets if all(b <= a for a, b in zip(s, t, strict=True))]
        sign = [(-1) ** (sum(s) - sum(t)) for t in parts]
        slope = sum(g * f(*[x + d for x, d in zip(at, t, strict=True)]) for g, t in zip(sign, parts, strict=True))
        term = sympy.Integer(slope)
        for n, x, d in zip(names, at, s, strict=True):
            term = term * (n - x) if d else term
        out += term
    return sympy.expand(out)
