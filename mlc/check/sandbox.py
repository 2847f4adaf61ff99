"""A float64 world for one check: all that a call can reach is swapped for copies, run on, and put back.

Tensors keep their identity (closures, optimizers and tied parameters go on seeing the same objects); only
the memory behind them is replaced, one new memory per old one, so aliases stay aliases.  Containers,
attributes, closure cells and globals are remembered shallowly, which is enough because all below them is
remembered too.  Iterators are replaced by ones that can be read again, tensors in the middle of a graph of
the user's by leaves, so that nothing runs back into that graph.
"""

from __future__ import annotations

import collections
import functools
import io
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from mlc.check.precision import convert, target
from mlc.trace.generators import default_states, put_default_states
from mlc.trace.python.frames import is_user_code, is_user_module

__all__ = ["Sandbox", "convert"]

T = TypeVar("T")
_ATOMS = (int, float, complex, str, bytes, type(None), type, types.ModuleType, torch.dtype, torch.device)
_LOADING = (DataLoader, Dataset, Sampler)
_TORCH = (nn.Module, torch.optim.Optimizer, LRScheduler, torch.distributions.Distribution, *_LOADING)
_OPEN = (
    "types",
    "collections",
    "dataclasses",
    "__main__",
)  # of the standard library, what holds users' values
_DEPTH = 150


class _Replay:
    """An iterator that can be read again from its start."""

    def __init__(self, it: Iterator[Any], to: torch.dtype) -> None:
        self._it = it
        self._to = to
        self._items: list[Any] = []
        self._at = 0

    def __iter__(self) -> _Replay:
        return self

    def __next__(self) -> Any:
        if self._at == len(self._items):
            self._items.append(convert(next(self._it), self._to))
        self._at += 1
        return self._items[self._at - 1]

    def rewind(self) -> None:
        """Start again."""
        self._at = 0


class _Held:
    """A tensor, what it was, and what it is at the start of every run."""

    def __init__(self, t: Tensor, data: Tensor) -> None:
        self.t = t
        self.grad = t.grad if t.is_leaf else None
        self.requires_grad = t.requires_grad
        self.version = t._version
        self.original = t.data
        self.working = data

    def put(self, data: Tensor) -> None:
        """Back to how the run found it, but for ``grad`` (all memories first)."""
        t = self.t
        if t.is_leaf and t.grad is not self.grad:
            t.grad = None
        if not t.is_leaf and t._base is None:
            t.detach_()  # an in-place operation made it part of a graph
        if t.is_leaf and t.requires_grad != self.requires_grad:
            t.requires_grad_(self.requires_grad)
        t.data = data

    def put_grad(self) -> None:
        """The ``grad`` and the version counter that it had."""
        if self.t.is_leaf and self.t.grad is not self.grad:
            self.t.grad = self.grad
        torch._C._autograd._unsafe_set_version_counter((self.t,), (self.version,))


