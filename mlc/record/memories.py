"""Real tensors of a running program: memories, and what stands where in them.

A tensor is its storage, offset, shape and strides (and dtype): two tensors that agree in these are one value, two
views of one storage that differ are not.  A :class:`Memory` is one storage of the running process; for each layout
that was seen in it, a :class:`~mlc.record.handles.Handle` says how the value there follows from the value of the
whole.  A memory may hold several roots that nothing relates yet (batches cut from one tensor before the call); they
are related when one of them is written.

Storages are held weakly: recording keeps nothing alive, and no address is mistaken for an earlier one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mlc.record.handles import Handle, Storage

__all__ = ["Layout", "Memories", "Memory", "layout_of"]

Layout = tuple[Any, ...]


def layout_of(t: Tensor) -> Layout:
    """Where a strided tensor lies in its storage."""
    return (t.storage_offset(), tuple(t.shape), t.stride(), t.dtype, t.is_conj(), t.is_neg())


class Memory:
    """One storage: its layouts, and the roots that these follow from."""

    __slots__ = ("layouts", "ref", "roots")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.ref = StorageWeakRef(storage)
        self.layouts: dict[Layout, Handle] = {}
        self.roots: list[Storage] = []

    def root(self, layout: Layout, storage: Storage) -> Handle:
        """A value of its own at a layout."""
        h = self.layouts[layout] = Handle(storage)
        if storage not in self.roots:
            self.roots.append(storage)
        return h


class Memories:
    """Every storage that a recording has met."""

    def __init__(self) -> None:
        self._by_address: dict[int, Memory] = {}

    def find(self, t: Tensor) -> Memory | None:
        """The memory of a tensor, if it was met before."""
        return self._by_address.get(t.untyped_storage()._cdata)

    def of(self, t: Tensor) -> Memory:
        """The memory of a tensor."""
        storage = t.untyped_storage()
        found = self._by_address.get(storage._cdata)
        if found is None:
            found = self._by_address[storage._cdata] = Memory(storage)
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._by_address.clear()
