"""The user's objects as they were before a call: to walk, to put back, and to compare with what a call left.

Copies are shallow and never of tensors' contents (the recorder keeps those when they are first written): entries of
every container, attributes of every object, bindings, states of generators, and of every tensor its memory, type,
``grad``, hooks and version. What a call cannot be undone for (generators of Python that ran on, files) is left alone.
Linear in the number of objects that the walk found.
"""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlc.ir.types import TensorType
from mlc.trace.generators import Generator, default_states, is_generator, put_default_states, put_state, state_of
from mlc.trace.python.batches import containers
from mlc.trace.python.frames import is_user_code
from mlc.trace.python.places import Path, Roots
from mlc.trace.python.view import MISSING, WHOLE, View, digest, fields_of, is_opaque, slots_of, type_of

__all__ = ["Facts", "World", "bind", "dict_kind", "refill", "set_field"]

_BODIES = (dict, list, set, deque, bytearray)
_FLAGS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_ARRAYS = 4 * WHOLE  # bytes of arrays that are copied, all together


def dict_kind(x: dict[Any, Any]) -> Any:
    """Whose methods change a dict without code of the user's (an ``OrderedDict`` keeps a list beside)."""
    return OrderedDict if isinstance(x, OrderedDict) else dict


def refill(x: Any, content: Any) -> None:
    """Make ``content`` the content of a container, without code of the user's."""
    if isinstance(x, dict):
        kind = dict_kind(x)
        kind.clear(x)
        for k, v in content.items():
            kind.__setitem__(x, k, v)
    elif isinstance(x, list):
        list.__setitem__(x, slice(None), content)
    elif isinstance(x, bytearray):
        bytearray.__setitem__(x, slice(None), content)
    elif isinstance(x, set):
        set.clear(x)
        set.update(x, content)
    elif isinstance(x, deque):
        deque.clear(x)
        deque.extend(x, content)
    elif isinstance(x, np.ndarray) and x.flags.writeable:
        x[...] = content


def set_field(x: object, name: str, value: object) -> None:
    """Set an attribute (MISSING: remove it), without code of the user's where that can be."""
    if isinstance(x, type):
        delattr(x, name) if value is MISSING else setattr(x, name, value)
        return
    held = getattr(x, "__dict__", None)
    if not isinstance(held, dict) or (name not in held and name in slots_of(type(x))):
        object.__delattr__(x, name) if value is MISSING else object.__setattr__(x, name, value)
    elif value is MISSING:
        held.pop(name, None)
    else:
        held[name] = value


def differs(now: object, old: object) -> bool:
    """Whether another object stands in a place (equal plain values are the same)."""
    if now is old:
        return False
    plain = type(now) is type(old) and isinstance(now, (int, float, str, bytes, complex, bool, torch.device))
    return not plain or not (now == old or (now != now and old != old))


def body_differs(now: Any, old: Any) -> bool:
    """Whether the content of a container is not what it was."""
    if len(now) != len(old):
        return True
    if isinstance(now, dict):
        return any(k is not j or differs(v, w) for (k, v), (j, w) in zip(now.items(), old.items(), strict=True))
    if isinstance(now, (set, bytearray)):
        return bool(now != old)
    return any(differs(v, w) for v, w in zip(now, old, strict=True))


