"""Optimality conditions as functions of lists of tensors, and their linearisation at a point.

A condition is F(x, inputs) with as many results as x has tensors.  Linearised at a point it gives ``u -> (dF/dx)^T u``
by one backward pass, and ``p -> (dF/dx) p`` by differentiating that once more in u (a linear function of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlc.errors import DifferentiationError
from mlc.linear.solve import Packing

__all__ = ["Condition", "Linear", "Tensors", "grads", "stand_ins"]

Tensors = tuple[Tensor, ...]


class Condition(Protocol):
    """F(x, inputs) = 0.

    Attributes:
        what: What to call it in messages.
    """

    @property
    def what(self) -> str:
        """What to call it in messages."""

    def evaluate(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensors:
        """F at x, one tensor for each of x, differentiable."""

    def unchanged(self) -> None:
        """Check that what it reads is as it was when the root was found."""


def stand_ins(tensors: Sequence[Tensor], wanted: Sequence[bool], connected: bool) -> list[Tensor]:
    """Tensors to differentiate by: of their own, or (``connected``) on the way to what they were computed from."""
    return [
        t.view_as(t) if connected and t.requires_grad else t.detach().requires_grad_(w and t.dtype.is_floating_point)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def grads(outs: Sequence[Tensor], wrt: Sequence[Tensor], seeds: Sequence[Tensor], *, create: bool = False,
          retain: bool | None = None) -> Tensors:  # fmt: skip
    """``torch.autograd.grad`` with zeros where nothing depends."""
    pairs = [(o, s.to(o.dtype)) for o, s in zip(outs, seeds, strict=True) if o.requires_grad]
    live = [t for t in wrt if t.requires_grad]
    if not pairs or not live:
        return tuple(torch.zeros_like(t) for t in wrt)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], live, [s for _, s in pairs], create_graph=create, retain_graph=retain,
            allow_unused=True,
        )
    )  # fmt: skip
    given = [next(found) if t.requires_grad else None for t in wrt]
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(wrt, given, strict=True))


@dataclass
class Linear:
    """dF/dx at a point, as an operator on flat vectors."""

    at: list[Tensor]
    values: Tensors
    packing: Packing

    @staticmethod
    def of(condition: Condition, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Linear:
        """Linearise; inputs are constants.

        Raises:
            DifferentiationError: when F does not depend on x.
        """
        at = stand_ins(x, [True] * len(x), False)
        with torch.enable_grad():
            values = condition.evaluate(at, [t.detach() for t in inputs])
        if not any(v.requires_grad for v in values):
            raise DifferentiationError(
                f"{condition.what} does not depend on x by differentiable operations",
                advice="compute it from its first argument with torch operators, without detach() or no_grad()",
            )
        return Linear(at, values, Packing.of(x))

    def transposed(self, u: Tensor) -> Tensor:
        """``(dF/dx)^T u``."""
        return self.packing.flat(grads(self.values, self.at, self.packing.parts(u), retain=True)).detach()

    def product(self, p: Tensor) -> Tensor:
        """``(dF/dx) p``."""
        if not hasattr(self, "_dual"):
            self._dual = [torch.zeros_like(v, requires_grad=True) for v in self.values]
            with torch.enable_grad():
                self._pulled = grads(self.values, self.at, self._dual, create=True)
        out = grads(self._pulled, self._dual, self.packing.parts(p), retain=True)
        return self.packing.flat(out).detach()
