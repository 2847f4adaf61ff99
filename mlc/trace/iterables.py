"""Iterables of the user's: drawn for real, one ``draw`` equation per item, never baked into the program."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, Subset, TensorDataset

from mlc.errors import CaptureError
from mlc.trace.python.batches import leaves as _leaves
from mlc.trace.python.frames import is_user_code
from mlc.trace.python.places import Path, Roots
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.tracer import Tracer

__all__ = ["Source", "Sources", "batch_tensors", "substitute"]


def batch_tensors(item: object) -> list[Tensor]:
    """Tensors in an item, in a fixed order."""
    return [t for _, t in _leaves(item, ())]


def _plain(item: object) -> bool:
    """Whether an item holds nothing but tensors (other values would be baked into the program)."""
    if isinstance(item, Tensor) or item is None:
        return True
    if isinstance(item, (list, tuple)):
        return all(_plain(x) for x in item)
    if isinstance(item, dict):
        return all(_plain(x) for x in item.values())
    if hasattr(item, "__dict__"):
        return all(_plain(x) for x in vars(item).values())
    return False


@dataclass
class Source:
    """One iterable: the object, where it is found at a later call (None: this very object), what was seen of it.

    Attributes:
        once: An iterator: it cannot be iterated again.
        length_used: The length was asked for, so it is part of what must be equal.
        visits: Items drawn per iteration over it, and whether it was exhausted.
    """

    object: Any
    path: Path | None
    once: bool = False
    length_used: bool = False
    indexed: bool = False
    mixed: bool = False
    visits: list[tuple[list[Any], bool]] = field(default_factory=list)
    changing: bool = False
    generic: bool = False


def _python_random() -> Any:
    np = sys.modules.get("numpy")
    state: list[Any] = [hash(random.getstate())]
    if np is not None:
        s = np.random.get_state()
        state.append((hash(s[1].tobytes()), s[2]))
    return tuple(state)


class Sources:
    """All iterables of one trace.

    Args:
        tracer: What records it.
        roots: What stands where before the call.
    """

    def __init__(self, tracer: Tracer, roots: Roots) -> None:
        self.tracer = tracer
        self.all: list[Source] = []
        self._by_id: dict[int, int] = {}
        self.known = {id(o) for o in (*roots.objects.values(), *roots.modules.values())}  # there before the call
        self._random = _python_random()
        self.host_random = False
        self.drawn = roots.drawn  # items that were taken before and come first
        self._locals: dict[tuple[int, int], dict[str, Any]] = {}

    def add(self, obj: object, path: Path | None, *, once: bool = False) -> int:
        """Index of the source for ``obj``."""
        at = self._by_id.get(id(obj))
        if at is None:
            at = self._by_id[id(obj)] = len(self.all)
            self.all.append(Source(obj, path, once))
        return at

    def check_random(self) -> None:
        """Python's or NumPy's generator moved while user code ran: the trace cannot be used again."""
        now = _python_random()
        self.host_random |= now != self._random

    def iterate(self, source: int, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Draw items for real and tell the tracer of each."""
        self.tracer.place()  # a loop over it begins anew: without this, one inner loop runs on through the outer one
        src = self.all[source]
        visit = len(src.visits)
        src.visits.append(([], False))
        self.check_random()
        before = self.tracer.before_item()
        with _disable_current_modes(), self.tracer.unnoticed():
            it = make()
        self._random = _python_random()
        self.tracer.after_item((source, visit, -1), before)
        return self._items(source, visit, it)

    def _items(self, source: int, visit: int, it: Iterator[Any]) -> Iterator[Any]:
        src = self.all[source]
        items = src.visits[visit][0]
        while True:
            self.check_random()
            before = self.tracer.before_item()
            key = (source, visit, len(items))
            try:
                with _disable_current_modes(), self.tracer.unnoticed():
                    item = next(it)
            except StopIteration:
                self._random = _python_random()
                self.tracer.after_item(key, before)
                src.visits[visit] = (items, True)
                return
            self._random = _python_random()
            self.tracer.after_item(key, before)
            self._watch(src, source, visit, len(items))
            items.append(item)
            src.mixed |= not _plain(item)
            self.tracer.drawn(source, visit, batch_tensors(item))
            yield item

    def _watch(self, src: Source, source: int, visit: int, k: int) -> None:
        """Python numbers of the user's frame that change from item to item make the length matter."""
        if k == 0:
            return
        f = sys._getframe(2)
        while f is not None and f is not self.tracer.sites.base:
            if is_user_code(f.f_code):
                now = {n: v for n, v in f.f_locals.items() if type(v) in (int, float, bool, str)}
                before = self._locals.get((source, visit))
                if before is not None and any(before.get(n, v) != v for n, v in now.items()):
                    src.changing = True
                self._locals[(source, visit)] = now
                return
            f = f.f_back  # type: ignore[assignment]


