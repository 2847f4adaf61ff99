"""Batches of one level: a list, a loader or a generator function, which starts over when it ends.

A feed can be continued bit for bit, in the middle of an epoch too.  A list needs its position only.  Of a loader or a
generator function it keeps the random states at the start of the epoch and how many batches were drawn since: to
continue, the epoch is begun again from those states and as many batches are skipped (so a position costs nothing to
save, and at most one epoch to come back to).  The last of them is drawn under the random state that it was drawn
under before, and must come out equal: data that depends on random numbers drawn in between is refused, not guessed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlc.errors import MlcError
from mlc.trace.generators import Generator, kept
from mlc.trace.python.view import fields_of
from mlc.training.data import randomness

__all__ = ["Feed"]

_Refuse = Callable[[str, str], MlcError]
_ITERABLE = "a list of batches, a DataLoader, or a generator function"


class Feed:
    """Draws batches, and knows where it is.

    Attributes:
        epoch: How often the data has started over.
        position: Batches drawn in this epoch.
    """

    def __init__(self, refuse: _Refuse, data: Any) -> None:
        """Check the data; nothing is drawn.

        Args:
            refuse: Makes an error about the level.
            data: A list of batches, an iterable that can be iterated again, a generator function, or None.
        """
        self.data = data
        self.epoch = 0
        self.position = 0
        self._refuse = refuse
        self._iterator: Iterator[Any] | None = None
        self._generators: list[Generator] | None = None
        self._start: Any = None  # random states at the start of the epoch
        self._before: Any = None  # and before the last batch
        self._last: Any = None
        self._check()

    def __repr__(self) -> str:
        return f"Feed(epoch {self.epoch}, batch {self.position})"

    @property
    def given(self) -> bool:
        """Whether the level has data."""
        return self.data is not None

    @property
    def generators(self) -> list[Generator]:
        """Generators of its own that the data draws from: PyTorch's, NumPy's, Python's."""
        if self._generators is None:
            self._generators = [] if isinstance(self.data, list) else randomness.generators_in([self.data])
        return self._generators

    def draw(self) -> Any:
        """The next batch; the data starts over when it ends.

        Raises:
            TrainingError: when it is empty.
        """
        if self.data is None:
            return None
        if isinstance(self.data, list):
            if self.position == len(self.data):
                self.epoch, self.position = self.epoch + 1, 0
            self.position += 1
            return self.data[self.position - 1]
        fresh = self._iterator is None
        found, batch = self._next()
        if not found and not fresh:
            self.epoch += 1
            self._iterator = None
            found, batch = self._next()
        if not found:
            raise self._empty()
        self.position += 1
        self._last = batch
        return batch

    def peek(self) -> Any:
        """A batch as the first one of an epoch; random generators and the feed stay where they are."""
        if self.data is None:
            return None
        if isinstance(self.data, list):
            return self.data[0]
        with kept(self.generators):
            iterator = self._opened()
            try:
                return next(iterator)
            except StopIteration:
                raise self._empty() from None
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Where the feed is: numbers, text and tensors alone."""
        state: dict[str, Any] = {"epoch": self.epoch, "position": self.position}
        if self._iterator is not None:
            start, before = randomness.plain(self._start), randomness.plain(self._before)
            state |= {"start": start, "before": before, "last": digest(self._last)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where another feed over the same data was; random generators stay as they are.

        Raises:
            TrainingError: when the data does not come out as it did.
        """
        self._iterator = self._last = None
        self.epoch, self.position = state["epoch"], state["position"]
        if isinstance(self.data, list):
            if self.position > len(self.data):
                raise self._other(f"it has {len(self.data)} batches, and {self.position} were drawn")
            return
        if "start" not in state:
            return
        with kept(self.generators):
            randomness.restore(state["start"], self.generators)
            self._iterator = self._opened()
            self._start = state["start"]
            skipped = sum(1 for _ in itertools.islice(self._iterator, self.position - 1))
            randomness.restore(state["before"], self.generators)
            self._before = state["before"]
            self._last = next(self._iterator, None)
        if skipped < self.position - 1 or digest(self._last) != state["last"]:
            self._iterator = None
            raise self._other(
                "drawn again, its batches are not those that were drawn (it changed, or depends on random numbers that "
                "something else drew in between)"
            )

    def _other(self, what: str) -> MlcError:
        return self._refuse(
            f"its data cannot be continued: {what}",
            "the same data, drawing from a torch.Generator of its own (DataLoader(generator=...))",
        )

    # ---- iterating

    def _next(self) -> tuple[bool, Any]:
        """Whether there was another batch in this epoch, and the batch."""
        if self._iterator is None:
            self._start = randomness.states(self.generators)
            self._iterator = self._opened()
            self.position = 0
        self._before = randomness.states(self.generators)
        try:
            return True, next(self._iterator)
        except StopIteration:
            return False, None

    def _opened(self) -> Iterator[Any]:
        """An iterator over an epoch."""
        made = self.data() if callable(self.data) and not isinstance(self.data, Iterable) else self.data
        if made is not self.data and (not isinstance(made, Iterable) or isinstance(made, (tuple, Tensor, dict, str))):
            raise self._refuse(
                f"its data function returned a {type(made).__name__}", "yield batches: a generator function"
            )
        return iter(made)

    def _empty(self) -> MlcError:
        return self._refuse("its data is empty", _ITERABLE)

    def _check(self) -> None:
        data = self.data
        if data is None:
            return
        if isinstance(data, (tuple, Tensor, dict, str, bytes, np.ndarray)):
            raise self._refuse(
                f"its data is a {type(data).__name__}, which may be one batch or many",
                "[batch] for the same batch at every step; list(batches) or a DataLoader for many",
            )
        if isinstance(data, list):
            if not data:
                raise self._empty()
        elif isinstance(data, Iterator):
            raise self._refuse(
                f"its data is a {type(data).__name__}, which cannot start over",
                "the loader, list or generator function itself, not an iterator of it",
            )
        elif isinstance(data, torch.utils.data.Dataset) and not hasattr(data, "__iter__"):
            raise self._refuse("its data is a dataset of single samples", "DataLoader(dataset, batch_size=...)")
        elif not isinstance(data, Iterable) and not callable(data):
            raise self._refuse(f"its data is a {type(data).__name__}", _ITERABLE)


def digest(batch: Any) -> str:
    """A hash of everything in a batch."""
    out = hashlib.sha256()
    _add(out, batch, 0)
    return out.hexdigest()


def _add(out: Any, x: Any, depth: int) -> None:
    if isinstance(x, Tensor):
        t = x.detach().cpu().contiguous()
        out.update(f"{t.dtype} {tuple(t.shape)}".encode())
        out.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
        return
    out.update(type(x).__qualname__.encode())
    if isinstance(x, np.ndarray):
        out.update(x.tobytes())
    elif isinstance(x, (str, int, float, complex, bool, bytes)):
        out.update(repr(x).encode())
    elif depth < _DEEP and isinstance(x, (list, tuple)):
        for v in x:
            _add(out, v, depth + 1)
    elif depth < _DEEP:
        for k, v in x.items() if isinstance(x, dict) else fields_of(x).items():
            out.update(repr(k).encode())
            _add(out, v, depth + 1)


_DEEP = 12
