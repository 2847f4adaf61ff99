"""A call of torch with numbers among its arguments: which operator runs, and on what.

The operator gets the number's 0-d tensor where it can take one (:mod:`mlc.trace.numbers.operands`), else the plain
number, whose exact value is guarded. Functions of torch that are written in Python are entered.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from mlc.trace.numbers.links import Linked, StandIn, alive, plain
from mlc.trace.numbers.operands import DATA, HANDLERS, NoTensor, found, leaves, pinned, tree

__all__ = ["answer", "enter"]

_FALLBACK = (NoTensor, RuntimeError, TypeError)  # the plain number then gives the result, or eager PyTorch's own error
_same_version: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
_NATIVE = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def enter(func: Any, types_: object, args: Any, kwargs: Any, mode: AbstractContextManager[Any] | None) -> Any:
    """Run a function of torch that is written in Python with the mode (or none) on inside it."""
    if not func.__module__.startswith("torch"):  # a replacement of ours: it calls the original itself
        return func(*args, **kwargs)
    redispatch = getattr(torch.overrides, "redispatch_function", None)
    if func is Tensor.unflatten or redispatch is None:  # it calls its native namesake; before PyTorch 2.13
        return func(
            *pinned(args, f"an argument of {func.__name__}"), **pinned(kwargs, f"an argument of {func.__name__}")
        )
    with mode if mode is not None else contextlib.nullcontext():
        return redispatch(func, types_, args, kwargs)


def answer(func: Any, types_: object, args: Any, kwargs: Any, mode: AbstractContextManager[Any] | None = None) -> Any:
    """A call of torch with numbers among its arguments (also inside lists, tuples, slices and dictionaries)."""
    args, kwargs = tree(args, _real), tree(kwargs, _real)
    if not found((args, kwargs)) and func not in DATA:
        return func(*args, **kwargs)
    if isinstance(func, types.FunctionType):
        return enter(func, types_, args, kwargs, mode)
    name = getattr(func, "__name__", "")
    handler = HANDLERS.get(name) or HANDLERS.get(name.removesuffix("_"))
    known = isinstance(func, _NATIVE) or (isinstance(func, OpOverloadPacket) and str(func).startswith("aten."))
    if known and handler is not None:
        with contextlib.suppress(*_FALLBACK):
            return _rounded(func, name, args, kwargs, lambda: handler(func, name, list(args), dict(kwargs)))
    if known and name.startswith("_foreach_"):
        with contextlib.suppress(*_FALLBACK):
            return _foreach(func, name, list(args), dict(kwargs))
    return func(*pinned(args, f"an argument of {name}"), **pinned(kwargs, f"an argument of {name}"))


def _rounded(func: Any, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """What ``run`` records, with the rounding of eager PyTorch: a scaled sum, say, is rounded once and not twice."""
    ledger = next((x.ledger for x in leaves((args, list(kwargs.values()))) if isinstance(x, Linked)), None)
    native = None
    if ledger is not None and ledger.rounds:
        given, named = list(tree(args, plain)), tree(kwargs, plain)
        with ledger.quiet(), torch.no_grad(), contextlib.suppress(*_FALLBACK):
            if name.endswith("_") and not name.endswith("__"):
                given[0] = given[0].detach().clone()
            native = None if "out" in named else func(*given, **named)
    result = run()
    if ledger is not None and isinstance(native, Tensor) and isinstance(result, Tensor):
        with ledger.quiet(), torch.no_grad(), _same_version(result):
            result.detach().copy_(native)
    return result


def _real(x: object) -> Any:
    if isinstance(x, Linked):
        return x if alive(x) else x.value
    return x.stands_for if isinstance(x, StandIn) else x


def _foreach(func: object, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``_foreach_*``: the operator of one tensor on each of the lists."""
    base = name.removeprefix("_foreach_")
    op = {"maximum": "clamp_min", "minimum": "clamp_max"}.get(base.removesuffix("_"), base.removesuffix("_"))
    op = op + "_" if base.endswith("_") else op
    if not isinstance(args[0], (list, tuple)) or not hasattr(Tensor, op) or op.removesuffix("_") not in HANDLERS:
        raise NoTensor
    if "add" in op and len(args) == 4:
        kwargs["value"] = args.pop()
    n = len(args[0])

    def each(x: object) -> list[Any]:
        return list(x) if isinstance(x, (list, tuple)) else [x] * n

    rows = zip(*(each(a) for a in args), strict=True)
    columns = {k: each(v) for k, v in kwargs.items()}
    method = getattr(Tensor, op)
    out = tuple(answer(method, (), row, {k: v[i] for k, v in columns.items()}) for i, row in enumerate(rows))
    return None if name.endswith("_") else out
