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

from mlc.ir.watch import Watch

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
    """Measures one loop while it runs: cotangents as they enter a trip, tangents as they leave it."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._ahead = watch.kind == "tangent"
        self._found: list[Tensor] = []

    def enter(self, carries: Sequence[Any]) -> None:
        """At the start of a trip."""
        if not self._ahead:
            self._take(carries)

    def leave(self, carries: Sequence[Any]) -> None:
        """At its end."""
        if self._ahead:
            self._take(carries)

    def _take(self, carries: Sequence[Any]) -> None:
        self._found += torch._foreach_norm([carries[i] for i in self.watch.carries])

    def read(self) -> Swept:
        """What was measured."""
        w, n = self.watch, len(self.watch.carries)
        if not self._found:
            return Swept(w.level, w.kind, w.begins, torch.zeros(0))
        kinds = {(x.dtype, x.device) for x in self._found}
        if len(kinds) > 1:  # parameters of several types or devices
            self._found = [x.to("cpu", torch.float64) for x in self._found]
        return Swept(w.level, w.kind, w.begins, torch.stack(self._found).reshape(-1, n).norm(dim=1))
