"""Random generators: their states, kept and put back.

Everything that data or a loss may draw from: PyTorch's default generators (the devices' where they are in use),
NumPy's and Python's global ones, and ``torch.Generator`` objects that are reached from the user's code.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mlc.trace.python.inputs import walk

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
    """``torch.Generator`` objects that functions, loaders and what they name can reach, in a fixed order."""
    found: dict[int, torch.Generator] = {}
    for x in things:
        roots = walk(x, (), {}) if callable(x) else walk(_nothing, (x,), {})
        reached = list(roots.objects.values())
        for loader in [x, *reached]:
            if isinstance(loader, DataLoader):
                reached += [loader.generator, getattr(loader.sampler, "generator", None)]
        found.update({id(g): g for g in reached if isinstance(g, torch.Generator)})
    return list(found.values())


def _nothing(*_: Any) -> None:
    """A function that reads nothing."""
