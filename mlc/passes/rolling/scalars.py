"""Python numbers in equations: which may vary from trip to trip, and how such an equation is written with tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from mlc.ir.builder import Builder
from mlc.ir.core import Custom, Draw, EffectCall, Eqn, Feed, Loop, NestedEffects, Region, Var, aten
from mlc.ir.keys import structure
from mlc.ir.types import TensorType

__all__ = ["holes", "literal_key", "spell_out"]

# op -> ((positions of numbers among the positional arguments), (names of keyword numbers))
_HOLES: dict[Any, tuple[tuple[int, ...], tuple[str, ...]]] = {
    aten("mul", "Tensor"): ((1,), ()),
    aten("mul", "Scalar"): ((1,), ()),
    aten("div", "Tensor"): ((1,), ()),
    aten("div", "Scalar"): ((1,), ()),
    aten("add", "Tensor"): ((1,), ("alpha",)),
    aten("add", "Scalar"): ((1,), ()),
    aten("sub", "Tensor"): ((1,), ("alpha",)),
    aten("sub", "Scalar"): ((1,), ()),
    aten("rsub", "Scalar"): ((1,), ()),
    aten("lerp", "Scalar"): ((2,), ()),
    aten("addcmul"): ((), ("value",)),
    aten("addcdiv"): ((), ("value",)),
    aten("pow", "Tensor_Scalar"): ((1,), ()),
    aten("pow", "Scalar"): ((0,), ()),
}
_HOLES_OF = {id(op): spec for op, spec in _HOLES.items()}  # by identity: an operator's own hash is slow
_DEFAULT = {"alpha": 1, "value": 1}


def holes(e: Eqn) -> tuple[Any, ...]:
    """Numbers of the equation that may become tensors; empty when it has none."""
    spec = _HOLES_OF.get(id(e.op))
    if spec is None:
        return ()
    found = [e.args[i] for i in spec[0] if i < len(e.args) and type(e.args[i]) in (int, float)]
    kw = dict(e.kwargs)
    found += [kw.get(k, _DEFAULT[k]) for k in spec[1] if type(kw.get(k, _DEFAULT[k])) in (int, float)]
    return tuple(found)


def literal_key(e: Eqn, *, strict: bool) -> Any:
    """Operator and literals of an equation; with ``strict`` numbers in holes and visits of iterables count too."""
    op: Any = e.op
    if isinstance(op, Loop):
        op = ("loop", loop_key(op))
    elif isinstance(op, Custom):
        op = ("custom", op.title, op.n_in, op.n_out, op.present, region_key(op.backward))
    elif isinstance(op, OpOverload):
        op = id(op)
    elif not strict and isinstance(op, (Draw, Feed)):
        op = _any_visit(op)
    spec = None if strict else _HOLES_OF.get(id(e.op))
    if spec is None:
        return (op, tuple(map(_lit, e.args)), tuple([(k, _lit(v)) for k, v in e.kwargs]) if e.kwargs else ())
    args = tuple(["#" if i in spec[0] and type(a) in (int, float) else _lit(a) for i, a in enumerate(e.args)])
    kw = tuple([(k, "#" if k in spec[1] and type(v) in (int, float) else _lit(v)) for k, v in e.kwargs])
    return (op, args, kw)


def _any_visit(op: Any) -> Any:
    """What draws, whichever iteration over an iterable it draws from: that may advance from trip to trip."""
    if isinstance(op, Draw):
        return ("draw", op.source, op.steps)
    if isinstance(op, (Feed, NestedEffects)):
        return (type(op), op.trips, tuple(map(_any_visit, op.effects)))
    return (_any_visit(op.op), op.args, op.kwargs, op.types) if isinstance(op, EffectCall) else op


def loop_key(op: Loop) -> Any:
    """Structure of a loop, equal for loops with equal bodies."""
    return (op.n_carry, op.n_const, op.trips, region_key(op.body))


def region_key(region: Region) -> Any:
    """Structure of a region, equal for equal regions."""
    local: dict[Var, Any] = {v: i for i, v in enumerate(region.inputs)}
    parts = []
    for n, e in enumerate(region.eqns):
        parts.append((literal_key(e, strict=True), tuple(local.get(v, v) for v in e.inputs)))
        for o, v in enumerate(e.outs):
            local[v] = (n, o)
    outs = tuple(local.get(v, v) for v in region.outputs)
    return (tuple(v.type for v in region.inputs), tuple(parts), outs)


def _lit(a: Any) -> Any:
    return structure(a, _any_value)


def _any_value(v: Var) -> str:
    return "%"


def _number(table: Builder, value: Any, dtype: torch.dtype, device: torch.device) -> Var:
    """A 0-d constant before the loop."""
    kw = (("dtype", dtype), ("device", device), ("pin_memory", False))
    return table.emit(aten("full"), ([], value), (TensorType(dtype, (), (), device),), kw, simplify=False)[0]


def spell_out(e: Eqn, table: Builder) -> list[Eqn]:
    """The equation with its numbers as 0-d tensors from ``table``."""
    cpu = torch.device("cpu")
    out_t = e.outs[0].type
    assert isinstance(out_t, TensorType)
    wide = torch.float64 if out_t.dtype.is_floating_point or out_t.dtype.is_complex else torch.int64
    ints = all(type(h) is int for h in holes(e))

    def num(v: Any, dtype: torch.dtype | None = None, device: torch.device = cpu) -> Var:
        d = dtype or (torch.int64 if ints and type(v) is int else wide)
        return _number(table, v, d, device)

    kw = dict(e.kwargs)
    op = e.op
    base = op.overloadpacket._qualified_op_name.split("::")[1] if hasattr(op, "overloadpacket") else ""
    if base in ("mul", "div"):
        return [e.with_(op=aten(base, "Tensor"), args=(e.args[0], num(e.args[1])))]
    if base == "rsub":
        alpha = _alpha(e, kw)
        scaled = [] if alpha == 1 else _scaled(e, e.args[0], num(alpha))
        x = scaled[-1].outs[0] if scaled else e.args[0]
        return [*scaled, e.with_(op=aten("sub", "Tensor"), args=(num(e.args[1]), x), kwargs=())]
    if base == "lerp":
        weight = num(e.args[2], out_t.dtype, out_t.device)
        return [e.with_(op=aten("lerp", "Tensor"), args=(e.args[0], e.args[1], weight))]
    if base == "pow":
        args = tuple(num(a) if type(a) in (int, float) else a for a in e.args)
        return [e.with_(op=aten("pow", "Tensor_Tensor"), args=args)]
    if base in ("add", "sub"):
        return _spell_sum(e, base, kw, num)
    return _spell_product(e, base, kw, num)


def _spell_sum(e: Eqn, base: str, kw: dict[str, Any], num: Any) -> list[Eqn]:
    alpha = _alpha(e, kw)
    b = e.args[1]
    if type(b) in (int, float):
        return [e.with_(op=aten(base, "Tensor"), args=(e.args[0], num(b * alpha)), kwargs=())]
    scaled = _scaled(e, b, num(alpha))
    return [*scaled, e.with_(op=aten(base, "Tensor"), args=(e.args[0], scaled[-1].outs[0]), kwargs=())]


def _alpha(e: Eqn, kw: dict[str, Any]) -> Any:
    """``alpha``, which the overloads for numbers also take by position."""
    return e.args[2] if len(e.args) > 2 else kw.get("alpha", 1)


def _scaled(e: Eqn, v: Var, by: Var) -> list[Eqn]:
    """``v`` times a number, in the dtype of the sum: PyTorch scales there, not in ``v``'s own."""
    cast = _summand(e, v)
    v = cast[0].outs[0] if cast else v
    return [*cast, Eqn(aten("mul", "Tensor"), (v, by), (Var(v.type),), (), e.loc, e.tag, e.site)]


