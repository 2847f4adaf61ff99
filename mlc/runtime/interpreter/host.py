"""Saved tensors on the host: what loops emit is copied out when it is made, and back when the adjoint reads it.

On CUDA the copies run on a stream of their own beside the computation, through pinned memory.  What is being copied
out stays alive until the stream that computes has been told to wait for the copy, at the end of the next trip; what
comes back is asked for one trip ahead, into memory of the computing stream that the copying stream waits for.  So every
use of a block is ordered by events alone: no block needs ``Tensor.record_stream`` (whose frees come late, when the
host runs ahead of the device), and the device never holds more than two sets of a loop's tensors.  A flight that is
given up on the way, by an error say, is waited for when it is dropped.

Without CUDA the same steps run at once: tensors are cloned out and cloned back, bit by bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlc.runtime.interpreter.recording import unseen

__all__ = ["Column", "Incoming", "Lane", "Parcel", "Reader", "Shelf", "lane_of"]


class Lane:
    """The way between a device and the host's memory.

    Args:
        device: Where tensors are computed.
        host: Where they rest; None: the CPU.
    """

    def __init__(self, device: torch.device, host: torch.device | None = None) -> None:
        self.device = device
        self.host = host or torch.device("cpu")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def space(self, like: Tensor) -> Tensor:
        """Memory on the host for a tensor of the device, pinned where copies are asynchronous."""
        return torch.empty_strided(
            like.size(), like.stride(), dtype=like.dtype, device=self.host, pin_memory=self._stream is not None
        )

    def follow(self) -> None:
        """Copies asked for from now on come behind what the device was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy between device and host, beside the computation where there is a stream for it."""
        if self._stream is None:
            to.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """A point behind the copies asked for so far, to be waited for."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """What the device is given from now on comes behind the mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


@cache
def lane_of(device: torch.device) -> Lane:
    """The lane of a device, one for all loops and calls."""
    return Lane(device)


class Flight:
    """Copies under way, with the device's tensors that must stay alive until they have landed."""

    def __init__(self, tensors: list[Any], lanes: Sequence[Lane]) -> None:
        self._tensors, self._marks = tensors, [(lane, lane.mark()) for lane in lanes]

    def land(self) -> list[Any]:
        """Order the device behind the copies; hands the tensors out and keeps none."""
        marks, self._marks = self._marks, []
        for lane, mark in marks:
            lane.wait(mark)
        tensors, self._tensors = self._tensors, []
        return tensors

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.land()


class _Resting:
    """One tensor on the host, and how it lay on the device."""

    __slots__ = ("data", "lane", "size", "stride")

    def __init__(self, t: Tensor, lane: Lane, compact: Tensor) -> None:
        self.lane = lane
        self.size, self.stride = t.size(), t.stride()
        with unseen():
            self.data = lane.space(compact)

    def laid(self, back: Tensor) -> Tensor:
        """The copy that came back, as the tensor lay: also expanded, or with holes."""
        if back.size() == self.size and back.stride() == self.stride:
            return back
        out = torch.empty_strided(back.size(), self.stride, dtype=back.dtype, device=back.device)
        return out.copy_(back).as_strided(self.size, self.stride)


class Parcel:
    """Values of one moment, kept on the host; what is no tensor of a plain layout stays as it is.

    Args:
        values: Tensors (or anything); their copies begin now.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.items: list[Any] = []
        moved: list[tuple[_Resting, Tensor]] = []
        for t in values:
            compact = _compact(t) if isinstance(t, Tensor) else None
            if compact is None:
                self.items.append(t)
                continue
            resting = _Resting(t, lane_of(t.device), compact)
            self.items.append(resting)
            moved.append((resting, compact))
        lanes = list(dict.fromkeys(r.lane for r, _ in moved))
        for lane in lanes:
            lane.follow()
        with unseen():
            for r, t in moved:
                r.lane.copy(r.data, t)
        self._flight: Flight | None = Flight([t for _, t in moved], lanes)

    def land(self) -> None:
        """Let go of the device's memory, once the copies are made."""
        if self._flight is not None:
            self._flight.land()
            self._flight = None


