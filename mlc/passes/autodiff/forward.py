"""Forward mode over equations: tangents of inputs become tangents of results, first equation first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Alias, Custom, Eqn, Index, Pack, SafeSqrt, Stop, Var, aten
from mlc.ir.opaque.call import Call
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, TensorType
from mlc.passes.autodiff.transpose import forward_rule
from mlc.passes.rules.recorded import NoRule

__all__ = ["PUSH", "NotForward", "push_eqn", "pushforward"]


class NotForward(NoRule):
    """An equation cannot be differentiated in forward mode (the caller goes in reverse instead)."""


def pushforward(
    b: Builder, eqns: Sequence[Eqn], tangents: dict[Var, Var], *, extra: dict[Var, Var] | None = None,
    passes: Callable[[Eqn], bool] = lambda e: False,
) -> dict[Var, Var]:  # fmt: skip
    """Jacobian-vector product over ``eqns`` (equations of ``b``, in order).

    Args:
        b: Where tangent equations are emitted.
        eqns: The equations to differentiate.
        tangents: Tangents of values that no equation here defines.
        extra: Tangents added to values that equations here do define.
        passes: Which stops let a tangent pass.

    Returns:
        Tangents of every value that has one.
    """
    out = dict(tangents)
    extra = extra or {}
    for e in eqns:
        if any(v in out for v in e.inputs):
            if isinstance(e.op, Stop) and passes(e):
                out[e.outs[0]] = out[e.args[0]]
            else:
                push_eqn(b, e, out)
        for v in e.outs:
            if v in extra:
                out[v] = b.add(out.get(v), extra[v])
    return out


# Forward rules of primitives with regions in them: filled where these rules are (:mod:`mlc.passes.autodiff.loops`).
PUSH: dict[type[Any], Callable[[Builder, Eqn, dict[Var, Var]], None]] = {}


def push_eqn(b: Builder, e: Eqn, tan: dict[Var, Var]) -> None:
    """Forward rule of one equation; enters tangents of its results into ``tan``."""
    op = e.op
    if isinstance(op, Alias):
        tan.update((o, tan[a]) for o, a in zip(e.outs, e.args, strict=False) if a in tan)
    elif isinstance(op, Stop) or e.impure:
        return
    elif isinstance(op, SafeSqrt):
        tan[e.outs[0]] = _safe_sqrt(b, e, tan[e.args[0]])
    elif type(op) in PUSH:
        PUSH[type(op)](b, e, tan)
    elif isinstance(op, Pack):
        parts = tuple(tan[v] if v in tan else b.zero(v.type) for v in e.args)
        tan[e.outs[0]] = b.emit(Pack(), parts, (e.outs[0].type,))[0]
    elif isinstance(op, Index):
        seq = tan[e.args[0]]
        assert isinstance(seq.type, SeqType)
        tan[e.outs[0]] = b.emit(op, (seq,), (seq.type.elem,))[0]
    elif isinstance(op, Custom):
        raise NotForward(f"{op.title} is a custom autograd.Function: its backward is differentiated in reverse")
    elif isinstance(op, Call):
        _push_call(b, e, tan)
    else:
        _push_aten(b, e, tan)


def _safe_sqrt(b: Builder, e: Eqn, t: Var) -> Var:
    y = e.outs[0]
    ty = y.type
    assert isinstance(ty, TensorType)
    (zero,) = b.emit(aten("eq", "Scalar"), (y, 0), (TensorType(torch.bool, ty.shape, ty.stride, ty.device),))
    (half,) = b.emit(aten("mul", "Scalar"), (t, 0.5), (t.type,))
    (quotient,) = b.emit(aten("div", "Tensor"), (half, y), (ty,))
    return b.emit(aten("masked_fill", "Scalar"), (quotient, zero, 0), (ty,))[0]


def _push_call(b: Builder, e: Eqn, tan: dict[Var, Var]) -> None:
    op = e.op
    assert isinstance(op, Call)
    which = tuple([v in tan and v.type.is_float for v in e.args])
    derived = Call(f"push {op.title}", op.callee.pushed(which, len(e.outs)), op.seconds)
    args = (*e.args, *e.outs, *[tan[v] for v, w in zip(e.args, which, strict=True) if w])
    types = [contiguous_type(v.type) for v in e.outs]
    tan.update(zip(e.outs, b.emit(derived, args, types, loc=e.loc, tag=Origin.TANGENT), strict=True))


def _push_aten(b: Builder, e: Eqn, tan: dict[Var, Var]) -> None:
    if not any(v.type.is_float for v in e.outs):
        return
    ins = e.inputs
    live = [tan[v] for v in ins if v in tan]
    if all(t in b.zeros for t in live):
        return
    rule = forward_rule(e, tuple([tan[v].type if v in tan else None for v in ins]))
    outs = iter(b.inline(rule.region, [*ins, *e.outs, *live], tag=Origin.TANGENT, loc=e.loc))
    for v, has in zip(e.outs, rule.present, strict=True):
        if has:
            t = next(outs)
            if v.type.is_float:
                tan[v] = t
