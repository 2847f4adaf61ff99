"""What the user's iterables give while the loop runs, and how they move random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Draw, Eqn, Var
from mlc.ir.types import TensorType
from mlc.record.handles import Storage
from mlc.record.memories import layout_of
from mlc.trace.recorder.placing import Placing

__all__ = ["Drawing"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase


class Drawing(Placing):
    """The part of an observer that follows iterables."""

    def draw_tensor(self, t: Tensor, var: Var) -> None:
        """A tensor that an iterable of the user's just produced."""
        mem = self.memories.of(t)
        if any(not self._pristine(r) for r in mem.roots):
            raise CaptureError(
                "an iterable gives a tensor whose memory the loop writes",
                loc=self.place(),
                advice="draw copies (x.clone()), or write to a tensor of its own",
            )
        storage = Storage(var)
        storage.external = "draw"
        old = mem.layouts.get(layout_of(t))
        if old is not None and old.storage in mem.roots:
            mem.roots.remove(old.storage)
        mem.root(layout_of(t), storage)

    def drawn(self, source: int, visit: int, tensors: Sequence[Tensor]) -> None:
        """As :meth:`Tracer.drawn`."""
        loc, site = self.locate()
        outs = tuple(Var(TensorType.of(t)) for t in tensors)
        self.builder.append(Eqn(Draw(source, visit), (), outs, (), loc, "draw", site))
        self.drawn_items.setdefault((source, visit), []).append(list(tensors))
        for t, v in zip(tensors, outs, strict=True):
            self.draw_tensor(t, v)

    def before_item(self) -> Any:
        """As :meth:`Tracer.before_item`."""
        with self.pause():
            return self.random.continues(None), torch.get_rng_state()

    def items(self, source: int, visit: int, k: int) -> list[Tensor]:
        """Tensors of an item that the run drew."""
        return self.drawn_items[source, visit][k]

    def after_item(self, key: tuple[int, int, int], before: Any) -> None:
        """As :meth:`Tracer.after_item`: an iterable that draws moves the generator as it does at a later call."""
        with self.pause():
            self._moved(key, *before)

    @contextlib.contextmanager
    def unnoticed(self) -> Iterator[None]:
        """As :meth:`Tracer.unnoticed`."""
        reads = self.reads
        paused = reads is not None and reads.pause()
        try:
            yield
        finally:
            if reads is not None and paused:
                reads.resume()

    def _moved(self, key: tuple[int, int, int], continues: bool, state: Tensor) -> None:
        now = torch.get_rng_state()
        if not torch.equal(state, now):
            self.item_states[key] = now
        if continues:
            self.random.left(None)
        source, visit, at = key
        if at == -1:
            self._opened[source, visit] = now
        elif at == 0 and not torch.equal(self._opened[source, visit], state):
            self.reordered = True  # other draws came between: a later call opens the iterable only here
