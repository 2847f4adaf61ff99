"""Keys of equations: what must agree for two of them to be the same computation.

Every place that compares, merges or remembers equations (hash-consing, value numbering, rules recorded once, rolling)
takes its key from here, so that nothing is forgotten in one of them: keyword arguments count like positional ones, and
literals with their types: 1, 1.0 and True differ, so do 0.0 and -0.0; one nan is like another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlc.ir.core import Arg, Eqn, Op, Var

__all__ = ["call_key", "equation_key", "structure"]


def structure(a: Arg, name: Callable[[Var], Any]) -> Any:
    """An argument structure as something hashable; lists and tuples are alike, as for the operators.

    Args:
        a: A value, a literal, or lists, tuples and dicts of them.
        name: What stands for a value in the key (itself, its type, its number).
    """
    t = type(a)
    if t is Var:
        return name(a)
    if t is tuple or t is list:
        return (tuple, *[structure(x, name) for x in a])
    if t is dict:
        return (dict, *[(k, structure(v, name)) for k, v in a.items()])
    return (t, repr(a)) if t is float or t is complex else (t, a)


def call_key(op: Op, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...], name: Callable[[Var], Any]) -> Any:
    """Key of ``op(*args, **kwargs)``."""
    if not kwargs:
        return (op, structure(args, name), ())
    return (op, structure(args, name), tuple([(k, structure(v, name)) for k, v in sorted(kwargs, key=_first)]))


def _first(pair: tuple[str, Arg]) -> str:
    return pair[0]


def equation_key(e: Eqn, name: Callable[[Var], Any]) -> Any:
    """Key of an equation's computation."""
    return call_key(e.op, e.args, e.kwargs, name)
