"""Values that a call left in the user's objects, as trees from which each later call builds its own.

What was there before the call is referred to by its path; tensors and numbers become what the caller's hook makes of
them; new containers and objects are taken apart, one node for one object, so that sharing and cycles stay. What
cannot be built again (running generators, functions that hold values of the call) is kept as it is, and noted.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlc.trace.python.places import Roots
from mlc.trace.python.state import Fresh, Known, New
from mlc.trace.python.view import fields_of, is_opaque
from mlc.trace.python.world import World

__all__ = ["Trees", "blank"]

_CONSTANT = (str, bytes, type(None), complex, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype,
             torch.device, torch.Size, range, slice)  # fmt: skip
_RUNNING = (types.GeneratorType, types.CoroutineType, types.FrameType, memoryview, torch.Generator)


def blank(cls: type, factory: Any = None) -> Any:
    """An object of a class without content; none of the user's constructors run.

    Raises:
        TypeError: when its class does not allow that.
    """
    if issubclass(cls, deque):
        return cls([], factory) if cls is deque else cls.__new__(cls)
    x = object.__new__(cls) if cls.__new__ is object.__new__ else cls.__new__(cls)
    if isinstance(x, defaultdict):
        x.default_factory = factory
    return x


class Trees:
    """Makes trees; see the module's head.

    Args:
        world: The user's objects before the call.
        roots: The walk by whose paths later calls find them.
        value: Given tensors that the call made, and numbers; what it returns stands in the tree.
    """

    def __init__(self, world: World, roots: Roots, value: Callable[[Any], Any]) -> None:
        self._world = world
        self._roots = roots
        self._value = value
        self._memo: dict[int, Any] = {}
        self._alive: list[Any] = []
        self._bases = {
            f.alias.untyped_storage()._cdata: f.t for f in reversed(list(world.tensors.values())) if f.alias is not None
        }
        self.odd: list[Any] = []  # what cannot be built again

    def of(self, x: object) -> Any:
        """The tree of a value."""
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, (bool, *_CONSTANT)):
            return x
        if isinstance(x, (int, float)):
            return self._value(x)
        if id(x) in self._memo:
            return self._memo[id(x)]
        if id(x) in self._world.roots.paths:
            return Known(self._roots.paths.get(id(x)), x)
        self._alive.append(x)
        if isinstance(x, types.FunctionType):
            if x.__closure__ and not self._world.was_there(x):
                self.odd.append(x)
            return x
        return self._made(x)

    def _tensor(self, t: Tensor) -> Any:
        if id(t) in self._world.tensors:
            return Known(self._roots.paths.get(id(t)), t)
        node = self._memo.get(id(t))
        if node is None:
            self._alive.append(t)
            node = self._memo[id(t)] = self.fresh(t)
            if t.is_leaf and t.grad is not None:
                node.grad = self.of(t.grad)
        return node

    def fresh(self, t: Tensor) -> Fresh:
        """A tensor that the call made, or whose memory it replaced."""
        view = None
        if t.layout is torch.strided:
            base = self._bases.get(t.untyped_storage()._cdata)
            if base is not None and base.dtype == t.dtype and base is not t:
                known = Known(self._roots.paths.get(id(base)), base)
                view = (known, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()))
        value = None if view is not None else self._value(t)
        return Fresh(value, t.dtype, isinstance(t, nn.Parameter), t.is_leaf and t.requires_grad, None, view)

    def _made(self, x: object) -> Any:
        cls = type(x)
        if isinstance(x, _RUNNING) or (hasattr(cls, "__next__") and is_opaque(x)) or cls.__module__ == "numpy":
            self.odd.append(x)
            return x
        if isinstance(x, (types.MethodType, functools.partial)):
            node = self._memo[id(x)] = New(cls, [])
            parts = (x.__func__, x.__self__) if isinstance(x, types.MethodType) else (x.func, x.args, x.keywords)
            node.body = [self.of(v) for v in parts]
            return node
        if is_opaque(x) and not isinstance(x, (dict, list, tuple, set, frozenset, deque)):
            return x
        factory = x.default_factory if isinstance(x, defaultdict) else x.maxlen if isinstance(x, deque) else None
        if not isinstance(x, (tuple, frozenset)):
            try:
                blank(cls, factory)
            except Exception:
                self.odd.append(x)
                return x
        node = self._memo[id(x)] = New(cls, None, {}, factory)
        if isinstance(x, dict):
            node.body = [(self.of(k), self.of(v)) for k, v in x.items()]
        elif isinstance(x, (list, tuple, set, frozenset, deque)):
            node.body = [self.of(v) for v in x]
        elif isinstance(x, bytearray):
            node.body = list(x)
        node.attrs = {k: self.of(v) for k, v in fields_of(x).items()}
        return node
