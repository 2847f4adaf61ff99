"""When states are kept and replayed: one schedule, run by the runtime and counted by the planner.

Forward, a state is kept whenever the trip is a multiple of a stride that doubles each time the slots are full, so
the number of trips need not be known.  Backward, the nearest kept state before the wanted trip is replayed up to it,
and free slots take states on the way, evenly, so that what is replayed once serves the trips to come.  With s slots
and about as many replays per trip as in binomial checkpointing (Griewank and Walther 2000) up to the rounding of the
stride.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Slots", "replayed_steps"]


class Slots:
    """Which trips' states are held now.

    Args:
        slots: How many at most, at least 1.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.stride = 1
        self.held: list[int] = []

    def offer(self, trip: int) -> tuple[bool, list[int]]:
        """Whether to keep the state of the next trip of the forward sweep, and which ones to drop for it."""
        dropped: list[int] = []
        while len(self.held) >= self.slots and trip % self.stride == 0:
            self.stride *= 2
            out = [t for t in self.held if t % self.stride]
            dropped += out
            self.held = [t for t in self.held if t % self.stride == 0]
            if self.slots == 1:
                break
        if trip % self.stride or len(self.held) >= self.slots:
            return False, dropped
        self.held.append(trip)
        return True, dropped

    def drop_after(self, trip: int) -> list[int]:
        """States that a backward sweep at ``trip`` no longer needs."""
        out = [t for t in self.held if t > trip]
        self.held = [t for t in self.held if t <= trip]
        return out

    def way(self, trip: int) -> Iterator[tuple[int, bool]]:
        """Trips to replay to reach ``trip``, and whether to keep the state at the start of each next one."""
        start = self.held[-1]
        free = self.slots - len(self.held)
        gap = -(-(trip - start) // (free + 1)) if free > 0 else 0
        for t in range(start, trip):
            after = t + 1
            keep = free > 0 and after < trip and (after - start) % gap == 0
            if free > 0 and after == trip:
                keep = False
            if keep:
                self.held.append(after)
            yield t, keep


def replayed_steps(trips: int, slots: int) -> int:
    """Steps replayed by a whole backward sweep over ``trips``."""
    plan = Slots(slots)
    for t in range(trips):
        plan.offer(t)
    count = 0
    for t in range(trips - 1, -1, -1):
        plan.drop_after(t)
        count += sum(1 for _ in plan.way(t))
    return count