class Incoming:
    """Values on their way back to the device; ``items`` are those of parcels."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = list(items)
        resting = [r for r in self._items if isinstance(r, _Resting)]
        backs = [torch.empty_strided(r.data.size(), r.data.stride(), dtype=r.data.dtype, device=r.lane.device)
                 for r in resting]  # fmt: skip
        lanes = list(dict.fromkeys(r.lane for r in resting))
        for lane in lanes:
            lane.follow()
        for r, back in zip(resting, backs, strict=True):
            r.lane.copy(back, r.data)
        self._flight = Flight(backs, lanes)

    def land(self) -> list[Any]:
        """The values, on the device; handed out once, so that their reader may free them."""
        backs = iter(self._flight.land())
        items, self._items = self._items, []
        return [x.laid(next(backs)) if isinstance(x, _Resting) else x for x in items]


class Shelf:
    """What one run of a loop emits, on the host: a parcel for every trip."""

    def __init__(self) -> None:
        self.parcels: list[Parcel] = []

    def put(self, values: Sequence[Any]) -> None:
        """Values of the next trip; those of the trip before leave the device."""
        self.settle()
        self.parcels.append(Parcel(values))

    def settle(self) -> None:
        """Everything has left the device."""
        if self.parcels:
            self.parcels[-1].land()


class Column:
    """One emission over the trips, as a sequence: value ``k`` of every parcel.

    Args:
        shelf: What the loop emitted; in its final order, and no longer growing, when elements are read.
        k: Which value of each trip.
    """

    def __init__(self, shelf: Shelf, k: int) -> None:
        self.shelf = shelf
        self.k = k

    @property
    def length(self) -> int:
        """Number of trips run."""
        return len(self.shelf.parcels)

    def item(self, t: int) -> Any:
        """What rests on the host of trip ``t``."""
        return self.shelf.parcels[t].items[self.k]

    def __getitem__(self, t: int) -> Any:
        return Incoming([self.item(t)]).land()[0]


class Reader:
    """Reads sequences side by side, trip by trip in any order, and fetches ahead those that rest on the host."""

    def __init__(self, seqs: Sequence[Any]) -> None:
        self.seqs = seqs
        self._columns = [(i, s) for i, s in enumerate(seqs) if isinstance(s, Column)]
        self._ahead: tuple[int, Incoming] | None = None

    def fetch(self, t: int) -> None:
        """Elements of trip ``t`` will be read next; a trip that does not exist is ignored."""
        if self._columns and 0 <= t < self._columns[0][1].length:
            self._ahead = (t, Incoming([s.item(t) for _, s in self._columns]))

    def take(self, t: int) -> list[Any]:
        """Elements of trip ``t``."""
        if not self._columns:
            return [s[t] for s in self.seqs]
        if self._ahead is None or self._ahead[0] != t:
            self._ahead = None
            self.fetch(t)
        assert self._ahead is not None
        found, self._ahead = self._ahead[1].land(), None
        here = dict(zip([i for i, _ in self._columns], found, strict=True))
        return [here.pop(i) if i in here else s[t] for i, s in enumerate(self.seqs)]


def _compact(t: Tensor) -> Tensor | None:
    """The elements of a tensor without holes and repetitions, or itself; None where places overlap otherwise."""
    places = sorted((s, n) for s, n in zip(t.stride(), t.size(), strict=True) if n != 1 and s)
    dense, span = 1, 1
    for s, n in places:
        if s < span and t.numel():
            return None
        dense, span = dense * n, span + s * (n - 1)
    if t.numel() == 0 or (dense == span and 0 not in t.stride()):
        return t
    once = [1 if s == 0 else n for s, n in zip(t.stride(), t.size(), strict=True)]
    return t.as_strided(once, t.stride()).clone(memory_format=torch.contiguous_format)