@dataclass
class Facts:
    """A tensor as it was, but for its elements."""

    t: Tensor
    cls: Any
    type: TensorType | None
    requires_grad: bool
    leaf: bool
    grad: Tensor | None
    version: int
    alias: Tensor | None
    hooks: tuple[Any, ...]

    @staticmethod
    def of(t: Tensor) -> Facts:
        """Facts about a tensor; of odd kinds only what can be asked."""
        ordinary = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_inference()
        hooks = tuple(None if h is None else list(h.items()) for h in (getattr(t, n, None) for n in _FLAGS))
        return Facts(
            t, type(t), type_of(t), t.requires_grad, t.is_leaf,
            t.grad if t.is_leaf else None, t._version if ordinary else 0, t.detach() if ordinary else None, hooks,
        )  # fmt: skip

    def moved(self) -> bool:
        """Whether the tensor lies in another memory, or otherwise in it."""
        a, t = self.alias, self.t
        return a is not None and (
            a.untyped_storage()._cdata != t.untyped_storage()._cdata
            or (a.dtype, a.shape, a.stride(), a.storage_offset()) != (t.dtype, t.shape, t.stride(), t.storage_offset())
        )

    def hooked(self) -> bool:
        """Whether hooks were put on the tensor or taken off."""
        now = tuple(None if h is None else list(h.items()) for h in (getattr(self.t, n, None) for n in _FLAGS))
        return [h or [] for h in now] != [h or [] for h in self.hooks]

    def restore(self) -> None:
        """As it was; elements must have been put back before, for the version to mean something."""
        t = self.t
        if type(t) is not self.cls:  # a lazy parameter that got its shape
            t.data = torch.empty(0, dtype=t.dtype, device=t.device)
            t.__class__ = self.cls
        if self.leaf and not t.is_leaf and t._base is None:
            t.detach_()  # an in-place operation made it part of a graph
        if self.moved():
            assert self.alias is not None
            t.data = self.alias
        if self.leaf and t.is_leaf and t.requires_grad != self.requires_grad:
            t.requires_grad_(self.requires_grad)
        if self.leaf and t.is_leaf and t.grad is not self.grad:
            t.grad = self.grad
        if self.hooked():
            for name, old in zip(_FLAGS, self.hooks, strict=True):
                now = getattr(t, name, None)
                if now is not None:
                    refill(now, dict(old or ()))
        if self.alias is not None and t._version != self.version:
            torch._C._autograd._unsafe_set_version_counter((t,), (self.version,))


