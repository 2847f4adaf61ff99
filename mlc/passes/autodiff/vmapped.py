"""Operators on batched values: several tangents at once, in a new leading dimension.

An equation some of whose inputs carry the extra dimension becomes the equations that ``torch.func.vmap`` makes of
its operator, recorded once per signature on fake tensors (as the derivative rules are).  Where PyTorch has no
batching rule, and for operators that read memory by strides, every slice is computed alone and the results are
stacked: always exact, and no case that fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from mlc.errors import MlcError
from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Alias, Eqn, Region, Stop, Var, aten, map_vars
from mlc.ir.trees import flatten
from mlc.ir.types import SeqType, TensorType, Type
from mlc.passes.rules.recorded import NoRule, fake_mode, signature, with_values
from mlc.record.recorder import Recorder

__all__ = ["batched_type", "inline_batched", "slice_type"]

_BY_SLICES = {aten("as_strided"), aten("as_strided_scatter")}
_CACHE: dict[Any, Region | None] = {}
# What PyTorch and the recorder raise where an operator cannot be batched.
_REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError, KeyError, IndexError, MlcError)


def batched_type(t: Type, k: int) -> Type:
    """``t`` with a leading dimension of ``k`` (of every element, for a sequence), contiguous."""
    if isinstance(t, SeqType):
        return SeqType(batched_type(t.elem, k), t.length, t.usual)
    return contiguous_type(TensorType(t.dtype, (k, *t.shape), (k, *t.shape), t.device))


def slice_type(t: Type) -> TensorType:
    """Type of one slice of a batched value, contiguous."""
    assert isinstance(t, TensorType)
    found = contiguous_type(TensorType(t.dtype, t.shape[1:], t.shape[1:], t.device))
    assert isinstance(found, TensorType)
    return found


def inline_batched(b: Builder, r: Region, args: Sequence[Var], batched: set[Var], k: int, *, tag: str,
                   loc: Any = None) -> list[Var | None]:  # fmt: skip
    """Emit ``r`` applied to ``args``, those in ``batched`` with a leading dimension of ``k``.

    Returns:
        Batched results; None for a result that no batched value reaches.
    """
    env = dict(zip(r.inputs, args, strict=True))
    extra = set(batched)
    for e in r.eqns:
        here = e.with_(args=map_vars(e.args, env.__getitem__), loc=loc or e.loc, tag=tag,
                       kwargs=tuple([(n, map_vars(v, env.__getitem__)) for n, v in e.kwargs]))  # fmt: skip
        if any(v in extra for v in here.inputs):
            outs = _emit_batched(b, e, here, extra, k)
            extra.update(outs)
        else:
            outs = b.emit(e.op, here.args, [v.type for v in e.outs], here.kwargs, here.loc, tag)
        env.update(zip(e.outs, outs, strict=True))
    return [env[v] if env[v] in extra else None for v in r.outputs]


def _emit_batched(b: Builder, e: Eqn, here: Eqn, batched: set[Var], k: int) -> tuple[Var, ...]:
    """One equation of a rule: ``e`` as it was recorded, ``here`` with the arguments it gets."""
    if isinstance(e.op, (Alias, Stop)):
        args = here.args[: len(e.outs)]
        return b.emit(e.op, args, [v.type for v in args], loc=here.loc, tag=here.tag)
    if not isinstance(e.op, OpOverload):
        raise NoRule(f"{e.op.name} has no batched form")
    if all(v in b.zeros for v in here.inputs if v in batched):
        short = b._simplify(e.op, here.args, [batched_type(v.type, k) for v in e.outs], here.kwargs)
        if short is not None:
            return short
    rule = _rule(here, tuple([v in batched for v in here.inputs]), len(e.outs))
    if rule is None:
        return _by_slices(b, e, here, batched, k)
    return b.inline(rule, here.inputs, tag=here.tag, loc=here.loc)


def _rule(e: Eqn, batched: tuple[bool, ...], n_outs: int) -> Region | None:
    """What vmap makes of an equation: a region over ``e.inputs``; None where it has no rule."""
    if e.op in _BY_SLICES:
        return None
    key = (*signature(e), batched)
    if key not in _CACHE:
        try:
            _CACHE[key] = _record(e, batched, n_outs)
        except _REFUSALS:
            _CACHE[key] = None
    return _CACHE[key]


def _record(e: Eqn, batched: tuple[bool, ...], n_outs: int) -> Region:
    rec = Recorder(merge=True, fake_mode=fake_mode())
    ins: list[Tensor] = []
    for v in e.inputs:
        t = rec.fresh(rec.builder.input(v.type))
        rec.handle(t).leaf = True
        ins.append(t)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = with_values([list(e.args), dict(e.kwargs)], list(values))
        return tuple([t for t in flatten(e.op(*args, **kwargs)) if isinstance(t, Tensor)])  # type: ignore[operator]

    before = torch._C._functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    torch._C._functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
    try:
        with rec, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outs = torch.func.vmap(call, in_dims=tuple([0 if x else None for x in batched]))(*ins)
        found = [rec.value(rec.handle(t)) for t in outs]
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(before)  # type: ignore[attr-defined]
    if len(found) != n_outs:
        raise NoRule(f"{e.op}: results differ")
    return rec.builder.region(found)


def _by_slices(b: Builder, e: Eqn, here: Eqn, batched: set[Var], k: int) -> tuple[Var, ...]:
    """Every slice alone, then stacked."""
    types = [v.type for v in e.outs]
    declared = dict(zip(here.inputs, [v.type for v in e.inputs], strict=True))
    rows: list[tuple[Var, ...]] = []
    for i in range(k):
        env: dict[Var, Var] = {}
        for v, t in declared.items():
            env[v] = b.emit(aten("select", "int"), (v, 0, i), (t,), tag=here.tag)[0] if v in batched else v
        args = map_vars(here.args, env.__getitem__)
        kwargs = tuple([(n, map_vars(x, env.__getitem__)) for n, x in here.kwargs])
        rows.append(b.emit(e.op, args, types, kwargs, here.loc, here.tag))
    return tuple(
        b.emit(aten("stack"), (list(column),), (batched_type(column[0].type, k),), loc=here.loc, tag=here.tag)[0]
        for column in zip(*rows, strict=True)
    )
