"""The search for a plan: candidates on the curve of time and memory, and the choice under a budget.

What is kept and what is computed again follows from one price, seconds per byte of peak (Lagrange): every pass buys
memory wherever it is cheaper than that.  The search walks along prices, together with the levers that are not
continuous (sets of states, micro-batches), evaluates the predicted peak and time of each candidate, and takes the
fastest that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlc.ir.core import Loop
from mlc.passes.batch import Refused
from mlc.passes.cost import Meter, device_of
from mlc.passes.lower import Joint, Levers, Stages, finish
from mlc.passes.memory import Footprint

__all__ = ["Candidate", "Search", "peak_bytes"]

# Prices of a byte, in times of moving it once: each step buys about a quarter of what is left to buy.
_PRICES = (0.0, 2.0, 8.0, 32.0, 128.0, 1024.0)
_TOLERANCE = 0.05  # of the smallest peak: below that, time decides


@dataclass(frozen=True)
class Candidate:
    """One point of the curve.

    Attributes:
        mode: How derivatives go.
        levers: What is kept.
        stages: The lowered program.
        peak: Predicted peak beyond the inputs, bytes.
        seconds: Predicted time of forward and backward stage, seconds.
        refused: Why a batch could not be split, when that was tried.
    """

    mode: str
    levers: Levers
    stages: Stages
    peak: int
    seconds: float
    refused: tuple[Refused, ...] = ()


def peak_bytes(stages: Stages, footprint: Footprint | None = None) -> int:
    """Predicted peak of a call beyond its inputs: the forward stage, or what is kept and the backward stage."""
    footprint = Footprint() if footprint is None else footprint
    forward = footprint.region(stages.forward).peak
    if stages.backward is None:
        return forward
    saved = [v for v, (kind, _) in zip(stages.backward.inputs, stages.saved, strict=False) if kind == "out"]
    return max(forward, footprint.region(stages.backward, saved).peak)


@dataclass
class Search:
    """Candidates of one program under one mode, evaluated when they are asked for.

    Args:
        mode: How derivatives go.
        joint: The differentiated program.
    """

    mode: str
    joint: Joint | Stages
    found: dict[Levers, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        region = self.joint.forward if isinstance(self.joint, Stages) else self.joint.region
        self.device = device_of(region)
        self.meter = Meter(self.device)
        self.trips = max((e.op.count for e in region.eqns if isinstance(e.op, Loop)), default=1)

    def at(self, levers: Levers) -> Candidate:
        """The candidate with these levers."""
        known = self.found.get(levers)
        if known is None:
            refused: list[Refused] = []
            stages = finish(self.joint, levers, refused.append)
            seconds = self.meter.region(stages.forward).seconds
            seconds += 0.0 if stages.backward is None else self.meter.region(stages.backward).seconds
            known = Candidate(self.mode, levers, stages, peak_bytes(stages), seconds, tuple(refused))
            self.found[levers] = known
        return known

    def ladder(self) -> list[Levers]:
        """Levers from the fastest to the smallest."""
        unit = self.meter.rates.unit
        some, few = _slots(self.trips)
        prices = [p * unit for p in _PRICES]
        out = [Levers(p) for p in prices[:4]]
        out += [Levers(prices[4], some), Levers(prices[4], some, 2), Levers(prices[4], few, 4)]
        out += [Levers(prices[5], few, 4)]
        return list(dict.fromkeys(out))

    def fastest(self, budget: int) -> Candidate | None:
        """The fastest candidate whose peak is at most ``budget`` bytes, as far as the search sees."""
        ladder = self.ladder()
        best = _first(ladder, lambda x: self.at(x).peak <= budget)
        if best is None:
            return None
        if best:
            self._between(ladder[best - 1], ladder[best], budget)
        fitting = [c for c in self.found.values() if c.peak <= budget]
        return min(fitting, key=lambda c: (c.seconds, c.peak))

    def _between(self, over: Levers, under: Levers, budget: int, steps: int = 3) -> None:
        """Bisect the price between a candidate that is too large and one that fits."""
        unit = self.meter.rates.unit
        low, high = max(over.price, unit / 2), max(under.price, unit)
        for _ in range(steps if high > 1.2 * low else 0):
            middle = (low * high) ** 0.5
            if self.at(Levers(middle, under.slots, under.parts)).peak <= budget:
                high = middle
            else:
                low = middle

    def smallest(self) -> Candidate:
        """The candidate with the smallest peak; of those about as small, the fastest."""
        last = self.ladder()[-1]
        if self.at(last).refused:
            self.at(Levers(last.price, last.slots))
        least = min(c.peak for c in self.found.values())
        return min((c for c in self.found.values() if c.peak <= least * (1 + _TOLERANCE)), key=lambda c: c.seconds)

    def curve(self) -> list[Candidate]:
        """Every candidate of the ladder that no other one beats in both time and memory, fastest first."""
        for levers in self.ladder():
            self.at(levers)
        return front(self.found.values())


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other one beats in both, fastest first."""
    out: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.seconds, c.peak)):
        if not out or c.peak < out[-1].peak:
            out.append(c)
    return out


def _slots(trips: int) -> tuple[int | None, int | None]:
    """Some and few sets of states for so many trips."""
    if trips <= 1:
        return None, None
    return max(2, round(trips**0.5)), 1 if trips <= 4 else max(2, round(trips ** (1 / 3)))


def _first(ladder: list[Levers], fits: Callable[[Levers], bool]) -> int | None:
    """Position of the first entry that fits, taking the ladder as sorted; None when the last does not."""
    if fits(ladder[0]):
        return 0
    low, high = 0, len(ladder) - 1
    if not fits(ladder[high]):
        found = [i for i in range(high - 1, high - 3, -1) if i > 0 and fits(ladder[i])]
        if not found:
            return None
        high = found[0]
    while high - low > 1:
        middle = (low + high) // 2
        if fits(ladder[middle]):
            high = middle
        else:
            low = middle
    return high
