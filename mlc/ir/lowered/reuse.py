"""In-place reuse: which elementwise equations may write their result over an operand that dies there.

Safe when the operand has the type of the result, is the only value that holds its storage, was allocated by an
operator of the same region, and is read for the last time; elementwise operators then read each element before they
write it.  Saves an allocation, and the traffic of touching fresh memory.  Linear in the number of equations.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._ops import OpOverload

from mlc.ir.core import Alias, Custom, Eqn, Index, Loop, Pack, Region, SafeSqrt, Stop, Var
from mlc.ir.inplace import schema_of
from mlc.ir.types import TensorType

__all__ = ["into", "reused", "shared_with"]

_A: Any = torch.ops.aten
_UNARY = (
    "exp", "log", "tanh", "sqrt", "rsqrt", "neg", "sigmoid", "relu", "reciprocal", "abs", "erf", "sin", "cos",
    "square", "log1p", "expm1",
)  # fmt: skip
_BINARY = ("add", "sub", "mul", "div")

# Operators that write into their first operand, and those that can write into any of their operands.
_FIRST: dict[Any, Any] = {getattr(_A, n).default: getattr(_A, n + "_").default for n in _UNARY}
_FIRST.update({getattr(_A, n).Tensor: getattr(_A, n + "_").Tensor for n in _BINARY})
_FIRST.update({getattr(_A, n).Scalar: getattr(_A, n + "_").Scalar for n in _BINARY})
_FIRST.update(
    {
        _A.pow.Tensor_Scalar: _A.pow_.Scalar, _A.lerp.Scalar: _A.lerp_.Scalar, _A.addcmul.default: _A.addcmul_.default,
        _A.addcdiv.default: _A.addcdiv_.default, _A.masked_fill.Scalar: _A.masked_fill_.Scalar,
        _A.clamp_min.default: _A.clamp_min_.default,
    }
)  # fmt: skip
_ANY: dict[Any, Any] = {getattr(_A, n).Tensor: getattr(_A, n).out for n in _BINARY}


def shared_with(e: Eqn, k: int) -> Var | None:
    """The value whose storage result ``k`` of an equation shares, if it does."""
    if e._shared is None:
        object.__setattr__(e, "_shared", _sources(e))
    return e._shared[k]  # type: ignore[index]


def _sources(e: Eqn) -> tuple[Var | None, ...]:
    op = e.op
    if isinstance(op, (Alias, Custom)):
        first = op.n_in if isinstance(op, Custom) else 0
        return e.args[first : first + len(e.outs)]
    if isinstance(op, (Stop, Index)) or (
        isinstance(op, OpOverload) and schema_of(op).view and e.args and type(e.args[0]) is Var
    ):
        return (e.args[0],) * len(e.outs)
    return (None,) * len(e.outs)


def into(e: Eqn, v: Var) -> tuple[Any, bool] | None:
    """The operator that computes ``e`` into its operand ``v``, and whether it takes it as ``out=``."""
    if isinstance(e.op, SafeSqrt):
        return _A.sqrt_.default, False
    if e.op in _FIRST and e.args[0] is v:
        return _FIRST[e.op], False
    return (_ANY[e.op], True) if e.op in _ANY else None


_known: WeakKeyDictionary[Region, dict[int, Var]] = WeakKeyDictionary()


def reused(region: Region) -> dict[int, Var]:
    """For each equation that writes over an operand: its position, and the operand.  Remembered by region."""
    found = _known.get(region)
    if found is None:
        found = _known[region] = _reused(region)
    return found


def _reused(region: Region) -> dict[int, Var]:
    last: dict[Var, int] = {}
    for i, e in enumerate(region.eqns):
        for v in e.inputs:
            last[v] = i
    for v in region.outputs:
        last[v] = len(region.eqns)
    owner: dict[Var, Var] = {}
    holders: dict[Var, int] = {}
    odd: set[Var] = set()  # laid out otherwise than their type says
    out: dict[int, Var] = {}
    for i, e in enumerate(region.eqns):
        for k, v in enumerate(e.outs):
            if _odd(e, k, v, odd):
                odd.add(v)
        chosen = _candidate(e, i, last, owner, holders, odd)
        if chosen is not None:
            out[i] = chosen
            owner[e.outs[0]] = owner[chosen]
            holders[owner[chosen]] += 1
        else:
            _enter(e, owner, holders)
        for v in _held_on(e):
            if v in owner:
                holders[owner[v]] += 1  # for good
        for v in dict.fromkeys((*e.inputs, *e.outs)):
            if v in owner and last.get(v, i) == i:
                holders[owner[v]] -= 1
    return out


def _held_on(e: Eqn) -> Iterable[Var]:
    """What an equation's results still hold: what is packed; for replays, all; what a loop's body hands through."""
    if isinstance(e.op, Pack):
        return e.inputs
    if not isinstance(e.op, Loop):
        return ()
    return e.inputs if e.op.replay is not None else [e.args[i] for i in sorted(set().union(*_through(e.op)))]


def _through(op: Loop) -> list[set[int]]:
    """For each result of a loop, the operands whose memory it may hold (an emitted state, say)."""
    found = _sharing(op.body)
    while True:  # what a trip hands on, the next one may emit
        larger = [x.union(*(found[i] for i in x if i < op.n_carry)) for x in found]
        if larger == found:
            return found
        found = larger


_shared: WeakKeyDictionary[Region, list[set[int]]] = WeakKeyDictionary()


def _sharing(region: Region) -> list[set[int]]:
    """For each output of a region, the inputs whose memory it may hold."""
    known = _shared.get(region)
    if known is not None:
        return known
    at: dict[Var, set[int]] = {v: {i} for i, v in enumerate(region.inputs)}
    for e in region.eqns:
        if isinstance(e.op, Loop):
            for v, x in zip(e.outs, _through(e.op), strict=True):
                at[v] = set().union(*(at.get(e.args[i], ()) for i in x))
        elif isinstance(e.op, Pack):
            at[e.outs[0]] = set().union(*(at.get(v, ()) for v in e.inputs))
        else:
            for k, v in enumerate(e.outs):
                source = shared_with(e, k)
                at[v] = set() if source is None else at.get(source, set())
    found = _shared[region] = [at.get(v, set()) for v in region.outputs]
    return found


def _odd(e: Eqn, k: int, v: Var, odd: set[Var]) -> bool:
    """Whether a result shares a storage in a layout that its type does not tell."""
    shared = shared_with(e, k)
    if shared is None:
        return False
    return shared in odd or (isinstance(e.op, (Alias, Stop, Custom)) and shared.type != v.type)


def _enter(e: Eqn, owner: dict[Var, Var], holders: dict[Var, int]) -> None:
    fresh = _allocates(e)
    for k, v in enumerate(e.outs):
        shared = shared_with(e, k)
        if shared is None and fresh:
            owner[v], holders[v] = v, 1
        elif shared is not None and shared in owner:
            owner[v] = owner[shared]
            holders[owner[v]] += 1


def _candidate(e: Eqn, i: int, last: dict[Var, int], owner: dict[Var, Var], holders: dict[Var, int],
               odd: set[Var]) -> Var | None:  # fmt: skip
    if len(e.outs) != 1 or e.kwargs or not (isinstance(e.op, SafeSqrt) or e.op in _FIRST):
        return None
    t = e.outs[0].type
    for v in dict.fromkeys(e.inputs):
        if v in odd or last[v] != i or v.type != t or v not in owner:
            continue
        if holders[owner[v]] == 1 and _dense(v) and into(e, v):
            return v
    return None


def _dense(v: Var) -> bool:
    """Whether no two elements share a place (an expanded tensor must not be written)."""
    t = v.type
    if not isinstance(t, TensorType):
        return False
    span = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride, t.shape, strict=True) if n != 1):
        if stride < span:
            return False
        span = stride * n
    return True


def _allocates(e: Eqn) -> bool:
    """Whether results surely have storages of their own."""
    return isinstance(e.op, SafeSqrt) or (isinstance(e.op, OpOverload) and _allocating(e.op))


@cache
def _allocating(op: OpOverload) -> bool:
    if op.namespace != "aten" or schema_of(op).view or any(a.alias_info for a in op._schema.arguments):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
