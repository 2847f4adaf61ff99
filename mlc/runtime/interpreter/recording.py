"""Recording a run: when stages and trips of loops began and ended, and what was allocated after every operator.

Off unless asked for; then a stage or a trip costs one look at a variable.  When on, a dispatch mode follows every
storage from the operator that makes it until it is freed, which counts what the call holds beyond its inputs on any
device, and slows small operators down: seconds of a recorded run are those of the recorded run.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlc.ir.types import with_overhead

__all__ = ["REPLAY", "Recording", "Sample", "Span", "current", "each_stage", "each_trip", "made", "recording", "unseen"]

Executable = Callable[[list[Any]], list[Any]]
REPLAY = "replay"  # name of the spans of steps that rebuild states
MOST = 20_000  # samples kept of a stage


@dataclass(frozen=True, slots=True)
class Span:
    """A stage (depth 0), a trip of a loop (its nesting depth) or a step that is replayed, seconds since the call began.

    ``bytes``: what the call held beyond its inputs when it ended.
    """

    name: str
    depth: int
    start: float
    end: float
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes that the call holds beyond its inputs: in which stage, when, and after which share of its operators."""

    stage: str
    seconds: float
    share: float
    bytes: int


@dataclass
class Recording:
    """What the last call did, while recording was on.

    Attributes:
        spans: Stages and trips, in the order in which they ended.
        samples: Memory after operators; long stages are thinned, each sample the largest that it stands for.
        peak_bytes: Largest number of bytes held at any operator.
    """

    spans: list[Span] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    peak_bytes: int = 0
    _began: float = 0.0
    _depth: int = 0
    _held: int = 0
    _blind: bool = False
    _replaying: bool = False
    _meter: Any = None
    _known: dict[int, Any] = field(default_factory=dict)

    def run(self, body: Executable, args: list[Any], name: str) -> list[Any]:
        """One trip of a loop, or a step of a replay, whose own loops are not looked into."""
        if self._replaying:
            return body(args)
        self._depth += 1
        self._replaying = name == REPLAY
        start = time.perf_counter() - self._began
        try:
            return body(args)
        finally:
            self.spans.append(Span(name, self._depth, start, time.perf_counter() - self._began, self._held))
            self._depth -= 1
            self._replaying = False

    def stage(self, body: Executable, args: list[Any], name: str) -> list[Any]:
        """A whole stage, with its memory; the first one begins the call."""
        if name == "forward":
            self._begin()
        for x in _tensors(args):
            self._follow(x, 0)
        meter = self._meter = _Meter(self)
        start = time.perf_counter() - self._began
        with meter:
            outs = body(args)
        self.spans.append(Span(name, 0, start, time.perf_counter() - self._began, self._held))
        self.samples += [Sample(name, t, (i + 1) / len(meter.taken), b) for i, t, b in _thinned(meter.taken)]
        return outs

    def _begin(self) -> None:
        """Forget the call before; what it still holds is no concern of this one."""
        self._known.clear()
        self.spans, self.samples, self.peak_bytes = [], [], 0
        self._known, self._held, self._began = {}, 0, time.perf_counter()

    def _follow(self, t: torch.Tensor, size: int | None = None) -> None:
        """Count a storage until it is freed; one that is known is counted already."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = with_overhead(storage.nbytes(), storage.device) if size is None else size
        self._held += size
        known = self._known

        def freed(_: Any) -> None:
            if known.pop(key, None) is not None:
                self._held -= size

        known[key] = weakref.ref(storage, freed)


class _Meter(TorchDispatchMode):
    """Samples what a recording holds after every operator."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self.taken: list[tuple[float, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        r = self.recording
        if r._blind:
            return func(*args, **(kwargs or {}))
        for t in _tensors(args):
            r._follow(t, 0)  # what nobody allocated here is not the call's: a batch that was drawn
        out = func(*args, **(kwargs or {}))
        self.take(out)
        return out

    def take(self, out: Any) -> None:
        """A sample, once an operator or a compiled kernel has given its results."""
        r = self.recording
        for t in _tensors(out):
            r._follow(t)
        r.peak_bytes = max(r.peak_bytes, r._held)
        self.taken.append((time.perf_counter() - r._began, r._held))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)


def _thinned(taken: list[tuple[float, int]]) -> list[tuple[int, float, int]]:
    """At most MOST of the samples with their positions, each the largest of those it stands for."""
    n = len(taken)
    if n <= MOST:
        return [(i, t, b) for i, (t, b) in enumerate(taken)]
    cuts = [k * n // MOST for k in range(MOST + 1)]
    best = [max(range(a, b), key=lambda i: taken[i][1]) for a, b in pairwise(cuts)]
    return [(i, *taken[i]) for i in best]


# ---- the switch

_current: Recording | None = None


def current() -> Recording | None:
    """The recording that is on."""
    return _current


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the calls made inside; ``report`` and ``draw`` then show what was measured.

    Example::

        with mlc.recording():
            fn(model, batches).backward()
        fn.report.save_trace("trace.json")
    """
    global _current
    before, _current = _current, Recording()
    try:
        yield _current
    finally:
        _current = before


@contextmanager
def resumed(into: Recording | None) -> Iterator[None]:
    """Record into what another stage of the same call began; nothing for None."""
    global _current
    if into is None:
        yield
        return
    before, _current = _current, into
    try:
        yield
    finally:
        _current = before


@contextmanager
def unseen() -> Iterator[None]:
    """What is allocated inside is memory of the host for tensors of the device: a recording does not count it."""
    now = _current
    if now is None or now._blind:
        yield
        return
    now._blind = True
    try:
        yield
    finally:
        now._blind = False


def made(outs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Results of a compiled kernel, which allocates where no dispatch mode sees it."""
    if _current is not None and _current._meter is not None:
        _current._meter.take(list(outs))
    return outs


def each_trip(body: Executable, name: str) -> Executable:
    """The body of a loop or of a replay, recorded each time it runs when recording is on."""

    def run(args: list[Any]) -> list[Any]:
        return body(args) if _current is None else _current.run(body, args, name)

    return run


def each_stage(body: Executable, name: str) -> Executable:
    """A stage, recorded when recording is on."""

    def run(args: list[Any]) -> list[Any]:
        return body(args) if _current is None else _current.stage(body, args, name)

    return run
