"""Small maps over the nested argument structures of ATen calls (lists, tuples, dicts with tensors as leaves)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mlc.ir.core import Var

__all__ = ["each_tensor", "flatten", "map_tensors", "substitute"]


def substitute(a: Any, env: dict[Var, Var]) -> Any:
    """Replace the Vars that ``env`` knows."""
    if type(a) is Var:
        return env.get(a, a)
    if type(a) in (tuple, list):
        return type(a)(substitute(x, env) for x in a)
    return a


def map_tensors(a: Any, f: Callable[[Tensor], Any]) -> Any:
    """The same structure with ``f`` applied to every tensor (other sequences become lists)."""
    if isinstance(a, Tensor):
        return f(a)
    t = type(a)
    if t is list or t is tuple:
        return t([map_tensors(x, f) for x in a])
    if t is dict:
        return {k: map_tensors(v, f) for k, v in a.items()}
    if isinstance(a, (list, tuple)):
        return [map_tensors(x, f) for x in a]
    return a


def each_tensor(a: Any, f: Callable[[Tensor], None]) -> None:
    """Call ``f`` on every tensor."""
    if isinstance(a, Tensor):
        f(a)
    elif isinstance(a, (list, tuple)):
        for x in a:
            each_tensor(x, f)
    elif isinstance(a, dict):
        for x in a.values():
            each_tensor(x, f)


def flatten(out: Any) -> list[Any]:
    """Leaves of nested lists and tuples."""
    if isinstance(out, (list, tuple)):
        return [x for o in out for x in flatten(o)]
    return [out]
