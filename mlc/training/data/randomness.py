"""Random generators: their states, kept and put back.

Everything that data or a loss may draw from: PyTorch's default generators (the devices' where they are in use),
NumPy's and Python's global ones, and ``torch.Generator`` objects that are reached from the user's code.
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mlc.trace.python.view import fields_of, is_user_class

__all__ = ["generators_in", "kept", "plain", "restore", "states"]


def states(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """States of the global generators and of these, as the libraries give them (cheap)."""
    out: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=True),
        "python": random.getstate(),
        "own": [g.get_state() for g in generators],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out["cuda"] = torch.cuda.get_rng_state_all()
    return out


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """The same in tensors and plain values alone, to be saved."""
    kind, keys, position, has, cached = found["numpy"]
    version, body, gauss = found["python"]
    numpy = [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has, cached]
    return {**found, "numpy": numpy, "python": [version, torch.tensor(body, dtype=torch.int64), gauss]}


def _native(found: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`plain`."""
    if isinstance(found["python"], tuple):
        return found
    kind, keys, position, has, cached = found["numpy"]
    version, body, gauss = found["python"]
    numpy = (kind, keys.numpy().astype(np.uint32), position, has, cached)
    return {**found, "numpy": numpy, "python": (version, tuple(body.tolist()), gauss)}


def restore(found: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put states back."""
    found = _native(found)
    torch.set_rng_state(found["torch"])
    np.random.set_state(found["numpy"])
    random.setstate(found["python"])
    for g, state in zip(generators, found["own"], strict=True):
        g.set_state(state)
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(found["cuda"])


@contextlib.contextmanager
def kept(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """A context after which all generators stand where they stood before."""
    before = states(generators)
    try:
        yield
    finally:
        restore(before, generators)


def generators_in(things: Iterable[Any]) -> list[torch.Generator]:
    """``torch.Generator`` objects that functions, loaders and what they hold or name lead to, in a fixed order."""
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    todo = [(x, 0) for x in things]
    while todo:
        x, depth = todo.pop(0)
        if isinstance(x, torch.Generator):
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
        named = [x.__globals__[n] for n in x.__code__.co_names if n in x.__globals__]
        return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *named]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, (list, tuple, dict)):
        return [] if len(x) > _MANY else list(x.values() if isinstance(x, dict) else x)
    if isinstance(x, (DataLoader, Sampler, Dataset)) or (is_user_class(type(x)) and not isinstance(x, type)):
        return list(fields_of(x).values())
    return []


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
