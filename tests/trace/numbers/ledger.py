"""A ledger for tests: it runs what is linked at once, keeps what is guarded, and can be replayed with other values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlc.trace.numbers.links import Linked, unseen
from mlc.trace.numbers.number import take


class FakeLedger:
    rounds = False

    def __init__(self) -> None:
        self.guards: list[tuple[Tensor, Any, str]] = []
        self.recording = True

    def link(self, f: Callable[..., Tensor], *operands: Any) -> Tensor | None:
        if not self.recording:
            return None
        with torch.no_grad():
            return f(*(x.tensor if isinstance(x, Linked) else x for x in operands))

    def quiet(self) -> Any:
        return contextlib.nullcontext()

    def guard(self, t: Tensor, outcome: Any, what: str) -> None:
        self.guards.append((t.clone(), outcome, what))
        if not isinstance(outcome, Tensor):
            with unseen():
                got = torch._C.TensorBase.item(t)
            assert got == outcome or (got != got and outcome != outcome), (got, outcome, what)

    def number(self, value: Any) -> Any:
        dtype = torch.float64 if isinstance(value, float) else None
        return take(torch.tensor(value, dtype=dtype), self)

    def outcomes(self) -> list[Any]:
        return [outcome for _, outcome, _ in self.guards]

    def reasons(self) -> set[str]:
        return {what for _, _, what in self.guards}
