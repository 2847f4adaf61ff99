"""The search for a plan: candidates on the curve of time and memory, and the choice under a budget.

What is kept and what is computed again follows from one price, seconds per byte of peak (Lagrange): every pass buys
memory wherever it is cheaper than that.  The search walks along prices, together with the levers that are not
continuous (sets of states, micro-batches), evaluates the predicted peak and time of each candidate, and takes the
fastest that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from mlc.ir.core import Loop
from mlc.ir.lowered.contract import Context, Findings, Levers, Refused
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.origin import Origin
from mlc.passes.cost.equations import Meter, device_of
from mlc.passes.cost.memory import peak_bytes, set_bytes
from mlc.passes.lowering.pipeline import PIPELINE, Passes, lowered
from mlc.passes.microbatch.independence import batchwise
from mlc.passes.planning.options import free_memory
from mlc.passes.remat.offload import LEAST, Transfers, transfers

__all__ = ["Candidate", "Search", "front", "thrift"]

# Prices of a byte, in times of moving it once: each step buys about a quarter of what is left to buy.
_PRICES = (0.0, 2.0, 8.0, 32.0, 128.0, 512.0, 1024.0, 8192.0)
_WORTH = 0.8  # "min": a percent of memory is worth so many percent of time
_MOST_PARTS = 16
_FULL = 0.93  # of a budget: what is left then buys next to no time
_SMALL = 1500  # equations of a program for which trying a few more levers is quick
_ROOM = 0.5  # of what the host has free, for saved tensors: pinned memory comes in powers of two


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
        transfers: Copies to the host and back; their seconds are counted in ``seconds``.
    """

    mode: str
    levers: Levers
    stages: Stages
    peak: int
    seconds: float
    refused: tuple[Refused, ...] = ()
    transfers: Transfers = field(default_factory=Transfers)


