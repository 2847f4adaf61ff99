"""Random generators and their states: PyTorch's, NumPy's and Python's, the shared ones and those that a user made.

States are as the libraries give them, cheap to take; :mod:`mlc.training.data.randomness` makes plain data of them.
``random.SystemRandom`` has no state and counts as no generator: what it gave can be neither put back nor continued.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["Generator", "default_states", "is_generator", "kept", "put_default_states", "put_state", "state_of"]

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def is_generator(x: object) -> bool:
    """Whether an object is a generator with a state that can be taken and put back."""
    return isinstance(x, _KINDS) and not isinstance(x, random.SystemRandom)


def state_of(g: Generator) -> Any:
    """The state of a generator now."""
    if isinstance(g, np.random.Generator):
        return g.bit_generator.state
    if isinstance(g, np.random.RandomState):
        return g.get_state(legacy=False)
    return g.getstate() if isinstance(g, random.Random) else g.get_state()


def put_state(g: Generator, state: Any) -> None:
    """Inverse of :func:`state_of`."""
    if isinstance(g, np.random.Generator):
        g.bit_generator.state = state
    elif isinstance(g, random.Random):
        g.setstate(state)
    else:
        g.set_state(state)


def default_states() -> dict[str, Any]:
    """States of the generators that everybody shares (the devices' where they are in use)."""
    out = {
        "torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()
    }  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out["cuda"] = torch.cuda.get_rng_state_all()
    return out


def put_default_states(states: dict[str, Any]) -> None:
    """Inverse of :func:`default_states`."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextlib.contextmanager
def kept(generators: Sequence[Generator] = ()) -> Iterator[None]:
    """A context after which the shared generators, and these, stand where they stood before."""
    shared, own = default_states(), [state_of(g) for g in generators]
    try:
        yield
    finally:
        put_default_states(shared)
        for g, state in zip(generators, own, strict=True):
            put_state(g, state)
