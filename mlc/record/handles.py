"""Memories and tensors of a recorded program."""

from __future__ import annotations

from typing import Any

from mlc.ir.core import Var
from mlc.ir.types import Loc

__all__ = ["Handle", "Storage"]


class Storage:
    """One memory of the recorded program: its current value and how often it was written."""

    __slots__ = ("apart", "born", "copied", "external", "leaf", "soft", "updated", "var", "version")

    def __init__(self, var: Var, external: Any = None) -> None:
        self.var = var
        self.version = 0
        self.external = external
        self.apart = False  # a view that has a value of its own beside that of its memory (a hook stands there)
        self.copied = False  # of a differentiable copy (mlc.clone): its steps are followed at every depth
        self.leaf = False  # memory of a leaf that requires grad: each value it takes is one to differentiate by
        self.soft = False  # an inner gradient taken without create_graph
        self.updated = False  # written after the place that made it was left: state, not a passing value
        self.born: Any = (
            None  # the place that made it: loop iterations, and how often gradients were switched on or off
        )


class Handle:
    """One tensor: a storage seen through a chain of ``(op, args, kwargs, output index, types, loc)`` view steps."""

    __slots__ = ("cached", "chain", "copy", "hidden", "leaf", "origin", "soft", "storage", "taint", "version")

    def __init__(self, storage: Storage, chain: tuple[Any, ...] = (), origin: Loc | None = None) -> None:
        self.storage = storage
        self.chain = chain
        self.taint = False  # an inner gradient taken with create_graph: carries a derivative
        self.soft = False  # ... without: a constant for inner gradients, differentiated by the hypergradient
        self.leaf = False
        self.hidden = False  # a view made under no_grad: PyTorch's flag says it requires grad, but nothing flows
        self.copy = False  # made by copy.deepcopy
        self.origin = origin
        self.version = -1
        self.cached: Var | None = None