class World(View):
    """Everything that a walk found, as it is when this is made.

    Args:
        roots: A walk of what the coming call may reach.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.bodies: dict[int, tuple[Any, Any]] = {}
        self.fields: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.bindings: dict[tuple[int, str], tuple[Path, Any, str, Any]] = {}
        self.tensors: dict[int, Facts] = {}
        self.arrays: dict[int, tuple[Any, Any, Any]] = {}
        self.classes: dict[int, type] = {}
        self._hosts: list[tuple[Generator, bytes]] = []  # NumPy's and Python's, and their states
        self._states: list[tuple[Callable[[Any], Any], Any]] = []
        self._room = _ARRAYS
        self.made: set[int] | None = None  # objects that the call made, once Reads has seen it
        for path, owner, name in roots.bindings:
            self.bindings[(id(owner), name)] = (path, owner, name, super().bound(owner, name))
        for _, x in roots.visited:
            self._remember(x)
        with torch.no_grad():
            for t in roots.at.values():
                self.tensors[id(t)] = Facts.of(t)
        self._defaults()

    def _remember(self, x: object) -> None:
        self.classes[id(x)] = type(x)
        if isinstance(x, _BODIES):
            own = type(x) in _BODIES
            self.bodies[id(x)] = (x, copy.copy(x) if own else _plain(x))
            if own:
                return
        elif isinstance(x, np.ndarray):
            self._array(x)
            return
        elif not self._generator(x) and isinstance(x, type):
            self.fields[id(x)] = (x, dict(x.__dict__))
            return
        if not is_opaque(x) and not (isinstance(x, types.FunctionType) and not is_user_code(x.__code__)):
            held = fields_of(x)
            if held or hasattr(x, "__dict__"):
                self.fields[id(x)] = (x, held)

    def _array(self, a: np.ndarray[Any, Any]) -> None:
        mine = None
        if not isinstance(a, np.memmap) and a.nbytes <= min(WHOLE, self._room):
            mine = a.copy()
            self._room -= a.nbytes
        self.arrays[id(a)] = (a, digest(a), mine)

    def _generator(self, x: Any) -> bool:
        if not is_generator(x):
            return False
        state = state_of(x)
        self._states.append((functools.partial(put_state, x), state))
        if not isinstance(x, torch.Generator):
            self._hosts.append((x, pickle.dumps(state)))
        return True

    def drew(self) -> bool:
        """Whether the call drew from a generator of NumPy's or Python's that the user made."""
        return any(pickle.dumps(state_of(g)) != before for g, before in self._hosts)

    def grown(self, batches: dict[Path, Any]) -> frozenset[Path]:
        """Where lists stand that the call changed."""
        out = set()
        for path, s in batches.items():
            held = [self.bodies.get(id(x)) for x in (s, *(x for i, v in enumerate(s) for _, x in containers(v, (i,))))]
            if any(old is not None and body_differs(*old) for old in held):
                out.add(path)
        return frozenset(out)

    def _defaults(self) -> None:
        """The generators that everybody shares."""
        self._states.append((put_default_states, default_states()))

    # ---- to walk: as they were

    def body(self, x: object) -> Any:
        """Entries as they were."""
        known = self.bodies.get(id(x))
        return x if known is None else known[1]

    def attrs(self, x: object) -> dict[str, Any]:
        """Attributes as they were."""
        known = self.fields.get(id(x))
        return fields_of(x) if known is None else known[1]

    def bound(self, owner: object, name: str) -> Any:
        """What was bound."""
        known = self.bindings.get((id(owner), name))
        if known is not None:
            return known[3]
        if isinstance(owner, type) and id(owner) in self.fields:
            return self.fields[id(owner)][1].get(name, MISSING)
        return super().bound(owner, name)

    def facts(self, t: Tensor) -> tuple[Any, bool, bool, Tensor | None]:
        """Type and flags as they were."""
        known = self.tensors.get(id(t))
        return super().facts(t) if known is None else (known.type, known.requires_grad, known.leaf, known.grad)

    def hooks(self, t: Tensor) -> tuple[Any, ...]:
        """Backward hooks that were there."""
        known = self.tensors.get(id(t))
        return super().hooks(t) if known is None else known.hooks

    def digest(self, a: np.ndarray[Any, Any]) -> Any:
        """What stood for the content of an array."""
        known = self.arrays.get(id(a))
        return digest(a) if known is None else known[1]

    def was_there(self, x: object) -> bool:
        """Whether an object that Python's collector knows existed when this was made."""
        return id(x) in self.roots.paths or (self.made is not None and id(x) not in self.made)

    # ---- to put back

    def restore(self) -> None:
        """Put everything back; the elements of tensors are the recorder's to put back, before this."""
        for x, old in self.bodies.values():
            if body_differs(x, old):
                refill(x, old)
        for x, attrs in self.fields.values():
            if type(x) is not self.classes[id(x)]:
                x.__class__ = self.classes[id(x)]
            now = dict(x.__dict__) if isinstance(x, type) else fields_of(x)
            for name in {*now, *attrs}:
                value = attrs.get(name, MISSING)
                if now.get(name, MISSING) is not value and name not in ("__dict__", "__weakref__"):
                    set_field(x, name, value)
        for _, owner, name, value in self.bindings.values():
            if super().bound(owner, name) is not value and not isinstance(owner, type):
                bind(owner, name, value)
        for a, known, mine in self.arrays.values():
            if mine is not None and digest(a) != known:
                refill(a, mine)
        for put, state in self._states:
            put(state)
        with torch.no_grad():
            for facts in self.tensors.values():
                facts.restore()


def bind(owner: Any, name: str, value: Any) -> None:
    """Bind a cell or a global (MISSING: unbind it)."""
    if isinstance(owner, types.CellType):
        if value is MISSING:
            del owner.cell_contents
        else:
            owner.cell_contents = value
    elif value is MISSING:
        owner.pop(name, None)
    else:
        owner[name] = value


def _plain(x: Any) -> Any:
    """A copy of what a container of a class of its own contains."""
    kinds: tuple[Any, ...] = (dict, list, set, bytearray)
    for kind in kinds:
        if isinstance(x, kind):
            return kind(x)
    return list(x)