class Sandbox:
    """Swaps what calls can reach; see the module's head.

    Args:
        dtype: What floating tensors become (float64), or float32 to leave every type as it is.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []
        self._memories: dict[Any, tuple[Tensor, Tensor]] = {}
        self._tensors: list[_Held] = []
        self._slots: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = []
        self._working: list[Any] = []
        self._replays: list[_Replay] = []
        self._rng = default_states()

    # ---- entering

    def enter(self, x: T, depth: int = 0) -> T:
        """What takes the place of ``x`` (mostly ``x`` itself), everything below it entered."""
        if isinstance(x, type) and _is_users(x):
            self._class(x, depth)
            return x
        if isinstance(x, _ATOMS) or depth > _DEPTH:
            return x
        known = self._seen.get(id(x))
        if known is not None:
            return known  # type: ignore[no-any-return]
        self._alive.append(x)
        self._seen[id(x)] = x
        new = self._enter(x, depth + 1)
        self._seen[id(x)] = new
        return new  # type: ignore[no-any-return]

    def _enter(self, x: object, depth: int) -> Any:
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, dict):
            self._mapping(x, depth)
        elif isinstance(x, (list, collections.deque)):
            self._sequence(x, depth)
        elif isinstance(x, set):
            self._slot(lambda: set(x), functools.partial(_refill, x))
        elif isinstance(x, tuple):
            return self._tuple(x, depth)
        elif isinstance(x, types.MethodType):
            self.enter(x.__self__, depth)
            self.enter(x.__func__, depth)
        elif isinstance(x, types.FunctionType):
            self._function(x, depth)
        elif isinstance(x, functools.partial):
            for part in (x.func, x.args, x.keywords):
                self.enter(part, depth)
        elif isinstance(x, np.ndarray):
            return convert(x, self.dtype)
        elif not self._generator(x):
            return self._object(x, depth)
        return x

    def _slot(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._slots.append((read, write, read()))

    def _mapping(self, d: dict[Any, Any], depth: int) -> None:
        def write(v: dict[Any, Any]) -> None:
            if len(v) != len(d) or any(d.get(k, _MISSING) is not x for k, x in v.items()):
                _refill(d, v)

        self._slot(lambda: dict(d), write)
        for k, v in list(d.items()):
            if isinstance(k, Tensor):
                self.enter(k, depth)
            new = self.enter(v, depth)
            if new is not v:
                d[k] = new

    def _sequence(self, s: Any, depth: int) -> None:
        def write(v: list[Any]) -> None:
            if len(v) != len(s) or any(a is not b for a, b in zip(v, s, strict=True)):
                s.clear()
                s.extend(v)

        self._slot(lambda: list(s), write)
        for i, v in enumerate(s):
            new = self.enter(v, depth)
            if new is not v:
                s[i] = new

    def _tuple(self, x: Any, depth: int) -> Any:
        parts = [self.enter(v, depth) for v in x]
        if all(a is b for a, b in zip(parts, x, strict=True)):
            return x
        new = type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        self._alive.append(new)
        return new

    def _function(self, f: types.FunctionType, depth: int) -> None:
        if not is_user_code(f.__code__):
            return
        for cell in f.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            read, write = functools.partial(getattr, cell), functools.partial(setattr, cell)
            self._slot(functools.partial(read, "cell_contents"), functools.partial(write, "cell_contents"))
            new = self.enter(value, depth)
            if new is not value:
                cell.cell_contents = new
        names = _names(f.__code__)
        self._scope(f.__globals__, names, depth)
        for name in sorted(names & f.__globals__.keys()):
            module = f.__globals__[name]
            if isinstance(module, types.ModuleType) and is_user_module(module):
                self._scope(vars(module), names, depth)
        self.enter(f.__defaults__ or (), depth)
        self.enter(f.__kwdefaults__ or {}, depth)

    def _scope(self, scope: dict[str, Any], names: set[str], depth: int) -> None:
        """Globals, as far as they are named."""
        for name in sorted(names & scope.keys()):
            value = scope[name]
            self._slot(functools.partial(scope.get, name), functools.partial(scope.__setitem__, name))
            new = self.enter(value, depth)
            if new is not value:
                scope[name] = new

    def _class(self, c: type, depth: int) -> None:
        """A class of the user's: what its methods read, and its attributes."""
        if id(c) in self._seen or depth > _DEPTH:
            return
        self._seen[id(c)] = c
        for base in c.__bases__:
            self.enter(base, depth + 1)
        for name, value in list(vars(c).items()):
            wrapped = (getattr(value, a, None) for a in ("__func__", "fget"))
            inner = next((f for f in wrapped if f is not None), value)
            if name.startswith("__") and not isinstance(inner, types.FunctionType):
                continue
            new = self.enter(inner, depth + 1)
            if inner is value and not isinstance(value, types.FunctionType):
                self._slot(functools.partial(getattr, c, name), functools.partial(setattr, c, name))
                if new is not value:
                    setattr(c, name, new)

    def _generator(self, x: object) -> bool:
        """Random generators: their states."""
        if isinstance(x, torch.Generator):
            self._slot(x.get_state, x.set_state)
        elif isinstance(x, np.random.Generator):
            bits = x.bit_generator
            self._slot(lambda: bits.state, lambda v: setattr(bits, "state", v))
        elif isinstance(x, np.random.RandomState):
            self._slot(x.get_state, x.set_state)
        elif isinstance(x, random.Random):
            self._slot(x.getstate, x.setstate)
        else:
            return False
        return True

    def _object(self, x: Any, depth: int) -> Any:
        home = type(x).__module__.split(".")[0]
        if home == "torch" and not isinstance(x, _TORCH):
            return x
        if home == "mlc":
            self.enter(getattr(x, "fn", None), depth)
            return x
        if hasattr(x, "__next__") and not isinstance(x, io.IOBase) and home != "torch":
            replay = _Replay(x, self.dtype)
            self._replays.append(replay)
            return replay
        if home in sys.stdlib_module_names and home not in _OPEN:
            return x
        fields = getattr(x, "__dict__", None)
        if isinstance(fields, dict):
            self._mapping(fields, depth)
            self._alive.append(fields)
        if isinstance(x, LazyModuleMixin):
            self._slot(lambda: x.__class__, functools.partial(setattr, x, "__class__"))
        self.enter(type(x), depth)
        for name in (n for c in type(x).__mro__ for n in getattr(c, "__slots__", ())):
            if isinstance(name, str) and not name.startswith("__") and hasattr(x, name):
                self.enter(getattr(x, name), depth)
        return x

    # ---- tensors

    def _tensor(self, t: Tensor) -> Tensor:
        if is_lazy(t):  # a run gives it a shape and another class
            self._lazy(t)
            return t
        ordinary = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
        if not ordinary or t.is_inference() or t.is_meta:
            return t
        if t.requires_grad and not t.is_leaf:
            new = t.detach().to(target(t.dtype, self.dtype), copy=True).requires_grad_()
            self._seen[id(new)] = new
            self._alive.append(new)
            self._hold(new)
            return new
        grad = t.grad
        self._hold(t)
        if grad is not None:
            self.enter(grad)
        return t

    def _lazy(self, t: Any) -> None:
        kind = type(t)

        def write(empty: Tensor) -> None:
            t.grad = None
            t.data = empty
            t.__class__ = kind

        self._slot(lambda: t.data, write)
        t.data = torch.empty(0, dtype=target(t.data.dtype, self.dtype), device=t.device)

    def _hold(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = (storage._cdata, t.dtype)
        self._alive.append(storage)
        with torch.no_grad():
            if key not in self._memories:
                n = storage.nbytes() // t.dtype.itemsize
                whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, (n,), (1,))
                new = whole.to(target(t.dtype, self.dtype), copy=True)
                self._memories[key] = (new, new.clone())
            data = self._memories[key][0].as_strided(t.shape, t.stride(), t.storage_offset())
        self._tensors.append(_Held(t, data))

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor was found among what a call can reach (and is the one that runs see)."""
        return any(h.t is t for h in self._tensors)

    # ---- runs

    def ready(self) -> None:
        """Everything has been entered: from here on runs can be made."""
        for h in self._tensors:
            h.t.data = h.working
        self._working = [read() for read, _, _ in self._slots]

    def reset(self) -> None:
        """The state at the start of every run."""
        for (_, write, _), value in zip(self._slots, self._working, strict=True):
            write(value)
        with torch.no_grad():
            for current, master in self._memories.values():
                current.copy_(master)
        for h in self._tensors:
            h.put(h.working)
        for h in self._tensors:
            h.put_grad()
        for r in self._replays:
            r.rewind()
        put_default_states(self._rng)

    def restore(self) -> None:
        """The user's world as it was before the check."""
        for _, write, value in self._slots:
            write(value)
        for h in self._tensors:
            h.put(h.original)
        for h in self._tensors:
            h.put_grad()
        put_default_states(self._rng)


_MISSING = object()


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.update(content)


def _is_users(c: type) -> bool:
    module = sys.modules.get(c.__module__)
    return module is not None and is_user_module(module)


def _names(code: types.CodeType) -> set[str]:
    out = set(code.co_names)
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            out |= _names(c)
    return out
