"""Calls: Python functions of tensors that a program runs as they are.

They stand for what has no equations, like a solver that the user wrote (:func:`mlc.root`).  How a call is
differentiated its callee knows: each derivative is a callee again, in both modes and at any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mlc.ir.communication.collectives import is_collective
from mlc.ir.core import Eqn, Primitive

__all__ = ["Call", "Callee", "once"]


class Callee(Protocol):
    """A Python function of tensors that a program calls as it is (see :class:`Call`); equal where it is the same."""

    def __call__(self, args: Sequence[Tensor]) -> list[Tensor]:
        """The results, without a derivative."""

    def connected(self, args: Sequence[Tensor]) -> list[Tensor]:
        """The results, connected to the arguments in PyTorch's graph."""

    def pulled(self, wanted: tuple[bool, ...], given: tuple[bool, ...]) -> Callee:
        """``(inputs, results, cotangents of the given results) -> cotangents of the wanted inputs``."""

    def pushed(self, which: tuple[bool, ...], n_out: int) -> Callee:
        """``(inputs, results, tangents of these inputs) -> tangents of all results``."""


@dataclass(frozen=True)
class Call(Primitive):
    """``call(x...)``: a Python function of tensors, run as it is; its callee says how it is differentiated.

    It stands for what has no equations, like a solver that the user wrote (:func:`mlc.root`).  ``seconds`` is what it
    took when it was recorded; a ``single`` one is right to a tolerance, so its results are kept for whoever needs them.
    """

    title: str
    callee: Callee = field(repr=False)
    seconds: float = field(default=0.0, compare=False, repr=False)
    single: bool = field(default=False, compare=False, repr=False)


def once(e: Eqn) -> bool:
    """Whether an equation must not be computed again: impure, a collective, or a call that may find another result."""
    return e.impure or is_collective(e) or (isinstance(e.op, Call) and e.op.single)
