"""Random generators that data and losses draw from: found, their states taken, saved and put back.

Everything that may be drawn from: PyTorch's default generators (the devices' where they are in use), NumPy's and
Python's global ones, and objects that are reached from the user's code: ``torch.Generator``,
``numpy.random.Generator``, ``numpy.random.RandomState`` and ``random.Random``.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mlc.trace.generators import Generator, default_states, is_generator, put_default_states, put_state, state_of
from mlc.trace.python.view import fields_of, is_user_class

__all__ = ["generators_in", "kind_of", "plain", "restore", "states"]

_LONG = 16  # numbers from which on a tuple of them is saved as a tensor


def states(generators: Sequence[Generator] = ()) -> dict[str, Any]:
    """States of the global generators and of these, as the libraries give them (cheap)."""
    return {**default_states(), "own": [state_of(g) for g in generators]}


def restore(found: dict[str, Any], generators: Sequence[Generator] = ()) -> None:
    """Put states back, from :func:`states` or from :func:`plain`."""
    found = _native(found)
    put_default_states(found)
    for g, state in zip(generators, found["own"], strict=True):
        put_state(g, state)


def kind_of(g: Generator) -> str:
    """What a generator is, for telling whether a state is one of it."""
    inner = f" of {type(g.bit_generator).__name__}" if isinstance(g, np.random.Generator) else ""
    return f"{type(g).__module__.partition('.')[0]} {type(g).__name__}{inner}"


def plain(x: Any) -> Any:
    """States in tensors and plain values alone, to be saved."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray):
        wide = x.astype(np.int64) if x.dtype.itemsize < 8 else x.view(np.int64)
        return {"array": str(x.dtype), "values": torch.from_numpy(wide.copy())}
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, tuple) and len(x) >= _LONG and all(type(v) is int for v in x):
        return {"numbers": torch.tensor(x, dtype=torch.int64)}
    if isinstance(x, tuple):
        return {"tuple": [plain(v) for v in x]}
    return [plain(v) for v in x] if isinstance(x, list) else x


def _native(x: Any) -> Any:
    """The reverse of :func:`plain`."""
    if isinstance(x, list):
        return [_native(v) for v in x]
    if not isinstance(x, dict):
        return x
    if x.keys() == {"array", "values"}:
        values, dtype = x["values"].numpy(), np.dtype(x["array"])
        return values.astype(dtype) if dtype.itemsize < 8 else values.copy().view(dtype)
    if x.keys() == {"numbers"}:
        return tuple(x["numbers"].tolist())
    if x.keys() == {"tuple"}:
        return tuple(_native(v) for v in x["tuple"])
    return {k: _native(v) for k, v in x.items()}


def generators_in(things: Iterable[Any]) -> list[Generator]:
    """Generators that functions, loaders and what they hold or name lead to, in a fixed order."""
    found: dict[int, Generator] = {}
    seen: set[int] = set()
    todo = [(x, 0) for x in things]
    while todo:
        x, depth = todo.pop(0)
        if is_generator(x):
            found[id(x)] = x
        elif id(x) not in seen and depth < _DEEP:
            seen.add(id(x))
            todo += [(part, depth + 1) for part in _parts(x)]
    return list(found.values())


_DEEP = 6
_MANY = 64  # entries from which on a container holds data


def _parts(x: Any) -> list[Any]:
    """What an object holds, or a function names."""
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if _full(c)]
        named = [x.__globals__[n] for n in _names(x.__code__) if n in x.__globals__]
        return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *named]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, (list, tuple, dict)):
        return [] if len(x) > _MANY else list(x.values() if isinstance(x, dict) else x)
    if isinstance(x, type):
        return [v for v in vars(x).values() if isinstance(v, types.FunctionType)] if is_user_class(x) else []
    if isinstance(x, (DataLoader, Sampler, Dataset)) or is_user_class(type(x)):
        return [*fields_of(x).values(), *(c for c in type(x).__mro__ if is_user_class(c))]
    return []


def _names(code: types.CodeType) -> list[str]:
    """Global names in a function, and in functions written inside of it."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return [*code.co_names, *inner]


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
