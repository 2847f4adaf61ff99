"""Which value lies where: every tensor of a run by the memory that it lies in, and where it lies there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Var
from mlc.ir.types import Loc, TensorType
from mlc.record.handles import Handle, Storage
from mlc.record.memories import Layout, Memory, layout_of
from mlc.trace.recorder.cuts import Cuts
from mlc.trace.recorder.externals import External

__all__ = ["Placing"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase


class Placing(Cuts):
    """The part of an observer that finds and enters values."""

    def handle(self, t: Tensor) -> Handle:
        """The handle of any tensor."""
        if self.apart is not None and t in self.apart:
            return self.apart[t]  # type: ignore[no-any-return]
        mem = self.memories.find(t) if t.layout is torch.strided else None
        h = None if mem is None else mem.layouts.get(layout_of(t))
        return self.external(t) if h is None else h

    def external(self, t: Tensor) -> Handle:
        """A tensor, or a place in a memory, that was not met before."""
        if t.layout is not torch.strided:
            raise CaptureError(
                f"a {t.layout} tensor is used", loc=self.place(), advice="convert it with .to_dense() before the call"
            )
        mem = self.memories.of(t)
        if mem.roots and any(not self._pristine(r) for r in mem.roots):
            return self._relate(t, mem)
        path = self.paths.get(id(t)) or self._places.get((t.untyped_storage()._cdata, layout_of(t)))
        if path is None:
            self.unplaced.append(self.place())
        return self.from_outside(t, mem, path)

    @staticmethod
    def _pristine(r: Storage) -> bool:
        return r.external is not None and r.version == 0

    def from_outside(self, t: Tensor, mem: Memory, path: tuple[Any, ...] | None) -> Handle:
        """Register a tensor from outside (``path``: where a later call finds it)."""
        var = Var(TensorType.of(t))
        storage = Storage(var)
        h = mem.root(layout_of(t), storage)
        with self.pause():
            held = t.detach()
        ext = External(t, path, var, h, None, read=self.place(), held=held)
        if path is None:
            with self.pause():  # NumPy may write to this memory, and nobody would see it
                ext.kept = t.detach().clone()
        storage.external = ext
        self.externals[len(self.externals)] = ext
        if t.requires_grad:
            self.new_bit(var)
            h.leaf = True
            storage.leaf = t.is_leaf
            if t.is_leaf:
                self.leaves[id(t)] = t
                self.seen_leaves[t] = True
            elif t.grad_fn is not None:
                self.outer_nodes.add(t.grad_fn)
        return h

    def _relate(self, t: Tensor, mem: Memory) -> Handle:
        """A place in a memory that changes: as a view of the root that covers it."""
        self.join(mem)
        (root,) = mem.roots
        at = next(lay for lay, h in mem.layouts.items() if h.storage is root and not h.chain)
        offset = t.storage_offset() - at[0]
        if offset < 0 or t.dtype != at[3]:
            raise CaptureError(
                "two tensors share memory in a way that cannot be followed",
                loc=self.place(),
                advice="give each a memory of its own with .clone()",
            )
        step = (_A.as_strided.default, (list(t.shape), list(t.stride()), offset), (), 0, [TensorType.of(t)], None)
        h = mem.layouts[layout_of(t)] = Handle(root, (step,))
        return h

    def join(self, mem: Memory) -> None:
        """One root for a memory that is about to be written: the whole of it, as it was before the call."""
        if len(mem.roots) < 2:
            return
        roots = {id(h.storage): (lay, h.storage) for lay, h in mem.layouts.items() if not h.chain}
        apart = [r for r in mem.roots if not isinstance(r.external, External) or r.version]
        if apart:
            raise CaptureError(
                "a memory that several tensors share is written, one of them drawn from an iterable",
                loc=self.place(),
                advice="draw copies (x.clone()), or write to a tensor of its own",
            )
        exts = [r.external for r in mem.roots]
        dtypes = {e.tensor.dtype for e in exts}
        if len(dtypes) > 1:
            raise CaptureError("tensors of several types share a memory that is written", loc=self.place())
        first: Tensor = exts[0].held
        n = first.untyped_storage().nbytes() // first.dtype.itemsize
        with self.pause(), torch.no_grad():
            whole = torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage(), 0, (n,), (1,))
        flat = Storage(Var(TensorType.of(whole)))
        ext = External(whole, None, flat.var, Handle(flat), None, read=exts[0].read, held=whole, parts=tuple(exts))
        flat.external = ext
        flat.updated = True
        self.externals[len(self.externals)] = ext
        mem.roots = [flat]
        olds = dict(mem.layouts)
        mem.layouts.clear()
        mem.layouts[layout_of(whole)] = Handle(flat)
        for lay, h in olds.items():
            base, _ = roots[id(h.storage)]
            mem.layouts[lay] = Handle(flat, (*_from_flat(whole, base), *h.chain))
        for lay, storage in roots.values():
            flat.leaf = flat.leaf or storage.leaf
            mem.layouts[lay].leaf = olds[lay].leaf
            storage.external.written = True

    def value(self, h: Handle) -> Var:
        """As :meth:`Values.value`; derived anew in every iteration, as the user's code does."""
        if h.chain:
            h.cached = None
        return super().value(h)

    def bind(self, t: Tensor, var: Var) -> Handle:
        """A fresh tensor holds ``var``."""
        if self.trail is not None:
            with self.pause():
                self.trail[var] = t.detach().clone()
        storage = Storage(var)
        storage.born = self.region()
        return self.memories.of(t).root(layout_of(t), storage)

    def wrap(self, t: Any, var: Var, *, taint: bool = False, origin: Loc | None = None) -> Any:
        """As :meth:`Values.wrap`."""
        self.bind(t, var)
        if self.cutting():
            self.cut_vars[var] = origin or self.place()
        return t

    def fresh(self, var: Var, *, taint: bool = False) -> Any:
        """A new tensor that stands for ``var`` (its content does not matter)."""
        ty = var.type
        assert isinstance(ty, TensorType)
        with self.pause(), torch.no_grad():
            t = torch.empty_strided(ty.shape, ty.stride, dtype=ty.dtype, device=ty.device)
            t.fill_(1)
        self.bind(t, var)
        return t

    def data(self, t: Tensor) -> Handle:
        """A tensor that is data of this very call."""
        self.unplaced.append(self.place())
        return self.from_outside(t, self.memories.of(t), None)


def _from_flat(whole: Tensor, lay: Layout) -> list[Any]:
    """View steps from the whole of a memory to a layout in it."""
    offset, shape, stride, dtype = lay[:4]
    n = 1
    for s in shape:
        n *= s
    contiguous = torch.empty(shape, device="meta").stride() == stride
    if not contiguous:
        ty = TensorType(dtype, shape, stride, whole.device)
        return [(_A.as_strided.default, (list(shape), list(stride), offset), (), 0, [ty], None)]
    part = TensorType(dtype, (n,), (1,), whole.device)
    steps: list[Any] = [(_A.slice.Tensor, (0, offset, offset + n), (), 0, [part], None)]
    if shape != (n,):
        steps.append((_A.view.default, (list(shape),), (), 0, [TensorType(dtype, shape, stride, whole.device)], None))
    return steps
