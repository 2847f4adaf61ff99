"""What memories held before the call wrote to them: kept at the first write, so that it can be put back or run from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Snapshots"]


class Snapshots:
    """Copies of storages, by address; the storages stay alive as long as the snapshots do."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def keep(self, t: Tensor) -> None:
        """Copy the storage of ``t``, unless it was copied before.  Bytes: those of the storage."""
        storage = t.untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = (storage, storage.clone())

    def __contains__(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self._kept

    def before(self, t: Tensor) -> Tensor:
        """``t`` as it was before the call: ``t`` itself when its memory was not written."""
        found = self._kept.get(t.untyped_storage()._cdata)
        if found is None:
            return t
        with torch.no_grad():
            old = torch.empty(0, dtype=t.dtype, device=t.device)
            return old.set_(found[1], t.storage_offset(), t.shape, t.stride())

    def put(self, t: Tensor) -> None:
        """Put back what the memory of ``t`` held, if it was written."""
        found = self._kept.get(t.untyped_storage()._cdata)
        if found is not None:
            found[0].copy_(found[1])

    def restore(self) -> None:
        """Put every storage back."""
        for storage, old in self._kept.values():
            storage.copy_(old)

    def clear(self) -> None:
        """Let go of the copies."""
        self._kept.clear()