class _TracedList(list):  # type: ignore[type-arg]
    """A list of batches while tracing; what changes it changes the user's list."""

    _changed = False

    def _bind(self, sources: Sources, source: int) -> _TracedList:
        self._sources, self._source = sources, source
        return self

    def __iter__(self) -> Iterator[Any]:
        if self._changed:  # a buffer that the loop fills: its items are values like all others
            return list.__iter__(self)
        return self._sources.iterate(self._source, lambda: list.__iter__(self))

    def __len__(self) -> int:
        self._sources.all[self._source].length_used = True
        return list.__len__(self)

    def __getitem__(self, i: Any) -> Any:
        self._sources.all[self._source].indexed = True
        return list.__getitem__(self, i)


def _changing(name: str) -> Any:
    change = getattr(list, name)

    @functools.wraps(change)
    def call(self: _TracedList, *args: object, **kwargs: object) -> Any:
        theirs = self._sources.all[self._source].object
        found = change(theirs, *args, **kwargs)
        list.__setitem__(self, slice(None), theirs)
        self._changed = self._sources.all[self._source].length_used = True
        return self if found is theirs else found

    return call


for _name in ("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "__setitem__", "__delitem__",
              "__iadd__", "__imul__"):  # fmt: skip
    setattr(_TracedList, _name, _changing(_name))


class _TracedTuple(tuple):  # type: ignore[type-arg]
    """A tuple of batches while tracing."""

    def _bind(self, sources: Sources, source: int) -> _TracedTuple:
        self._sources, self._source = sources, source
        return self

    def __iter__(self) -> Iterator[Any]:
        return self._sources.iterate(self._source, lambda: tuple.__iter__(self))

    def __len__(self) -> int:
        self._sources.all[self._source].length_used = True
        return tuple.__len__(self)

    def __getitem__(self, i: Any) -> Any:
        self._sources.all[self._source].indexed = True
        return tuple.__getitem__(self, i)


class _TracedIterator:
    """An iterator of the user's while tracing."""

    def __init__(self, sources: Sources, source: int, it: Any) -> None:
        self._it = sources.iterate(source, lambda: it)

    def __iter__(self) -> _TracedIterator:
        return self

    def __next__(self) -> Any:
        return next(self._it)


class Swaps:
    """What stands for the user's lists, and in their containers, for the time of a run."""

    def __init__(self) -> None:
        self._all: list[tuple[Any, Any, Any, Any]] = []
        self._made: list[tuple[Any, Any]] = []  # what stands for a list or tuple, and that one
        self._held: list[int] = []  # references to each before the run

    def made(self, new: object, old: object) -> Any:
        """Note what stands for one of the user's."""
        self._made.append((new, old))
        return new

    def put(self, container: Any, key: Any, new: Any) -> None:
        """Put something in the place of an entry."""
        self._all.append((container, key, new, container[key]))
        container[key] = new

    def back(self) -> None:
        """Put back what the run did not replace itself."""
        for container, key, new, old in self._all:
            there = key in container if isinstance(container, dict) else key < len(container)
            if there and container[key] is new:
                container[key] = old
        self._all.clear()
        counts = zip(self._made, self._held, self._references(), strict=False)
        kept = [pair for pair, before, now in counts if now > before]
        holders = gc.get_referrers(*(new for new, _ in kept)) if kept else []
        for holder in holders:
            for new, old in kept:
                _replace(holder, new, old)
        self._held.clear()

    def ready(self) -> None:
        """The run begins: whoever holds more afterwards, with entries put back, is the user's code."""
        entries = Counter(id(x) for _, _, new, _ in self._all for x in _parts(new))
        self._held = [held - entries[id(new)] for (new, _), held in zip(self._made, self._references(), strict=True)]

    def _references(self) -> list[int]:
        return [sys.getrefcount(pair[0]) for pair in self._made]


def _parts(x: object) -> Iterator[object]:
    """An entry, and what is in it where it is a tuple."""
    yield x
    if type(x) is tuple:
        for part in x:
            yield from _parts(part)


