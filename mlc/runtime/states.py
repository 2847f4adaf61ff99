"""The state store: carries of a loop kept sparsely, and rebuilt by replaying updates when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlc.ir.core import Loop
from mlc.ir.slots import Slots
from mlc.runtime.interpreter import Executable

__all__ = ["Rebuilt", "States"]


class States:
    """Carries at the start of every trip of one run of a loop, of which few sets are held.

    Args:
        op: The loop; its ``replay`` says which carries, and how they are rebuilt.
        body: The compiled replay body.
        consts: The loop's consts.
        seqs: The loop's sequences.
        emitted: The loop's emissions as they grow.
    """

    def __init__(self, op: Loop, body: Executable, consts: Sequence[Any], seqs: Sequence[Any],
                 emitted: Sequence[list[Any]]) -> None:  # fmt: skip
        assert op.replay is not None
        self.how = op.replay
        self.body = body
        self.consts = [consts[i] for i in self.how.consts]
        self.seqs = [seqs[i] for i in self.how.seqs]
        self.dense = [emitted[j] for j in self.how.dense]
        self.trips = 0
        emitted_values = set(op.body.outputs[op.n_carry :])
        self._read = {k for k, c in enumerate(self.how.carries) if op.body.inputs[c] in emitted_values}
        self._versions = _versions(self.consts)
        self._slots = Slots(self.how.slots)
        self._held: dict[int, tuple[list[Any], list[int]]] = {}
        self._now: tuple[int, dict[int, Any]] = (-1, {})

    def offer(self, trip: int, carries: Sequence[Any]) -> None:
        """The forward sweep begins a trip with these carries."""
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

    def _hold(self, trip: int, state: list[Any]) -> None:
        self._held[trip] = (state, _versions(state))

    def _at(self, trip: int) -> list[Any]:
        for t in self._slots.drop_after(trip):
            del self._held[t]
        state, versions = self._held[self._slots.held[-1]]
        if _versions(state) != versions or _versions(self.consts) != self._versions:
            raise RuntimeError(
                "a tensor that the compiled loop read was modified by an in-place operation before backward()"
            )
        state = list(state)
        for t, keep in self._slots.way(trip):
            state.extend(self.consts)
            state.extend([s[t] for s in self.seqs])
            state.extend([d[t] for d in self.dense])
            state = self.body(state)
            if keep:
                self._hold(t + 1, list(state))
        return state


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


def _versions(tensors: Sequence[Any]) -> list[int]:
    return [t._version for t in tensors if isinstance(t, Tensor)]
