"""Types of an equation's results, found by running its operator on fake tensors of its arguments' types."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from mlc.ir.core import Arg, Eqn, Index, Op, SafeSqrt, Var, aten, elem_type, map_vars
from mlc.ir.keys import call_key
from mlc.ir.types import TensorType, Type

__all__ = ["Retyper", "shared"]

_RESHAPES = {aten("view"), aten("_unsafe_view")}


class Retyper:
    """Runs operators on fake tensors, equal ones once."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._known: dict[Any, tuple[Type, ...]] = {}

    def types(self, op: Op, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...]) -> tuple[Type, ...]:
        """Types of the results of ``op(*args, **kwargs)``.

        Raises:
            RuntimeError, ValueError, TypeError: what PyTorch raises for arguments that do not fit.
        """
        if isinstance(op, Index):
            return (elem_type(args[0].type),)
        key = call_key(op, args, kwargs, _type_of)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._run(op, args, kwargs)
        return found

    def equation(self, e: Eqn, rename: Callable[[Var], Var]) -> Eqn:
        """The equation on other values, with results of the types that follow."""
        args, kwargs = map_vars(e.args, rename), tuple((k, map_vars(x, rename)) for k, x in e.kwargs)
        return e.with_(args=args, kwargs=kwargs, outs=tuple(map(Var, self.types(e.op, args, kwargs))))

    def _run(self, op: Op, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...]) -> tuple[Type, ...]:
        with self._mode, torch.no_grad():
            a, k = map_vars(args, _fake), {k: map_vars(x, _fake) for k, x in kwargs}
            if op in _RESHAPES:
                result: Any = torch.reshape(a[0], a[1] if len(a) > 1 else k["size"])
            elif isinstance(op, SafeSqrt):
                result = torch.sqrt(a[0])
            else:
                assert isinstance(op, OpOverload), op
                result = op(*a, **k)
        return tuple(TensorType.of(t) for t in _flat(result))


@functools.cache
def shared() -> Retyper:
    """One for all: candidates and rivals of a plan consist of the same equations."""
    return Retyper()


def _fake(v: Var) -> Tensor:
    t = v.type
    assert isinstance(t, TensorType)
    return torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=t.device)


def _type_of(v: Var) -> Type:
    return v.type


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for r in result or () for t in _flat(r)]
