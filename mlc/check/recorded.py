"""The plain unroll of a recorded call, on items drawn from its iterables again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mlc.ir.core import Draw, Eqn
from mlc.trace.capture import Recording
from mlc.trace.iterables import batch_tensors
from mlc.trace.unroll import Unroll

__all__ = ["Recorded"]


class Recorded(Unroll):
    """The unroll of a recording (see :class:`~mlc.trace.unroll.Unroll`); one run each."""

    def __init__(self, rec: Recording, stop: str = "all", frozen: dict[Eqn, Tensor] | None = None) -> None:
        super().__init__(rec.eqns, [x.var for x in rec.externals], stop, frozen)
        self._rec = rec
        self._iterators: dict[tuple[int, int], Iterator[Any]] = {}

    def draw(self, op: Draw) -> list[Tensor]:
        """The next item of the iterable as it is now."""
        key = (op.source, op.visit)
        if key not in self._iterators:
            self._iterators[key] = iter(self._rec.sources[op.source].object)
        return batch_tensors(next(self._iterators[key]))
