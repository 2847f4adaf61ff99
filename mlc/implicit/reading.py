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

from mlc.ir.trees import each_tensor, map_tensors

__all__ = ["Reading", "arrays_noted"]

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
        self._ours = {id(t): t for t in (*given, *self._instead.values())}
        self._outside = {_memory(t) for t in self._ours.values()}
        self._current = set(self._outside) if instead is not None else set()
        self._memories: set[Any] = set()
        self._versions = [(t, t._version) for t in given if not t.is_inference()]
        self._escaped: list[tuple[Tensor, Tensor]] = []
        self.foreign: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        each_tensor((args, kwargs or {}), self._look)

        def swap(t: Tensor) -> Tensor:
            return self._instead.get(id(t), t)

        args, kwargs = map_tensors(args, swap), map_tensors(kwargs or {}, swap)
        if getattr(func, "__name__", "") in _ESCAPES and args and isinstance(args[0], Tensor):
            self._escaped.append((args[0].detach(), args[0].detach().clone()))
        out = func(*args, **kwargs)
        each_tensor(out, self.made)
        return out

    def made(self, t: Tensor) -> None:
        """A tensor was made by the solver."""
        self._ours.setdefault(id(t), t)
        memory = _memory(t)
        if memory not in self._outside:
            self._memories.add(memory)

    def _look(self, t: Tensor) -> None:
        if id(t) in self._ours or id(t) in self._instead or id(t) in self.foreign:
            return
        memory = _memory(t)
        if memory in self._memories or memory in self._current:
            return
        self._unknown(t)
        self.foreign[id(t)] = t
        self._outside.add(memory)
        if not t.is_inference():
            self._versions.append((t, t._version))

    def written(self) -> Tensor | None:
        """A tensor from outside that the solver changed."""
        for t, version in self._versions:
            if t._version != version:
                return t
        with torch.no_grad():
            return next((t for t, old in self._escaped if not torch.equal(t.nan_to_num(), old.nan_to_num())), None)


def _memory(t: Tensor) -> Any:
    try:
        return t.untyped_storage()._cdata if t.layout is torch.strided else id(t)
    except (RuntimeError, NotImplementedError):
        return id(t)


@contextlib.contextmanager
def arrays_noted(reading: Reading) -> Iterator[None]:
    """``torch.from_numpy`` and ``frombuffer`` pass no mode: what they make is the solver's all the same."""
    originals = {name: getattr(torch, name) for name in ("from_numpy", "frombuffer")}

    def noting(original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            t = original(*args, **kwargs)
            reading.made(t)
            return t

        return make

    try:
        for name, original in originals.items():
            setattr(torch, name, noting(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