@dataclass
class Search:
    """Candidates of one program under one mode, evaluated when they are asked for.

    Args:
        mode: How derivatives go.
        joint: The differentiated program.
        passes: The pipeline.
    """

    mode: str
    joint: Joint | Stages
    passes: Passes = PIPELINE
    found: dict[Levers, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        region = self.joint.forward if isinstance(self.joint, Stages) else self.joint.region
        self.device = device_of(region)
        self.meter = Meter(self.device)
        self.small = sum(1 for _ in region.walk()) <= _SMALL
        self.room = int(_ROOM * free_memory(torch.device("cpu")))
        self.trips = max((e.op.count for e in region.eqns if isinstance(e.op, Loop)), default=1)

    def at(self, levers: Levers) -> Candidate:
        """The candidate with these levers."""
        known = self.found.get(levers)
        if known is None:
            context = Context(levers=levers, findings=Findings())
            stages = lowered(self.joint, context, self.passes)
            refused = context.findings.refused
            seconds = self.meter.region(stages.forward).seconds
            seconds += 0.0 if stages.backward is None else self.meter.region(stages.backward).seconds
            copies = self._copies(stages) if levers.offload is not None else Transfers()
            seconds += copies.seconds
            known = Candidate(self.mode, levers, stages, peak_bytes(stages), seconds, tuple(refused), copies)
            self.found[levers] = known
        return known

    def _copies(self, stages: Stages) -> Transfers:
        return transfers((stages.forward, *([] if stages.backward is None else [stages.backward])), self.meter)

    def _fits(self, c: Candidate, budget: int | None = None) -> bool:
        """Whether the device's memory, where there is a budget, and the host's are enough."""
        return (budget is None or c.peak <= budget) and c.transfers.bytes <= self.room

    @property
    def offloads(self) -> bool:
        """Whether saved tensors may rest on the host: where that is another memory than the device's."""
        return self.device.type != "cpu" and self.meter.rates.host is not None

    def ladders(self) -> list[list[Levers]]:
        """The ladder, and the same with saved tensors on the host where that is worth a try."""
        plain = self.ladder()
        return [plain, [replace(x, offload=LEAST) for x in plain]] if self.offloads else [plain]

    def ladder(self) -> list[Levers]:
        """Levers from the fastest to the smallest."""
        unit = self.meter.rates.unit
        some, few = _slots(self.trips)
        prices = [p * unit for p in _PRICES]
        out = [Levers(p) for p in prices[:4]]
        out += [Levers(prices[4], some), Levers(prices[4], some, 2), Levers(prices[4], few, 4)]
        out += [Levers(prices[5], few, 4), Levers(prices[6], few, 4), Levers(prices[7], few, self.parts)]
        return list(dict.fromkeys(out))

    @cached_property
    def parts(self) -> int:
        """Most parts of a batch that are tried: 4, or more where there are as many examples."""
        if isinstance(self.joint, Stages):
            return 4
        bodies = [
            e.op.body for e in self.joint.region.eqns if isinstance(e.op, Loop) and e.origin is not Origin.ADJOINT
        ]
        body = max(bodies, key=lambda b: len(b.eqns), default=self.joint.region)
        found = batchwise(body)
        n = 0 if isinstance(found, Refused) else found.n
        return next((k for k in (_MOST_PARTS, _MOST_PARTS // 2) if n and n % k == 0), 4)

    def fastest(self, budget: int) -> Candidate | None:
        """The fastest candidate whose peak is at most ``budget`` bytes, as far as the search sees."""
        if self._fits(self.at(Levers(0.0)), budget):  # with everything kept where it is made, nothing is faster
            return self._quickest(budget)
        for ladder in self.ladders():
            best = _first(ladder, lambda x: self._fits(self.at(x), budget))
            if best:
                self._between(ladder[best - 1], ladder[best], budget)
                where = ladder[best].offload
                fitting = (c for c in self.found.values() if self._fits(c, budget) and c.levers.offload == where)
                self._more_states(min(fitting, key=_time), budget)
                if self.small:
                    self._around(min((c for c in self.found.values() if self._fits(c, budget)), key=_time).levers)
        if not any(self._fits(c, budget) for c in self.found.values()):
            self._bottom()
        return self._quickest(budget)

    def _quickest(self, budget: int) -> Candidate | None:
        return min((c for c in self.found.values() if self._fits(c, budget)), key=_time, default=None)

    def _between(self, over: Levers, under: Levers, budget: int, steps: int = 2) -> None:
        """Bisect the price between a candidate that is too large and one that fits."""
        unit = self.meter.rates.unit
        low, high = max(over.price, unit / 2), max(under.price, unit)
        found = self.at(under)
        for _ in range(steps if high > 1.2 * low else 0):
            if found.peak > _FULL * budget:
                break
            middle = (low * high) ** 0.5
            c = self.at(replace(under, price=middle))
            if self._fits(c, budget):
                found, high = c, middle
            else:
                low = middle

    def _more_states(self, c: Candidate, budget: int) -> None:
        """As many sets of states as the budget has room for."""
        loops = [e.op for e in c.stages.forward.eqns if isinstance(e.op, Loop)]
        size = max((set_bytes(op) for op in loops if op.replay is not None), default=0)
        if size and c.levers.slots is not None and budget - c.peak >= size:
            self.at(replace(c.levers, slots=min(c.levers.slots + (budget - c.peak) // size, self.trips)))

    def _around(self, levers: Levers) -> None:
        """The same price with other sets of states and other micro-batches."""
        for slots in dict.fromkeys((levers.slots, 1 if self.trips > 1 else None, None)):
            for parts in dict.fromkeys((1, 2, levers.parts)):
                self.at(replace(levers, slots=slots, parts=parts))

    def smallest(self) -> Candidate:
        """The candidate with the smallest peak."""
        self._bottom()
        return min((c for c in self.found.values() if self._fits(c)), key=_peak)

    def frugal(self) -> Candidate:
        """What ``memory="min"`` takes: the candidate with the smallest peak that is worth its time."""
        self._bottom()
        return min((c for c in self.found.values() if self._fits(c)), key=thrift)

    def _bottom(self) -> None:
        """Evaluate the lower end of the ladder."""
        for ladder in self.ladders():
            for levers in ladder[-3:-1]:
                self.at(levers)
            if self.at(ladder[-1]).refused:
                self.at(replace(ladder[-1], parts=1))
        for best in (thrift, _peak) if self.small else ():
            self._around(min((c for c in self.found.values() if self._fits(c)), key=best).levers)

    def curve(self, say: Callable[[str], None] = lambda text: None) -> list[Candidate]:
        """Every candidate of the ladder that no other one beats in both time and memory, fastest first."""
        every = [x for ladder in self.ladders() for x in ladder]
        for i, levers in enumerate(every):
            say(f"{self.mode}, {i + 1} of {len(every)}")
            self.at(levers)
        return front(c for c in self.found.values() if self._fits(c))


def thrift(c: Candidate) -> float:
    """How much of time and memory a candidate needs, less is better."""
    return math.log(max(c.seconds, 1e-12)) + _WORTH * math.log(max(c.peak, 1))


def _time(c: Candidate) -> tuple[float, int]:
    return c.seconds, c.peak


def _peak(c: Candidate) -> tuple[int, float]:
    return c.peak, c.seconds


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
    low, high = 0, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(ladder[middle]):
            high = middle
        else:
            low = middle
    return high if high < len(ladder) else None
