"""Functions of tensors as callees of ``call`` equations, and their derivatives as further ones.

The derivative of a function that PyTorch's autograd can differentiate is such a function again: the vector-Jacobian
product by one backward pass, the Jacobian-vector product by differentiating that in its (linear) cotangent.  So any
order and any mixture of modes is there, and each runs only when the program does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.implicit.condition import Tensors, grads, stand_ins

__all__ = ["Function"]


class Function:
    """A differentiable function of tensors; equal where its key is.

    Args:
        run: ``(*tensors) -> tensors``; differentiable again where gradients are enabled.
        key: What tells it from others.
    """

    def __init__(self, run: Callable[..., Tensors], key: tuple[Any, ...]) -> None:
        self._run, self.key = run, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, args: Sequence[Tensor]) -> list[Tensor]:
        """The results, without a derivative."""
        with torch.no_grad():
            return list(self._run(*args))

    def connected(self, args: Sequence[Tensor]) -> list[Tensor]:
        """The results, connected to the arguments in PyTorch's graph."""
        return list(self._run(*args))

    def pulled(self, wanted: tuple[bool, ...], given: tuple[bool, ...]) -> Function:
        """``(inputs, results, cotangents of the given results) -> cotangents of the wanted inputs``."""
        run = self._run

        def pull(*tensors: Tensor) -> Tensors:
            again = torch.is_grad_enabled()
            ins, cts = tensors[: len(wanted)], tensors[len(wanted) + len(given) :]
            with torch.enable_grad():
                points = stand_ins(ins, wanted, again)
                outs = [o for o, g in zip(run(*points), given, strict=True) if g]
                return grads(outs, [p for p, w in zip(points, wanted, strict=True) if w], cts, create=again)

        return Function(pull, ("pull", self.key, wanted, given))

    def pushed(self, which: tuple[bool, ...], n_out: int) -> Function:
        """``(inputs, results, tangents of these inputs) -> tangents of all results``."""
        run = self._run

        def push(*tensors: Tensor) -> Tensors:
            again = torch.is_grad_enabled()
            ins, tangents = tensors[: len(which)], tensors[len(which) + n_out :]
            with torch.enable_grad():
                points = stand_ins(ins, which, again)
                return along(run(*points), [p for p, w in zip(points, which, strict=True) if w], tangents, again)

        return Function(push, ("push", self.key, which))


def along(outs: Sequence[Tensor], points: Sequence[Tensor], tangents: Sequence[Tensor], again: bool) -> Tensors:
    """Tangents of ``outs`` given those of ``points``: the transpose of the transpose."""
    dual = [torch.zeros_like(o, requires_grad=True) for o in outs]
    pulled = grads(outs, points, dual, create=True)
    return grads(pulled, dual, tangents, create=again)
