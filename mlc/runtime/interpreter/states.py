"""The state store: carries of a loop kept sparsely, and rebuilt by replaying updates when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlc.ir.core import Loop
from mlc.ir.lowered.slots import Slots
from mlc.runtime.interpreter.host import Incoming, Parcel, Reader
from mlc.runtime.interpreter.interpreter import Executable
from mlc.runtime.interpreter.saved import check_versions, versions

__all__ = ["Rebuilt", "States"]


class States:
    """Carries at the start of every trip of one run of a loop, of which few sets are held.

    Args:
        op: The loop; its ``replay`` says which carries, and how they are rebuilt.
        body: The compiled replay body.
        consts: The loop's consts.
        seqs: The loop's sequences.
        emitted: The loop's emissions as they grow.
        host: Whether sets rest on the host (but the first, which belongs to others as well).
    """

    def __init__(self, op: Loop, body: Executable, consts: Sequence[Any], seqs: Sequence[Any],
                 emitted: Sequence[Any], host: bool = False) -> None:  # fmt: skip
        assert op.replay is not None
        self.how = op.replay
        self.body = body
        self.consts = [consts[i] for i in self.how.consts]
        self.read = Reader([*[seqs[i] for i in self.how.seqs], *[emitted[j] for j in self.how.dense]])
        self.host = host
        self.trips = 0
        emitted_values = set(op.body.outputs[op.n_carry :])
        self._read = {k for k, c in enumerate(self.how.carries) if op.body.inputs[c] in emitted_values}
        self._versions = versions(self.consts)
        self._slots = Slots(self.how.slots)
        self._held: dict[int, tuple[list[Any], list[int]] | Parcel] = {}
        self._now: tuple[int, dict[int, Any]] = (-1, {})
        self._leaving: Parcel | None = None
        self._ahead: tuple[int, Incoming] | None = None

    def offer(self, trip: int, carries: Sequence[Any]) -> None:
        """The forward sweep begins a trip with these carries."""
        self.settle()
        keep, dropped = self._slots.offer(trip)
        for t in dropped:
            del self._held[t]
        if keep:
            self._hold(trip, [carries[c] for c in self.how.carries])
        self.trips = trip + 1

    def take(self, trip: int, k: int) -> Any:
        """State ``k`` at the start of a trip; handed out once, so that its reader may free it."""
        at, now = self._now
        if at != trip or k not in now:
            now.clear()
            now = {i: x for i, x in enumerate(self._at(trip)) if i in self._read}  # others serve replays only
            self._now = (trip, now)
        return now.pop(k)

    def settle(self) -> None:
        """Sets that are kept on the host have left the device."""
        if self._leaving is not None:
            self._leaving.land()
            self._leaving = None

    def _hold(self, trip: int, state: list[Any]) -> None:
        if not self.host or trip == 0:
            self._held[trip] = (state, versions(state))
            return
        self._held[trip] = self._leaving = Parcel(state)

    def _at(self, trip: int) -> list[Any]:
        self.settle()
        for t in self._slots.drop_after(trip):
            del self._held[t]
        state = self._set(self._slots.held[-1])
        steps = list(self._slots.way(trip))
        for i, (t, keep) in enumerate(steps):
            state.extend(self.consts)
            state.extend(self.read.take(t))
            self.read.fetch(t + 1 if i + 1 < len(steps) else -1)
            state = self.body(state)
            self.settle()
            if keep:
                self._hold(t + 1, list(state))
        self.settle()
        self._fetch(trip - 1)
        return state

    def _set(self, trip: int) -> list[Any]:
        """The set held of a trip, on the device."""
        held = self._held[trip]
        if isinstance(held, Parcel):
            here = self._ahead[1] if self._ahead is not None and self._ahead[0] == trip else Incoming(held.items)
            self._ahead = None
            state = here.land()
        else:
            state, before = list(held[0]), held[1]
            check_versions(state, before)
        check_versions(self.consts, self._versions)
        return state

    def _fetch(self, trip: int) -> None:
        """The state of this trip will be asked for next: bring the set that it is rebuilt from."""
        at = max((t for t in self._slots.held if t <= trip), default=0)
        held = self._held.get(at)
        self._ahead = (at, Incoming(held.items)) if isinstance(held, Parcel) else None


class Rebuilt:
    """One state over the trips, as a sequence."""

    def __init__(self, states: States, k: int) -> None:
        self.states = states
        self.k = k

    @property
    def length(self) -> int:
        """Number of trips run."""
        return self.states.trips

    def __getitem__(self, t: int) -> Any:
        return self.states.take(t if t >= 0 else t + self.states.trips, self.k)
