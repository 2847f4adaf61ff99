"""Tensors of the user's that the backward stage reads: kept apart from their objects, and checked to be as they were.

``p.data = t`` gives a tensor object another memory without a trace, so what is kept is an alias of the memory, never
the object itself; a write into the memory shows in its version, which all aliases share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlc.errors import DifferentiationError

__all__ = ["alias", "check_versions", "memory", "tensors_in", "versions"]


def alias(x: Any) -> Any:
    """A tensor that stays at this memory, whatever is done to the object given."""
    return x.detach() if isinstance(x, Tensor) else x


def memory(x: Any) -> int | None:
    """Identity of the memory of a tensor; None of what has none."""
    return x.untyped_storage()._cdata if isinstance(x, Tensor) and x.layout == torch.strided else None


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Tensors of nested lists."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors_in(y)


def versions(tensors: Iterable[Any]) -> list[int]:
    """How often the memory of each tensor was written (an inference tensor does not count: 0)."""
    return [0 if t.is_inference() else t._version for t in tensors if isinstance(t, Tensor)]


def check_versions(tensors: Iterable[Any], before: list[int]) -> None:
    """Raise unless nothing was written since ``before``.

    Raises:
        DifferentiationError: where a tensor was written.
    """
    if versions(tensors) != before:
        raise DifferentiationError(
            "a tensor that the compiled loop read was modified by an in-place operation before backward()",
            advice="take the hypergradient before you write to the loop's data, or pass the loop a clone()",
        )
