"""Items of data: the tensors in one, and whether a list holds items of one structure (then its length is free)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mlc.trace.python.view import View, fields_of, is_opaque

__all__ = ["containers", "is_batch_list", "leaves", "signature"]

_DEEP = 12


def leaves(x: object, path: tuple[Any, ...], depth: int = 0) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Tensors in an item with their paths, in a fixed order; attributes are read from ``__dict__`` and slots."""
    if isinstance(x, Tensor):
        yield path, x
    elif depth > _DEEP:
        return
    elif isinstance(x, (list, tuple)):
        for i, v in enumerate(x):
            yield from leaves(v, (*path, i), depth + 1)
    elif isinstance(x, dict):
        for k, v in x.items():
            yield from leaves(v, (*path, k), depth + 1)
    elif not callable(x) and type(x).__module__ != "builtins" and not is_opaque(x):
        for k, v in fields_of(x).items():
            yield from leaves(v, (*path, "." + k), depth + 1)


def containers(x: object, path: tuple[Any, ...], depth: int = 0) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Lists and dicts in an item, which the user's code could change, with their paths."""
    if depth <= _DEEP and isinstance(x, (list, tuple, dict)):
        if not isinstance(x, tuple):
            yield path, x
        for k, v in x.items() if isinstance(x, dict) else enumerate(x):
            if isinstance(v, (list, tuple, dict)):
                yield from containers(v, (*path, k), depth + 1)


def signature(x: object, view: View, depth: int = 0) -> Any:
    """Structure of a batch: containers and types of tensors; None when it holds anything else."""
    if isinstance(x, Tensor):
        kind, requires_grad, _, _ = view.facts(x)
        return None if kind is None or requires_grad or isinstance(x, nn.Parameter) else (kind,)
    if depth > _DEEP:
        return None
    if isinstance(x, (list, tuple)) and x:
        parts = [signature(v, view, depth + 1) for v in x]
        return None if None in parts else (type(x), *parts)
    if isinstance(x, dict) and x:
        return _named(dict, x, view, depth + 1)
    if hasattr(type(x), "__dataclass_fields__"):
        return _named(type(x), fields_of(x), view, depth + 1)
    return None


def _named(cls: type, fields: dict[Any, Any], view: View, depth: int) -> Any:
    items = [(k, signature(v, view, depth)) for k, v in fields.items()]
    return None if any(s is None for _, s in items) else (cls, *items)


def is_batch_list(s: Any, view: View) -> bool:
    """Whether all items have one structure, of tensors alone."""
    if isinstance(s, tuple) and isinstance(s[0], Tensor):
        return False
    first = signature(s[0], view)
    return first is not None and all(signature(v, view) == first for v in s[1:])
