"""What a program draws while it runs: batches from the user's iterables, numbers from random generators.

The forward sweep draws trip by trip, in the order of the user's loop.  Batches are kept; random numbers are not:
the generator's state before each trip is (a few kilobytes), and the reverse sweep draws them again from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.ir.core import Draw, Effect, EffectCall, Feed, NestedEffects, Random, Seed
from mlc.ir.types import TensorType, Type
from mlc.runtime.interpreter.interpreter import run_random
from mlc.runtime.interpreter.saved import alias, check_versions, memory, versions

__all__ = ["Drawer", "Stale", "Tape", "feed_runner"]


class Stale(Exception):
    """What was drawn does not fit the traced program (another shape or number of items): trace again."""


class Drawer:
    """Iterators over the user's iterables for one call.

    Args:
        open_source: ``(source, visit) -> iterator`` over items.
        tensors: Tensors of an item, in the traced order.
    """

    def __init__(
        self, open_source: Callable[[int, int], Iterator[Any]], tensors: Callable[[Any], list[Tensor]]
    ) -> None:
        self._open = open_source
        self._tensors = tensors
        self._iterators: dict[tuple[int, int], Iterator[Any]] = {}
        self.drawn: dict[tuple[int, int], list[Any]] = {}
        self.memories: set[int | None] = set()

    @property
    def items(self) -> dict[int, list[Any]]:
        """Items by source, in the order in which they were drawn."""
        out: dict[int, list[Any]] = {}
        for (source, _), items in self.drawn.items():
            out.setdefault(source, []).extend(items)
        return out

    def again(self) -> Drawer:
        """One that gives the same items."""
        return Drawer(lambda source, visit: iter(self.drawn.get((source, visit), ())), self._tensors)

    def next(self, op: Draw, types: Sequence[Type], trips: tuple[int, ...] = ()) -> list[Tensor]:
        """Tensors of the next item, in these trips of the loops around (outermost first).

        Raises:
            StopIteration: at the end.
            Stale: when the item has other types than were traced.
        """
        key = (op.source, op.at(trips))
        it = self._iterators.get(key)
        if it is None:
            it = self._iterators[key] = self._open(*key)
        item = next(it)
        self.drawn.setdefault(key, []).append(item)
        found = [t.clone() if t.is_inference() else alias(t) for t in self._tensors(item)]  # autograd cannot save those
        self.memories.update(map(memory, found))
        if [_shape(TensorType.of(t)) for t in found] != [_shape(t) for t in types]:
            raise Stale(f"an item of iterable {op.source} has another shape than before")
        return found

    def finished(self, source: int, visit: int) -> bool:
        """Whether an iteration that the trace saw end is at its end now."""
        it = self._iterators.get((source, visit))
        if it is None:
            it = self._iterators[(source, visit)] = self._open(source, visit)
        try:
            item = next(it)
        except StopIteration:
            return True
        self.drawn.setdefault((source, visit), []).append(item)
        return False


def _shape(t: Type) -> Any:
    assert isinstance(t, TensorType)
    return t.dtype, t.shape, t.device


def _generators(effects: Sequence[Effect]) -> list[Any]:
    out: list[Any] = []
    for e in effects:
        if isinstance(e, NestedEffects):
            out += _generators(e.effects)
        elif isinstance(e.op, Random):
            g = dict(e.kwargs).get("generator")
            device = next((a for a in (*e.args, *dict(e.kwargs).values()) if isinstance(a, torch.device)), None)
            out.append(g if g is not None else (device or torch.device("cpu")).type)
    unique: list[Any] = []
    for g in out:
        if not any(g is u or (isinstance(g, str) and g == u) for u in unique):
            unique.append(g)
    return unique


def _state(g: Any) -> Tensor:
    if isinstance(g, torch.Generator):
        return g.get_state()
    return torch.cuda.get_rng_state() if g == "cuda" else torch.get_rng_state()


def _restore(g: Any, state: Tensor) -> None:
    if isinstance(g, torch.Generator):
        g.set_state(state)
    elif g == "cuda":
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


class Tape:
    """Effects of one loop: ``at(t)`` gives the values of trip t, drawn once and replayed afterwards."""

    def __init__(self, effects: tuple[Effect, ...], trips: int | None, drawer: Drawer) -> None:
        self.effects = effects
        self.trips = trips
        self.drawer = drawer
        self.generators = _generators(effects)
        self.kept: list[list[Any]] = []
        self._current: tuple[int, list[Any]] | None = None

    def at(self, t: int) -> list[Any]:
        """Values of trip ``t``."""
        if self._current is not None and self._current[0] == t:
            return self._current[1]
        if t == len(self.kept):
            kept: list[Any] = []
            values = self._run(self.effects, None, kept, (t,))
            self.kept.append(kept)
        else:
            now = [_state(g) for g in self.generators]
            values = self._run(self.effects, iter(self.kept[t]), None, (t,))
            for g, s in zip(self.generators, now, strict=True):
                _restore(g, s)
        self._current = (t, values)
        return values

    def _run(self, effects: Sequence[Effect], replay: Iterator[Any] | None, kept: list[Any] | None,
             trips: tuple[int, ...]) -> list[Any]:  # fmt: skip
        """Execute or replay; the generators' states are kept wherever something else may have moved them."""
        out: list[Any] = []
        moved = True
        for e in effects:
            if isinstance(e, NestedEffects):
                out.extend(self._nested(e, replay, kept, trips))
                moved = True
            elif isinstance(e.op, Seed):
                if replay is None:
                    torch.manual_seed(e.op.value)
                moved = True
            elif isinstance(e.op, Random):
                if moved:
                    self._mark(replay, kept)
                    moved = False
                out.extend(run_random(e.op, e.args, dict(e.kwargs)))
            else:
                out.extend(self._batch(e, replay, kept, trips))
                moved = True
        return out

    def _mark(self, replay: Iterator[Any] | None, kept: list[Any] | None) -> None:
        """Keep the generators' states, or go back to them."""
        if kept is not None:
            kept.append([_state(g) for g in self.generators])
        elif replay is not None:
            for g, s in zip(self.generators, next(replay), strict=True):
                _restore(g, s)

    def _batch(self, e: EffectCall, replay: Iterator[Any] | None, kept: list[Any] | None,
               trips: tuple[int, ...]) -> list[Tensor]:  # fmt: skip
        if replay is not None:
            tensors, before = next(replay)
            check_versions(tensors, before)
            return list(tensors)
        tensors = self._draw(e, trips)
        assert kept is not None
        kept.append((tensors, versions(tensors)))
        return tensors

    def _draw(self, e: EffectCall, trips: tuple[int, ...]) -> list[Tensor]:
        assert isinstance(e.op, Draw)
        first = e is next((x for x in self.effects if isinstance(x, EffectCall) and isinstance(x.op, Draw)), None)
        try:
            return self.drawer.next(e.op, e.types, trips)
        except StopIteration:
            if first and self.trips is None:
                raise
            raise Stale("an iterable ended earlier than before") from None

    def _nested(self, e: NestedEffects, replay: Iterator[Any] | None, kept: list[Any] | None,
                trips: tuple[int, ...]) -> list[list[Any]]:  # fmt: skip
        if e.trips is None:
            raise Stale("an inner loop of unknown length")
        rows = [self._run(e.effects, replay, kept, (*trips, i)) for i in range(e.trips)]
        return [list(column) for column in zip(*rows, strict=True)]


class FeedSeq:
    """One value per trip, drawn when asked for."""

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape = tape
        self.index = index

    @property
    def length(self) -> int | None:
        """Number of trips; for an open end, known once the forward sweep is over."""
        return self.tape.trips

    def __getitem__(self, t: int) -> Any:
        return self.tape.at(t)[self.index]


def feed_runner(op: Feed, drawer: Callable[[], Drawer]) -> Callable[[list[Any]], list[Any]]:
    """Callable for a ``feed`` equation."""
    n = count_leaves(op.effects)

    def run(args: list[Any]) -> list[Any]:
        tape = Tape(op.effects, op.trips, drawer())
        return [FeedSeq(tape, i) for i in range(n)]

    return run


def count_leaves(effects: Sequence[Effect]) -> int:
    """Number of values that one trip of these effects gives."""
    return sum(count_leaves(e.effects) if isinstance(e, NestedEffects) else len(e.types) for e in effects)
