"""What an observer knows of the run that it watches, and how it looks away.

The classes that follow, each on the one before, are its parts: :mod:`~mlc.trace.recorder.cuts` (what a derivative may
pass), :mod:`~mlc.trace.recorder.placing` (which value lies where), :mod:`~mlc.trace.recorder.drawing` (what iterables
give), :mod:`~mlc.trace.recorder.writing` (views and in-place writes), :mod:`~mlc.trace.recorder.asdata` (what is taken
as data), and :class:`~mlc.trace.recorder.observer.Observer` itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from mlc.errors import CaptureError
from mlc.ir.core import Var
from mlc.ir.trees import each_tensor
from mlc.ir.types import Loc, TensorType
from mlc.record.memories import Layout, Memories, layout_of
from mlc.trace.communication.parallel import Parallel
from mlc.trace.python.reads import Reads
from mlc.trace.recorder.randomness import RandomWatch, key_of
from mlc.trace.recorder.snapshots import Snapshots
from mlc.trace.recorder.tracer import Tracer

__all__ = ["GradWatcher", "Observing", "tensors_in"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase


class GradWatcher(Protocol):
    """Who is told what Python does with ``.grad``."""

    def settle(self, t: Tensor) -> None:
        """``t.grad`` is read."""

    def forget(self, t: Tensor) -> None:
        """``t.grad`` is set."""


class Observing(Tracer):
    """State of one real run of the user's function.

    Args:
        paths: Place of every tensor of the user's, by identity.
        tensors: These tensors.
        generators: Generators that a later call finds again.
    """

    rounds = True
    runs = True

    def __init__(
        self,
        paths: dict[int, tuple[Any, ...]],
        tensors: Sequence[Tensor] = (),
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        super().__init__(paths)
        self.memories = Memories()
        self.generators = {0, *map(key_of, generators)}
        self.snapshots = Snapshots()
        self.paused = 0
        self.written_out: Any = WeakIdKeyDictionary()  # sparse matrices as dense ones
        self.unplaced: list[Loc | None] = []  # data from outside that no later call could find again
        self.frozen: list[tuple[str, Loc | None]] = []  # results taken as data: what, where
        self.outer_nodes: set[Any] = set()  # of graphs that were there before the call
        self.apart: Any = None  # views with a value of their own (of hooks), and their views
        self.leaf_values: Any = WeakIdKeyDictionary()  # leaves that share a memory with what they were cut from
        self.trail: dict[Var, Tensor] | None = {} if os.environ.get("MLC_TRAIL") else None  # what the run computed
        self.files: list[Loc | None] = []  # where the loop writes files
        self.retained: Any = WeakIdKeyDictionary()  # results that retain_grad() was called on
        self.rebound: dict[int, Tensor] = {}  # tensors whose .data was set
        self.watchers: list[GradWatcher] = []  # told where .grad is read and set, in this order
        self.reads: Reads | None = None
        self.parallel = Parallel(self)
        self.unseen: list[Loc | None] = []  # where processes communicated unrecorded
        self.ended = False
        self.linked = False  # whether Python took any number of a tensor
        self.in_hook = False  # a backward hook runs
        self.inside = False  # an operator runs that takes no numbers of tensors on the user's behalf
        self.grads_seen: set[int] = set()  # tensors whose .grad from before the call Python looked at
        self.target: Tensor | None = None  # what an in-place operator writes
        self.refusal: CaptureError | None = None  # the first one: it stands, whatever the user's code does with it
        self.initial_grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.random = RandomWatch()
        self.random_is_data = False
        self.rehearsal: list[Any] = []  # what solvers gave (mlc.root), which comparing with the run does not run again
        self.draws: list[Any] = []  # results of the random operators so far
        self.redraws: Iterator[Any] | None = None  # what random operators give again, in a recomputation
        self.optimized: dict[int, Tensor] = {}  # given to an optimizer that the loop made
        self.writes = 0  # how often state was written
        self.recomputed: list[Loc | None] = []  # where state was changed once more by a checkpoint
        self.item_states: dict[tuple[int, int, int], Tensor] = {}
        self.drawn_items: dict[tuple[int, int], list[list[Tensor]]] = {}
        self.reordered = False
        self._opened: dict[tuple[int, int], Tensor] = {}
        self.dropped: dict[
            Var, Any
        ] = {}  # gradients that pass no update, as in PyTorch, where more was there to follow
        self._ghosts: dict[TensorType, FakeTensor] = {}
        self._places: dict[tuple[int, Layout], tuple[Any, ...]] = {}
        for t in tensors:
            path = paths.get(id(t))
            if path is not None and t.layout is torch.strided and not torch.nn.parameter.is_lazy(t):
                self._places.setdefault((t.untyped_storage()._cdata, layout_of(t)), path)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Operators run unseen."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @contextlib.contextmanager
    def recomputing(self, first: int) -> Iterator[None]:
        """Operators are seen again, inside a pause; what they draw is what was drawn from this draw on."""
        self.recomputed.append(self.place())
        before = self.paused, self.redraws
        self.paused, self.redraws = 0, iter(self.draws[first:])
        try:
            yield
        finally:
            self.paused, self.redraws = before

    @staticmethod
    def _odd(t: Tensor) -> bool:
        return t.layout is not torch.strided

    def twin(self, t: Tensor) -> FakeTensor:
        """A fake tensor of the same type: for questions about types."""
        if isinstance(t, FakeTensor):
            return t
        ty = TensorType.of(t)
        ghost = self._ghosts.get(ty)
        if ghost is None:
            with _disable_current_modes():
                ghost = self._ghosts[ty] = self.fakes.make(ty)
        return ghost

    fake_of = twin


def tensors_in(args: object, kwargs: object) -> list[Tensor]:
    """Tensors among the arguments of an operator."""
    found: list[Tensor] = []
    add: Callable[[Tensor], None] = found.append
    each_tensor(args, add)
    each_tensor(kwargs, add)
    return found
