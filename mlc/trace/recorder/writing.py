"""Views and in-place writes of a run; what a memory held before its first write is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mlc.errors import CaptureError
from mlc.ir.core import Var
from mlc.ir.inplace import functional_variant
from mlc.ir.trees import map_tensors
from mlc.ir.types import TensorType
from mlc.record.handles import Handle
from mlc.record.memories import layout_of
from mlc.trace.recorder.drawing import Drawing
from mlc.trace.recorder.externals import External

__all__ = ["Writing"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase


class Writing(Drawing):
    """The part of an observer that follows views and writes."""

    # ---- views

    def _view(self, func: object, args: Any, kwargs: Any, out: Any) -> Any:
        base = self.handle(args[0])
        if args[0].requires_grad and args[0].is_leaf:
            self.read(args[0], False)  # it becomes a leaf before anything is derived from it
        cut = self.cut_of(args[0])
        if func is _A.detach.default and cut is None:
            cut = self.place()
        loc = self.locate()[0]
        flat = [out] if isinstance(out, Tensor) else list(out)
        types = [TensorType.of(t) for t in flat]
        kw = tuple(kwargs.items())
        for i, t in enumerate(flat):
            mem = self.memories.of(t)
            if mem is not self.memories.find(args[0]):  # an operator that may view did copy
                self.wrap(t, self.emit(func, (self.value(base), *args[1:]), types, kw)[i])
                continue
            lay = layout_of(t)
            known = mem.layouts.get(lay)
            seen = (*base.chain, (func, tuple(args[1:]), kw, i, types, loc))
            if base.storage.apart:
                self.apart[t] = Handle(base.storage, seen)
            elif known is None or known.storage is not base.storage:
                mem.layouts[lay] = Handle(base.storage, seen)
            if cut is not None:
                self.cut_tensors[t] = cut
        return out

    def _inplace_view(self, func: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        base = self.handle(t)
        func(*args, **kwargs)
        op = functional_variant(func)
        lay = layout_of(t)
        mem = self.memories.of(t)
        step = (op, tuple(args[1:]), tuple(kwargs.items()), 0, [TensorType.of(t)], self.locate()[0])
        if base.storage.apart:
            self.apart[t] = Handle(base.storage, (*base.chain, step))
        elif lay not in mem.layouts or mem.layouts[lay].storage is not base.storage:
            mem.layouts[lay] = Handle(base.storage, (*base.chain, step))
        return t

    # ---- writes

    def will_write(self, t: Tensor) -> None:
        """A memory is about to change: keep what it held before the call, and relate what shares it."""
        mem = self.memories.find(t)
        if mem is not None and any(r.apart for r in mem.roots):
            raise CaptureError(
                "a memory is written in which a view with a backward hook lies",
                loc=self.place(),
                advice="put the hook on a copy (t = t.clone()) that is used in the view's place",
            )
        outside = mem is None or any(r.external is not None for r in mem.roots)
        if outside:
            self.handle(t)
            with self.pause():
                self.snapshots.keep(t)
            self.join(self.memories.of(t))

    def lent(self, t: Tensor) -> None:
        """NumPy may write to this memory unseen: a failing call puts back what it held."""
        mem = self.memories.find(t)
        if mem is None or any(r.external is not None for r in mem.roots):
            with self.pause():
                self.snapshots.keep(t)

    def _inplace(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        self.will_write(t)
        random = s.random and self.random_is_data
        if random:
            func(*args, **kwargs)
            with self.pause():
                self._fix(t, t.clone())
            return t
        self.target = t
        try:
            super()._inplace(func, s, args, kwargs)
        finally:
            self.target = None
        func(*args, **kwargs)
        if self.trail is not None:
            with self.pause():
                self.trail[self.present(t)] = t.detach().clone()
        return t

    def _fix(self, t: Tensor, value: Tensor) -> None:
        """What ``t`` now holds is data of this call."""
        h = self.data(value)
        self.write(t, h.storage.var)

    def _out(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        targets = [kwargs[k] for k in s.out]
        for t in targets:
            self.will_write(t)
        out = super()._out(func, s, args, kwargs)
        with self.pause():
            func(*args, **kwargs)
        return out

    def _fake_run(self, func: Any, args: Any, kwargs: Any) -> Any:
        fargs, fkwargs = map_tensors(args, self.twin), map_tensors(kwargs, self.twin)
        with _disable_current_modes(), self.fake_mode:
            return func(*fargs, **fkwargs)

    def write(self, t: Tensor, new: Var) -> None:
        """As :meth:`Values.write`; what was there before this stretch of code becomes state."""
        s = self.handle(t).storage
        if s.external is not None or s.born != self.region() or self.cut_of(t) is not None:
            s.updated = True
            self.writes += 1
            new = self.as_state(new)
        super().write(t, new)
        if self.cutting() and not s.updated:
            self.cut_vars[s.var] = self.place()

    def wrote(self, h: Handle) -> None:
        """A storage changed; the step of a leaf is history for gradients taken at its own level."""
        s = h.storage
        if s.leaf and not s.copied and s.var.mask:
            s.var = self.stopped(s.var, h, level=self.depth())
        if isinstance(s.external, External):
            s.external.written = True

    def reloaded(self, hyperparameters: Iterable[Tensor]) -> None:
        """An optimizer has copies of its options, of a state dict that was loaded: state, as all that it holds."""
        for t in hyperparameters:
            if t.requires_grad and self.copies.pop(self.present(t), None) is not None:
                self.handle(t).storage.updated = True

    def rebind(self, t: Tensor, value: Tensor) -> None:
        """``t.data = value``: the tensor goes over to another memory, which is state from here on."""
        if torch.nn.parameter.is_lazy(t):
            return
        self.writes += 1
        self.handle(t)
        h = self.handle(value)
        if h.storage.external is None:
            h.storage.updated = True
            if not h.chain:
                h.storage.var = self.as_state(h.storage.var)
                h.storage.version += 1
            h.storage.leaf = h.storage.leaf or (t.requires_grad and t.is_leaf)
        self.rebound[id(t)] = t
