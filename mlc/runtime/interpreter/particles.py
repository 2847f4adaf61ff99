"""Particles of one call: where they stand when it begins, and where when it ends.

The equations that ask and tell (:class:`Recall`, :class:`Keep`) run inside a stage; what they are answered, and what
becomes of what they tell, the caller decides: a call that fails, or is only run to be compared, leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlc.ir.opaque.estimates import Keep, Recall

__all__ = ["Pairs", "Window", "keep_runner", "recall_runner"]

_OWN = 0x5DEECE66D  # apart from the numbers that torch.manual_seed gives to the user's loop


@dataclass(frozen=True)
class Pairs:
    """A value of every particle: ``up[s]`` and ``down[s]`` of pair s."""

    up: list[Tensor]
    down: list[Tensor]


@dataclass
class Window:
    """One call.

    Attributes:
        states: What particles go on from, by position of the input; others start where the user's object stands.
        sums: Sums of directions so far, by position of the meta-parameter; others are zero.
        generator: Where directions come from.
        kept: After the run: where the particles stand, by position of the result.
        summed: After the run: the new sums.
        level: After the run: whose they are; empty where nothing was told.
    """

    states: dict[int, Pairs] = field(default_factory=dict)
    sums: dict[int, list[Tensor]] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: generator())
    kept: dict[int, Pairs] = field(default_factory=dict)
    summed: dict[int, list[Tensor]] = field(default_factory=dict)
    level: str = ""

    def recall(self, op: Recall, args: Sequence[Tensor]) -> list[list[Tensor]]:
        """Sequences, as :class:`Recall` says."""
        n, k = len(op.states), op.samples
        pairs = [self.states.get(i) or _here(t, k) for i, t in zip(op.states, args[:n], strict=True)]
        each = [[self._drawn(t) for _ in range(k)] for t in args[n:]]
        sums = [[a + b for a, b in zip(self.sums[i], e, strict=True)] if i in self.sums else e
                for i, e in zip(op.metas, each, strict=True)]  # fmt: skip
        return [*[list(p.up) for p in pairs], *[list(p.down) for p in pairs], *each, *sums]

    def _drawn(self, like: Tensor) -> Tensor:
        """Drawn on the host: the same numbers on every device."""
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator).to(like.device)

    def keep(self, op: Keep, args: Sequence[list[Tensor]]) -> None:
        """What a stage tells at its end."""
        m, s = len(op.metas), len(op.states)
        sums, ups, downs = args[op.n : op.n + m], args[op.n + m : op.n + m + s], args[op.n + m + s :]
        self.level = op.level
        self.summed = {i: list(x) for i, x in zip(op.metas, sums, strict=True)}
        self.kept = {i: Pairs(list(a), list(b)) for i, a, b in zip(op.states, ups, downs, strict=True)}


def generator() -> torch.Generator:
    """A generator of its own, after ``torch.manual_seed``; the default one is left as it is."""
    return torch.Generator().manual_seed((torch.initial_seed() ^ _OWN) & (2**63 - 1))


def _here(t: Tensor, k: int) -> Pairs:
    return Pairs([t.clone() for _ in range(k)], [t.clone() for _ in range(k)])


def recall_runner(op: Recall, window: Callable[[], Window]) -> Callable[[list[Any]], list[Any]]:
    """Callable for a ``recall`` equation."""

    def run(args: list[Any]) -> list[Any]:
        given = list(args)
        args.clear()
        return list(window().recall(op, given))

    return run


def keep_runner(op: Keep, window: Callable[[], Window]) -> Callable[[list[Any]], list[Any]]:
    """Callable for a ``keep`` equation."""

    def run(args: list[Any]) -> list[Any]:
        given = list(args)
        args.clear()
        window().keep(op, given)
        return given[: op.n]

    return run