def _summand(e: Eqn, v: Var) -> list[Eqn]:
    """``v`` in the dtype of the result, where it is another one."""
    t, out = v.type, e.outs[0].type
    assert isinstance(t, TensorType) and isinstance(out, TensorType)
    if t.dtype == out.dtype:
        return []
    to = TensorType(out.dtype, t.shape, t.stride, t.device)
    return [Eqn(aten("_to_copy"), (v,), (Var(to),), (("dtype", out.dtype),), e.loc, e.tag, e.site)]


def _spell_product(e: Eqn, base: str, kw: dict[str, Any], num: Any) -> list[Eqn]:
    """``addcmul(x, a, b, value=s)`` as ``x + (s a) b``, ``addcdiv`` as ``x + (s a) / b``."""
    x, a, b = e.args[:3]
    cast = _summand(e, a)
    a = cast[0].outs[0] if cast else a
    scaled, joined = Var(a.type), Var(e.outs[0].type)
    second = aten("mul" if base == "addcmul" else "div", "Tensor")
    return [
        *cast,
        Eqn(aten("mul", "Tensor"), (a, num(kw.get("value", 1))), (scaled,), (), e.loc, e.tag, e.site),
        Eqn(second, (scaled, b), (joined,), (), e.loc, e.tag, e.site),
        e.with_(op=aten("add", "Tensor"), args=(x, joined), kwargs=()),
    ]
