"""Break-even points: the number of trips at which another plan of the same program becomes the better one.

A plan is better when it fits the budget and is faster, or fits where the other does not.  Candidates for the point are
where two times are equal and where a peak meets the budget: roots of polynomials, found by sympy; times with replays
are bisected.  Every point is kept only if evaluating both sides confirms it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import ceil, floor

import sympy

from mlc.passes.formulas.formulas import Formula, Replayed
from mlc.passes.formulas.peaks import FAR, Expr
from mlc.units import size_text

__all__ = ["OWN", "BreakEven", "break_evens", "tangent_break"]

OWN = "this plan"
_NEAR = 1.001  # times that differ by less are equal


@dataclass(frozen=True)
class BreakEven:
    """Where another choice wins.

    Attributes:
        symbol: What changes.
        at: The first value at which it wins, seen from the present one.
        above: Whether it wins from there on (else: up to there).
        winner: Its name; empty when no plan that is known fits there.
        why: ``"time"``, or ``"memory"``: this plan does not fit the budget there, or (without one) is the larger one.
        budget: Bytes, when there is one.
    """

    symbol: str
    at: int
    above: bool
    winner: str
    why: str
    budget: int | None = None

    def __str__(self) -> str:
        where = f"from {self.symbol} = {self.at} on" if self.above else f"up to {self.symbol} = {self.at}"
        if self.why == "time":
            fits = " and fits" if self.budget is not None else ""
            return f"{where}, {self.winner} is faster{fits}"
        if self.budget is None:
            return f"{where}, {self.winner} needs less memory"
        then = f"{self.winner} does" if self.winner else "no plan known here does"
        return f"{where}, this plan does not fit {size_text(self.budget)}; {then}"


def break_evens(own: Formula, rivals: Mapping[str, Formula], now: Mapping[Expr, int], budget: int | None
                ) -> tuple[BreakEven, ...]:  # fmt: skip
    """Points at which another plan wins, for each symbol with the others as they are now.

    Args:
        own: Costs of the plan.
        rivals: Costs of others, by name.
        now: Present value of each symbol.
        budget: Bytes, or None.
    """
    out: list[BreakEven] = []
    for symbol in now:
        fixed = {s: n for s, n in now.items() if s != symbol}
        all = {OWN: own, **rivals}
        lines = {k: _Line(f, symbol, fixed) for k, f in all.items() if f.peak_bytes is not None and symbol in f.least}
        if OWN in lines:
            out += _along(symbol, lines, now[symbol], budget)
    return tuple(out)


MOST = 1024  # tangents


def tangent_break(forward: Callable[[int], tuple[float, int]], k: int, other: tuple[float, int], names: tuple[str, str],
                  budget: int | None) -> BreakEven | None:  # fmt: skip
    """The number of meta-parameter elements at which forward mode becomes, or ceases to be, the better way.

    Args:
        forward: Seconds and peak of forward mode for a number of them.
        k: Their number now.
        other: Seconds and peak of the other mode, which takes one sweep for all.
        names: Of the plan itself and of its rival, one of which is forward mode.
        budget: Bytes, or None.
    """

    def fits(cost: tuple[float, int]) -> bool:
        return budget is None or cost[1] <= budget

    def better(number: int) -> bool:
        cost = forward(number)
        return fits(cost) and (not fits(other) or cost[0] <= other[0])

    own_forward = names[0] == "forward mode"
    if better(k) != own_forward or (own_forward and better(MOST)) or (not own_forward and not better(1)):
        return None
    low, high = (k, MOST) if own_forward else (1, k)  # better at the lower end, worse at the upper
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if better(middle) else (low, middle)
    at = high if own_forward else low
    why = "time" if fits(forward(at)) and fits(other) else "memory"
    winner = names[1] if fits(other) or not own_forward else ""
    return BreakEven("K", at, own_forward, winner, why, budget)


class _Line:
    """Time and peak of a plan along one symbol."""

    def __init__(self, f: Formula, symbol: Expr, fixed: Mapping[Expr, int]) -> None:
        self.symbol = symbol
        self.seconds = f.seconds.subs(fixed)
        self.peak = f.peak_bytes.subs(fixed)  # type: ignore[union-attr]
        self.low = f.least.get(symbol, 1)
        modules = [{"Replayed": Replayed.eval_number, "Max": max}, "math"]
        self._seconds = sympy.lambdify(symbol, self.seconds, modules)
        self._peak = sympy.lambdify(symbol, self.peak, modules)

    def at(self, x: int) -> tuple[float, float]:
        """Seconds and bytes."""
        return float(self._seconds(x)), float(self._peak(x))


def _along(symbol: Expr, lines: dict[str, _Line], now: int, budget: int | None) -> Iterator[BreakEven]:
    low = max(x.low for x in lines.values())
    points = sorted({p for r in _roots(lines, budget) for p in (floor(r), ceil(r), floor(r) + 1, ceil(r) - 1)})
    points = [p for p in points if low <= p <= FAR]
    behind = {
        k: line for k, line in lines.items() if k == OWN or _winner({OWN: lines[OWN], k: line}, now, budget) is None
    }
    for above in (True, False):
        beyond = [p for p in points if p > now] if above else [p for p in points[::-1] if p < now]
        found = _first(behind, beyond, budget)
        if found is not None:
            at, (winner, why) = found
            yield BreakEven(symbol.name, at, above, winner, why, budget)
    if budget is None:
        yield from _smaller(symbol, lines, now, points)


def _first(lines: dict[str, _Line], points: list[int], budget: int | None) -> tuple[int, tuple[str, str]] | None:
    """The first of some points at which another plan wins."""
    for p in points:
        winner = _winner(lines, p, budget)
        if winner is not None:
            return p, winner
    return None


def _winner(lines: dict[str, _Line], x: int, budget: int | None) -> tuple[str, str] | None:
    """Which other plan wins at ``x``, and by what; None when the plan itself is the best."""
    costs = {k: line.at(x) for k, line in lines.items()}
    fits = {k: s for k, (s, b) in costs.items() if budget is None or b <= budget}
    best = min(fits, key=lambda k: fits[k], default="")
    if OWN in fits:
        return None if fits[OWN] <= _NEAR * fits[best] else (best, "time")
    return best, "memory"


def _smaller(symbol: Expr, lines: dict[str, _Line], now: int, points: list[int]) -> Iterator[BreakEven]:
    """Without a budget: where another plan begins to need less memory, and is not the smaller one now."""
    for name, line in lines.items():
        if name == OWN or line.at(now)[1] <= lines[OWN].at(now)[1]:
            continue
        for above in (True, False):
            beyond = [p for p in points if p > now] if above else [p for p in points[::-1] if p < now]
            at = next((p for p in beyond if line.at(p)[1] < lines[OWN].at(p)[1]), None)
            if at is not None:
                yield BreakEven(symbol.name, at, above, name, "memory")


# ---- where something may change


def _roots(lines: dict[str, _Line], budget: int | None) -> Iterator[float]:
    symbol = lines[OWN].symbol
    for line in lines.values():
        if budget is not None:
            for piece in _pieces(line.peak):
                yield from _solved(piece - budget, symbol)
    for a, b in combinations(lines.values(), 2):
        yield from _equal_times(a, b, symbol)
        for p in _pieces(a.peak) if budget is None else ():
            for q in _pieces(b.peak):
                yield from _solved(p - q, symbol)


def _pieces(peak: Expr) -> tuple[Expr, ...]:
    return tuple(peak.args) if isinstance(peak, sympy.Max) else (peak,)


def _solved(difference: Expr, symbol: Expr) -> list[float]:
    free = sympy.Dummy(real=True)  # a symbol that counts would have no root between two integers
    found = sympy.Poly(difference.subs(symbol, free), free) if difference.has(symbol) else None
    return [] if found is None else [float(r) for r in sympy.roots(found) if r.is_real and r > 0]


def _equal_times(a: _Line, b: _Line, symbol: Expr) -> list[float]:
    difference = a.seconds - b.seconds
    if not difference.has(Replayed):
        return _solved(difference, symbol)

    def sign(x: int) -> bool:
        return a.at(x)[0] > b.at(x)[0]

    low = max(a.low, b.low)
    out = []
    for k in range(8):  # within each doubling, once
        x, y = low << k, low << (k + 1)
        if sign(x) == sign(y):
            continue
        while y - x > 1:
            middle = (x + y) // 2
            x, y = (middle, y) if sign(middle) == sign(x) else (x, middle)
        out.append(float(y))
    return out
