"""What a black-box solver reads and writes besides its arguments.

A compiled function calls the solver again at every call.  Tensors that it reads by closure become inputs of its node,
and take the place of those that it finds there; what nobody saw at the first call is noticed at a later one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mlc.ir.trees import each_tensor, map_tensors

__all__ = ["Reading", "noting"]

_GRAD: Any = torch._C.TensorBase.grad
_ESCAPES = {"numpy", "__array__", "data_ptr", "untyped_storage", "__dlpack__"}


class Reading(TorchFunctionMode):
    """While a solver runs.

    Args:
        given: Its arguments.
        instead: Tensors to take the place of others, by their identity.
        unknown: Called with a tensor from outside that is neither.

    Attributes:
        foreign: Tensors from outside that were read, in order.
    """

    def __init__(self, given: Sequence[Tensor], instead: Mapping[int, Tensor] | None = None,
                 unknown: Callable[[Tensor], None] = lambda t: None) -> None:  # fmt: skip
        super().__init__()
        self._instead = dict(instead or {})
        self._unknown = unknown
        self._given = {id(t): t for t in (*given, *self._instead.values())}
        self._current = {_memory(t) for t in self._given.values()} if instead is not None else set()
        self._made: Any = WeakIdKeyDictionary()
        self._versions = [(t, t._version) for t in given if not t.is_inference()]
        self._escaped: list[tuple[Tensor, Tensor]] = []
        self.foreign: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        each_tensor((args, kwargs or {}), self.look)

        def swap(t: Tensor) -> Tensor:
            return self._instead.get(id(t), t)

        args, kwargs = map_tensors(args, swap), map_tensors(kwargs or {}, swap)
        if getattr(func, "__name__", "") in _ESCAPES and args and isinstance(args[0], Tensor):
            self._escapes(args[0])
        out = func(*args, **kwargs)
        if getattr(func, "__self__", None) is _GRAD:
            self.part(args[0], out)
        else:
            each_tensor(out, self.made)
        return out

    def made(self, t: Tensor) -> None:
        """A tensor was made by the solver."""
        if id(t) not in self._given and id(t) not in self.foreign:
            self._made[t] = True

    def part(self, t: Tensor, out: Tensor | None) -> None:
        """The solver looked at ``t.grad`` or the like: it is of the solver's making if ``t`` is."""
        if out is None or out in self._made:
            return
        if t in self._made:
            self.made(out)
        else:
            self.look(out)

    def look(self, t: Tensor) -> None:
        """The solver reads a tensor."""
        if id(t) in self._given or id(t) in self._instead or id(t) in self.foreign or t in self._made:
            return
        if self._current and _memory(t) in self._current:
            return
        self._unknown(t)
        self.foreign[id(t)] = t
        if not t.is_inference():
            self._versions.append((t, t._version))

    def _escapes(self, t: Tensor) -> None:
        """Its memory may be written unseen."""
        if t not in self._made or t._is_view():
            self._escaped.append((t.detach(), t.detach().clone()))

    def written(self) -> Tensor | None:
        """A tensor from outside that the solver changed."""
        for t, version in self._versions:
            if t._version != version:
                return t
        with torch.no_grad():
            outside = {_memory(t) for t in (*self._given.values(), *self.foreign.values())}
            changed = (t for t, old in self._escaped if _memory(t) in outside and not _same(t, old))
            return next(changed, None)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.dtype.is_floating_point else torch.equal(a, b)


def _memory(t: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        try:
            return t.untyped_storage()._cdata if t.layout is torch.strided else id(t)
        except (RuntimeError, NotImplementedError):
            return id(t)


@contextlib.contextmanager
def noting(reading: Reading) -> Iterator[None]:
    """While a solver runs: what passes no mode, but is of its making or reading all the same."""

    def making(original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            t = original(*args, **kwargs)
            reading.made(t)
            return t

        return make

    def part(original: property) -> property:
        def get(t: Tensor) -> Tensor | None:
            found: Tensor | None = original.fget(t)  # type: ignore[misc]
            reading.part(t, found)
            return found

        return property(get, original.fset, original.fdel)

    def subclass(kind: type, data: Tensor, *args: Any, **kwargs: Any) -> Any:  # parameters
        t: Tensor = make_subclass(kind, data, *args, **kwargs)
        reading.part(data, t)
        return t

    make_subclass = Tensor._make_subclass
    with contextlib.ExitStack() as stack:
        for name in ("from_numpy", "frombuffer"):
            stack.enter_context(_set(torch, name, making(getattr(torch, name))))
        stack.enter_context(_set(Tensor, "_make_subclass", staticmethod(subclass)))
        for name in ("grad", "data"):
            if isinstance(vars(Tensor).get(name), property):  # an observer's, which no mode sees
                stack.enter_context(_set(Tensor, name, part(vars(Tensor)[name])))
        yield


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before, own = vars(owner).get(name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
