"""Update dtype: the arithmetic of optimizer steps in float64, on float32 parameters and state.

Of the equations that an optimizer recorded, those that follow an inner gradient take their operands cast up; what the
step leaves is cast back to the type that it had.  O(equations).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mlc.ir.core import Eqn, Grad, Loop, Primitive, Region, SafeSqrt, Var, aten
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.passes.precision.compute import TAG
from mlc.record.retype import shared

__all__ = ["widen_updates"]

_CAST = aten("_to_copy")


def widen_updates(region: Region, dtypes: Mapping[Eqn, torch.dtype]) -> Region:
    """The region with the updates that follow these gradients in their dtype.

    Args:
        region: With gradients in it.
        dtypes: For each gradient, the dtype of the update that it enters; one that two gradients enter computes in
            the dtype of both, or in its own where they differ.
    """
    if not dtypes or not any(e in dtypes for e in region.eqns):
        return region
    marks: dict[Var, frozenset[torch.dtype | None]] = {}
    wider: dict[Var, Var] = {}
    eqns: list[Eqn] = []
    pending: dict[Var, Eqn] = {}
    for e in region.eqns:
        if isinstance(e.op, Grad):
            marks.update(dict.fromkeys(e.outs, frozenset([dtypes.get(e)])))
        asked: frozenset[torch.dtype | None] = frozenset().union(*[marks.get(v, frozenset()) for v in e.inputs])
        (dtype,) = asked if len(asked) == 1 else (None,)
        if e.origin is Origin.UPDATE and not isinstance(e.op, (Grad, Loop)):
            marks.update(dict.fromkeys(e.outs, asked))
        if (
            e.origin is not Origin.UPDATE
            or dtype is None
            or (isinstance(e.op, Primitive) and not isinstance(e.op, SafeSqrt))
        ):
            eqns.extend(_back(e.inputs, pending))
            eqns.append(e)
            continue
        eqns.extend(_cast(e, dtype, wider, pending))
    eqns.extend(_back(region.outputs, pending))
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def _cast(e: Eqn, dtype: torch.dtype, wider: dict[Var, Var], pending: dict[Var, Eqn]) -> list[Eqn]:
    """The equation on operands in ``dtype``; its results are entered into ``wider`` and ``pending``."""
    out = []
    for v in dict.fromkeys(e.inputs):
        if v not in wider and isinstance(v.type, TensorType) and v.type.dtype == torch.float32:
            wider[v] = Var(shared().types(_CAST, (v,), (("dtype", dtype),))[0])
            out.append(Eqn(_CAST, (v,), (wider[v],), (("dtype", dtype),), e.loc, TAG))
    made = shared().equation(e, lambda v: wider.get(v, v))
    for v, w in zip(e.outs, made.outs, strict=True):
        if w.type == v.type:
            continue
        assert isinstance(v.type, TensorType)
        wider[v] = w
        pending[v] = Eqn(_CAST, (w,), (v,), (("dtype", v.type.dtype),), e.loc, TAG)
    same = {w: v for v, w in zip(e.outs, made.outs, strict=True) if w.type == v.type}
    return [*out, made.with_(outs=tuple(same.get(w, w) for w in made.outs))]


def _back(values: tuple[Var, ...], pending: dict[Var, Eqn]) -> list[Eqn]:
    """What casts values that exist only in another dtype so far."""
    return [pending.pop(v) for v in dict.fromkeys(values) if v in pending]
