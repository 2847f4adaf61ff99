"""What a derivative may pass: cuts that the user wrote, state that the loop updates, constants of inner gradients.

PyTorch's flags tell which edges the loop's *own* gradients follow; those that they do not follow get a ``stop`` that
holds for these.  The gradient *through* the loop follows more: whatever is written in place into something that was
there before is an update (moving averages, momentum kept by hand, running statistics, frozen parameters), and passes.
It is cut where the user cut it, on the way into a loss: by ``detach()``, by a read of ``.data``, or by computing a
value under ``no_grad``.  The same value on its way into state is no cut; so a stop stands at the edge where a tracked
operator reads the value, not where the value was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mlc.ir.core import Alias, Draw, Eqn, Grad, Random, Stop, Var, map_vars
from mlc.ir.origin import Origin
from mlc.ir.trees import each_tensor
from mlc.ir.types import Loc
from mlc.record.handles import Handle
from mlc.trace.recorder.observing import Observing

__all__ = ["Cuts"]


class Cuts(Observing):
    """The part of an observer that decides what a tracked operator reads."""

    def __init__(
        self,
        paths: dict[int, tuple[Any, ...]],
        tensors: Sequence[Tensor] = (),
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        super().__init__(paths, tensors, generators)
        self.cut_tensors: Any = WeakIdKeyDictionary()  # results of detach() and .data, and views of them
        self.seen_leaves: Any = WeakIdKeyDictionary()  # leaves that have a value of their own
        self.cut_vars: dict[Var, Loc | None] = {}  # values made under no_grad
        self.copies: dict[Var, Loc | None] = {}  # values made by copy.deepcopy, and where
        self._cut_edges: dict[Eqn, dict[Var, Loc | None]] = {}
        self._state_read: dict[Eqn, tuple[Var, ...]] = {}
        self._as_loss: dict[Any, Var] = {}
        self.leaf_history: dict[int, list[Var]] = {}  # values that a leaf had, in order
        self.leaf_bits: dict[int, int] = {}  # their bits
        self._hard: set[Var] = set()  # values with a cut in their making
        self._flips = 0
        self._grad_on = True

    # ---- places

    def notice_mode(self) -> None:
        """Gradients were switched on or off since the last operator: another stretch of the user's code."""
        mode = torch.is_grad_enabled()
        if mode is not self._grad_on:
            self._grad_on = mode
            self._flips += 1

    def cutting(self) -> bool:
        """Whether the user has switched gradients off (autograd's engine does it for hooks, which is no cut)."""
        return not torch.is_grad_enabled() and not self.in_hook

    def next_stretch(self) -> None:
        """What was made before belongs to another stretch of the user's code."""
        self._flips += 1

    def region(self) -> Any:
        """The stretch of the user's code that runs now: loop iterations, and how often the mode changed."""
        return self.scope(), self._flips

    # ---- flags of tensors

    @staticmethod
    def hidden(t: Tensor) -> bool:
        """A view made under no_grad of something that requires grad: PyTorch sets its flag, but nothing flows."""
        return t.requires_grad and t.is_leaf and t._is_view() and t._base is not None and t._base.requires_grad

    def carries(self, t: Tensor, h: Handle) -> bool:
        """Whether PyTorch follows a derivative into ``t``."""
        return t.requires_grad and not self.hidden(t)

    def cut_of(self, t: Tensor) -> Loc | None:
        """Where a tensor was cut by detach() or .data; None if it was not."""
        found = self.cut_tensors.get(t)
        if found is None and not t.is_inference() and t._is_view() and t._base is not None:
            found = self.cut_tensors.get(t._base)
        return found  # type: ignore[no-any-return]

    def softens(self, args: Any, kwargs: object) -> bool:
        """Told by storages here."""
        return False

    def cut_at(self, args: Any, kwargs: object) -> Loc | None:
        """Told by tensors and values here."""
        return None

    # ---- what an operator reads

    def present(self, t: Tensor) -> Var:
        """Present value of a tensor."""
        h = self.handle(t)
        over = self._own_value(t, h)
        return self.value(h) if over is None else over

    def _own_value(self, t: Tensor, h: Handle) -> Var | None:
        """Value of a leaf that shares its memory with what it was cut from (or of a view of that leaf)."""
        if not self.leaf_values:
            return None
        now = (h.storage, h.storage.version)
        found = self.leaf_values.get(t)
        if found is not None and found[0] == now:
            return found[1]  # type: ignore[no-any-return]
        if found is None and not t.is_inference() and t._is_view() and t._base is not None:
            found = self.leaf_values.get(t._base)
            if found is not None and found[0] == now:
                return self._seen_from(found[1], self.handle(t._base), h)
        return None

    def _seen_from(self, var: Var, base: Handle, h: Handle) -> Var:
        steps = h.chain[len(base.chain) :]
        if h.chain[: len(base.chain)] != base.chain:
            return self.value(h)
        for op, args, kwargs, index, types, loc in steps:
            var = self.emit(op, (var, *args), types, kwargs, loc=loc)[index]
        return var

    def read(self, t: Tensor, tracking: bool) -> Var:
        """The value an operator reads from ``t``; a stop where a derivative is cut."""
        h = self.handle(t)
        var = self.present(t)
        if not t.dtype.is_floating_point | t.dtype.is_complex:
            return var
        if t.requires_grad and not self.hidden(t):
            return self._leaf(t, h, var) if t.is_leaf else var
        if not tracking or not var.mask:
            return var
        if t is self.target:  # on its way into state
            return self._stop_at(var, self.depth(), None)
        return self.loss_value(t, h, var)

    def _leaf(self, t: Tensor, h: Handle, var: Var) -> Var:
        """A leaf that requires grad: a value of its own, cut from what it was made of."""
        self.leaves[id(t)] = t
        if not h.leaf or t not in self.seen_leaves:
            other, h.leaf = h.leaf, True
            self.seen_leaves[t] = True
            outside = h.storage.external is not None
            if outside and not other and t not in self.cut_tensors:
                self._claim(t, h)
                if var not in self.bit_of:  # what was computed from it before does not lead to it
                    var = self._leaf_value(t, h, var, apart=True)
            elif not outside or getattr(h.storage.external, "tensor", None) is not t:
                var = self._leaf_value(t, h, var, apart=other or outside)
            h.storage.leaf = True
        bit = self.new_bit(var)
        history = self.leaf_history.setdefault(id(t), [])
        if not history or history[-1] is not var:
            history.append(var)
            self.leaf_bits[id(t)] = self.leaf_bits.get(id(t), 0) | bit
        return var

    def _leaf_value(self, t: Tensor, h: Handle, var: Var, apart: bool) -> Var:
        """A value that no other value is merged with, however alike: gradients by two leaves are two."""
        before = var
        if var.mask:
            level = self.depth() if h.storage.updated else None
            var = self._stop_at(var, level, self.cut_of(t))
        e = self.builder.producer(var)
        if apart or e is None or not isinstance(e.op, (Random, Alias, Draw)):
            (var,) = self.emit(Alias(), (var,), (var.type,))
        if apart or h.chain or before.mask:
            self.leaf_values[t] = ((h.storage, h.storage.version), var)
        else:
            h.storage.var = var
        return var

    def _claim(self, t: Tensor, h: Handle) -> None:
        """A tensor from outside was met first through one that does not require grad."""
        ext = h.storage.external
        if not h.chain and hasattr(ext, "tensor") and not ext.tensor.requires_grad:
            ext.tensor, ext.path = t, self.paths.get(id(t), ext.path)

    def loss_value(self, t: Tensor, h: Handle, var: Var) -> Var:
        """What a tracked operator reads from a tensor that PyTorch does not follow."""
        cut = self.cut_of(t)
        if cut is not None or self.hidden(t):
            return self._stop_at(var, None, cut)
        s = h.storage
        if not (s.updated or s.soft or s.leaf or s.external is not None):
            var = self._cut_inside(var)
        tag = None if s.leaf or s.soft else Origin.STATE  # what stop_gradient="torch" holds constant
        return self._stop_at(var, self.depth(), None, tag=tag) if var.mask else var

    def number_out(self, t: Tensor) -> Var:
        """The value of a Python number that the call gives out: nothing is differentiated through it."""
        var = self.present(t)
        return self._stop_at(var, None, None) if var.mask and var.type.is_float else var

    def _cut_inside(self, var: Var) -> Var:
        """A passing value, with stops where cut values entered it."""
        key = (self.scope(), var)
        known = self._as_loss.get(key)
        if known is None:
            known = self._as_loss[key] = self._rebuilt(var)
        return known

    def _rebuilt(self, var: Var) -> Var:
        if not var.mask:
            return var
        if var in self.cut_vars:
            return self._stop_at(var, None, self.cut_vars[var])
        e = self.builder.producer(var)
        if e is None or isinstance(e.op, (Grad, Stop, Alias, Draw, Random)) or var in self.bit_of:
            return var
        edges = self._cut_edges.get(e, {})
        state = self._state_read.get(e, ())
        env: dict[Var, Var] = {}
        for v in e.inputs:
            if v in edges:
                env[v] = self._stop_at(v, None, edges[v])
            elif v.mask and v not in state:
                env[v] = self._cut_inside(v)
        if all(w is v for v, w in env.items()):
            return var
        args = map_vars(e.args, lambda v: env.get(v, v))
        kwargs = tuple((k, map_vars(a, lambda v: env.get(v, v))) for k, a in e.kwargs)
        outs = self.emit(e.op, args, [o.type for o in e.outs], kwargs, loc=e.loc)
        return outs[e.outs.index(var)]  # type: ignore[no-any-return]

    # ---- what state is written with

    def as_state(self, var: Var) -> Var:
        """A value on its way into state: cuts that stand in its making since the last gradient are no cuts there.

        ``p.data = p.data - lr * p.grad`` is an update whether or not ``lr`` requires grad; where it does, a tracked
        operator has read ``p.data``, as if on the way into a loss.
        """
        if var not in self._hard:
            return var
        e = self.builder.producer(var)
        if e is None or self.builder.position[var] < self._last_gradient():
            return var
        if isinstance(e.op, Stop):
            return var if e.origin is Origin.COPY else self._stop_at(self.as_state(e.args[0]), self.depth(), None)
        env = {v: self.as_state(v) for v in dict.fromkeys(e.inputs)}
        if all(w is v for v, w in env.items()) or e.impure or isinstance(e.op, Grad):
            return var
        args = map_vars(e.args, env.__getitem__)
        kwargs = tuple((k, map_vars(a, env.__getitem__)) for k, a in e.kwargs)
        outs = self.emit(e.op, args, [o.type for o in e.outs], kwargs, loc=e.loc)
        return outs[e.outs.index(var)]  # type: ignore[no-any-return]

    def _last_gradient(self) -> int:
        return self.builder.position[self.grad_eqns[-1].outs[0]] if self.grad_eqns else 0

    def emit(self, op: object, args: Any, types: Any, kwargs: object = (), loc: Loc | None = None) -> Any:
        """As :meth:`Recorder.emit`; random operators of a recomputation give what they gave."""
        if isinstance(op, Random):
            if self.redraws is not None:
                return next(self.redraws)
            self.draws.append(super().emit(op, args, types, kwargs, loc))
            return self.draws[-1]
        n = len(self.builder.eqns)
        outs = super().emit(op, args, types, kwargs, loc)
        if self._hard and len(self.builder.eqns) > n and any(v in self._hard for v in self.builder.eqns[-1].inputs):
            self._hard.update(outs)
        return outs

    def _stop_at(self, var: Var, level: int | None, loc: Loc | None, *, tag: Origin | None = None) -> Var:
        copied = var in self.copies
        where = Handle(None, (), self.copies[var] if copied else loc)  # type: ignore[arg-type]
        where.copy = copied
        before = self.tag
        if tag is not None:
            self.tag = tag
        try:
            stopped = self.stopped(var, where, level=level)
        finally:
            self.tag = before
        if level is None:
            self._hard.add(stopped)
        return stopped

    # ---- what is noted beside an operator

    def moved(self, old: Eqn, new: Eqn, where: int) -> None:
        """``new`` stands for ``old``, and everything after it one further on."""
        for notes in (self._cut_edges, self._state_read):
            if old in notes:
                notes[new] = notes.pop(old)  # type: ignore[assignment]
        self.grad_eqns = [new if e is old else e for e in self.grad_eqns]
        for s in self.steps:
            s.first += s.first > where
            s.last += s.last > where

    def recorded(self, func: object, s: Any, args: Any, kwargs: object, out: Any) -> Any:
        """As :meth:`Recorder.recorded`, with the cuts of PyTorch's graph."""
        n = len(self.builder.eqns)
        edges, state = ({}, ()) if self.cutting() else self._noted(args, kwargs)
        result = super().recorded(func, s, args, kwargs, out)
        if (edges or state) and len(self.builder.eqns) > n:
            e = self.builder.eqns[-1]
            if edges:
                self._cut_edges[e] = edges
            if state:
                self._state_read[e] = state
        return result

    def _noted(self, args: Any, kwargs: object) -> tuple[dict[Var, Loc | None], tuple[Var, ...]]:
        """Which operands of an operator that PyTorch does not follow are cut, and which are state."""
        if self.tracks(args, kwargs):
            return {}, ()
        edges: dict[Var, Loc | None] = {}
        state: list[Var] = []

        def look(t: Tensor) -> None:
            h = self.handle(t)
            var = self.present(t)
            if not var.mask:
                return
            cut = self.cut_of(t)
            if cut is not None or (self.hidden(t) and not self.in_hook):
                edges[var] = cut
            elif (
                self.hidden(t)
                or h.storage.updated
                or h.storage.soft
                or h.storage.leaf
                or h.storage.external is not None
            ):
                state.append(var)

        each_tensor(args, look)
        each_tensor(kwargs, look)
        return edges, tuple(state)
