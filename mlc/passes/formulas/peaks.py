"""The peak of a plan as a function of the trips of its loops: a maximum of linear pieces.

The peak is measured by liveness at a few counts; each gives the piece that holds there, and new ones are added where
two pieces meet until the measured peak lies on them.  For one loop that is exact, as the peak is convex and piecewise
linear in its trips; for several it is checked at counts that no piece was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import sympy

from mlc.ir.core import Region, Var
from mlc.ir.lowered.stages import Stages
from mlc.passes.cost.memory import Footprint, Profile, peak_bytes
from mlc.passes.formulas.tripcounts import Trips

__all__ = ["FAR", "OFF", "Expr", "Peaks", "affine"]

Expr = Any  # a sympy expression
FAR = 1 << 16  # trips up to which pieces of the peak are looked for
OFF = 0.01  # largest relative error of a formula where it is checked
_PIECES = 8


class _Known(Footprint):
    """A footprint that measures equal regions once: at other counts only what holds a sequence is new."""

    def __init__(self) -> None:
        super().__init__()
        self._profiles: dict[Any, tuple[Region, Profile]] = {}

    def region(self, region: Region, owned: Collection[Var] = ()) -> Profile:
        key = (id(region), tuple([(v, self.sizes.get(v), self.sparse.get(v)) for v in owned]))
        found = self._profiles.get(key)
        if found is None:
            found = self._profiles[key] = (region, super().region(region, owned))
        return found[1]


class Peaks:
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
        return (made, error) if error <= OFF else (None, error)

    def _further(self) -> list[tuple[int, ...]]:
        """Counts to check at: the present ones, and some between and beyond."""
        return [tuple(self.usual), tuple(2 * x + 3 for x in self.usual), tuple(7 * x + 5 for x in self.usual),
                tuple(low + 1 + 2 * i for i, low in enumerate(self.least))]  # fmt: skip

    def _corners(self, names: Sequence[Expr]) -> Expr:
        """For several loops: the pieces that hold at the present counts and at the corners of a box around them."""
        sides = [(low, 40 * now) for low, now in zip(self.least, self.usual, strict=True)]
        points = [tuple(self.usual), *list(product(*sides))[: _PIECES - 1]]
        pieces = list(dict.fromkeys(affine(self, p, names) for p in points))
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


def affine(f: Callable[..., int], at: tuple[int, ...], names: Sequence[Expr]) -> Expr:
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
