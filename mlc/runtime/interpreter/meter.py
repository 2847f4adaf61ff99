"""Norms of what a loop carries, trip by trip: how large the derivatives of a level's state are from step to step.

One fused norm per trip, of tensors that the trip has in hand anyway; the norms stay on their device until the loop is
over, and are read by the host when the report of the call is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlc.ir.watch import ROWS, Watch

__all__ = ["Meter", "Swept"]


@dataclass(frozen=True, eq=False)
class Swept:
    """One loop through which derivatives of a level's state went.

    Attributes:
        level: Name of the level.
        kind: As of :class:`mlc.ir.watch.Watch`: ``"adjoint"``, ``"inner"`` or ``"tangent"``.
        begins: Whether a new run of the level begins with it.
        norms: Euclidean norm at each trip, in the order in which trips ran; float, one dimension.
    """

    level: str
    kind: str
    begins: bool
    norms: Tensor


class Meter:
    """Measures one loop while it runs: cotangents as they enter a trip, tangents as they leave it.

    Norms go into one buffer for each type and device of the carries, a row a trip: nothing else stays.
    """

    def __init__(self, watch: Watch, trips: int | None = None) -> None:
        self.watch = watch
        self._ahead = watch.kind == "tangent"
        self._rows = trips or ROWS
        self._groups: list[list[int]] = []
        self._full: list[list[Tensor]] = []  # buffers, by group
        self._row = 0

    def enter(self, carries: Sequence[Any]) -> None:
        """At the start of a trip."""
        if not self._ahead:
            self._take(carries)

    def leave(self, carries: Sequence[Any]) -> None:
        """At its end."""
        if self._ahead:
            self._take(carries)

    def _take(self, carries: Sequence[Any]) -> None:
        if self._row % self._rows == 0:
            self._more(carries)
        at = self._row % self._rows
        for group, buffers in zip(self._groups, self._full, strict=True):
            torch.ops.aten._foreach_norm.Scalar_out([carries[i] for i in group], 2, out=list(buffers[-1][at].unbind()))
        self._row += 1

    def _more(self, carries: Sequence[Any]) -> None:
        if not self._groups:
            kinds: dict[Any, list[int]] = {}
            for i in self.watch.carries:
                kinds.setdefault((carries[i].dtype.to_real(), carries[i].device), []).append(i)
            self._groups, self._full = list(kinds.values()), [[] for _ in kinds]
        for group, buffers in zip(self._groups, self._full, strict=True):
            x = carries[group[0]]
            buffers.append(torch.zeros(self._rows, len(group), dtype=x.dtype.to_real(), device=x.device))

    def read(self) -> Swept:
        """What was measured."""
        w = self.watch
        found = [torch.cat(buffers)[: self._row].norm(dim=1) for buffers in self._full]
        if not found:
            return Swept(w.level, w.kind, w.begins, torch.zeros(0))
        if len(found) > 1:  # parameters of several types or devices
            found = [torch.stack([x.to("cpu", torch.float64) for x in found]).norm(dim=0)]
        return Swept(w.level, w.kind, w.begins, found[0])