def _replace(holder: object, new: object, old: object) -> None:
    """The user's code kept what it was given: it shall have kept its own list."""
    if isinstance(holder, types.CellType) and holder.cell_contents is new:
        holder.cell_contents = old
    elif type(holder) is list:
        holder[:] = [old if x is new else x for x in holder]
    elif isinstance(holder, dict):
        for k in [k for k, v in holder.items() if v is new]:
            dict.__setitem__(holder, k, old)


@contextlib.contextmanager
def swapped() -> Iterator[Swaps]:
    """Swaps that are put back in the end."""
    swaps = Swaps()
    try:
        yield swaps
    finally:
        swaps.back()


def substitute(
    x: Any, path: Path, batches: dict[Path, Any], iterators: dict[Path, Any], sources: Sources, swaps: Swaps
) -> Any:
    """Arguments with lists of batches and iterators replaced by ones that tell the tracer.

    Dicts and lists stay the user's own objects, with other entries until ``swaps.back()``.
    """
    if path in iterators:
        return _TracedIterator(
            sources, sources.add(x, path, once=True), itertools.chain(sources.drawn.get(path, ()), x)
        )
    if path in batches:
        cls = _TracedList if isinstance(x, list) else _TracedTuple
        if type(x) in (list, tuple):
            return swaps.made(cls(x)._bind(sources, sources.add(x, path)), x)
        return x
    if type(x) is tuple:
        parts = [substitute(v, (*path, i), batches, iterators, sources, swaps) for i, v in enumerate(x)]
        return x if all(a is b for a, b in zip(parts, x, strict=True)) else tuple(parts)
    if type(x) in (list, dict):
        for k, v in list(enumerate(x) if isinstance(x, list) else x.items()):
            new = substitute(v, (*path, k), batches, iterators, sources, swaps)
            if new is not v:
                swaps.put(x, k, new)
    return x


def loader_patches(sources: Sources, loaders: dict[int, Path], active: Callable[[], bool]) -> Any:
    """Replacements for ``DataLoader.__iter__`` and ``__len__`` while tracing."""
    original_iter, original_len = DataLoader.__iter__, DataLoader.__len__

    def source_of(loader: object) -> int:
        return sources.add(loader, loaders.get(id(loader)))

    def iterate(loader: Any) -> Any:
        if not active():
            return original_iter(loader)
        if isinstance(loader.dataset, (_TracedList, _TracedTuple)):
            vars(loader)["dataset"] = sources.all[loader.dataset._source].object  # later calls read the user's own list
        if (
            isinstance(sources.tracer, Observer)
            and loaders.get(id(loader)) is None
            and not _rooted(loader.dataset, sources, loaders)
        ):
            return original_iter(loader)  # over tensors that the call made: its items are picked by recorded operators
        if isinstance(sources.tracer, Observer) and _carries(loader.dataset):
            return original_iter(loader)  # likewise over tensors that are differentiated
        source = source_of(loader)
        if loaders.get(id(loader)) is None and not _rooted(loader.dataset, sources, loaders):
            sources.all[source].mixed = True
        return sources.iterate(source, lambda: iter_real(loader))

    def iter_real(loader: Any) -> Iterator[Any]:
        with _disable_current_modes():
            items = original_iter(loader)
        return _constant(items, sources.tracer) if isinstance(sources.tracer, Observer) else items

    def length(loader: Any) -> int:
        if active():
            sources.all[source_of(loader)].length_used = True
        with _disable_current_modes():
            return original_len(loader)

    return iterate, length


def _carries(dataset: object) -> bool:
    """Whether a dataset only picks rows of tensors, some of which require grad."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return isinstance(dataset, TensorDataset) and any(t.requires_grad for t in dataset.tensors)


def _constant(items: Iterator[Any], tracer: Tracer) -> Iterator[Any]:
    """Items of a loader, which the user's dataset made unseen: no derivative goes through them."""
    for item in items:
        if any(t.requires_grad for t in batch_tensors(item)):
            raise CaptureError(
                "a DataLoader gives a tensor that requires grad, and what its dataset computes is not recorded",
                loc=tracer.place(),
                advice="TensorDataset over that tensor, or pick its rows in the loop",
            )
        yield item


def _rooted(dataset: object, sources: Sources, loaders: dict[int, Path]) -> bool:
    """Whether a dataset was there before the call (then its loader may be iterated again as it is)."""
    known = sources.known
    return id(dataset) in known or any(s.object is dataset and s.path is not None for s in sources.all)
