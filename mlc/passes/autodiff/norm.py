"""The Euclidean norm of several values together, as equations: the length of a direction, the size of a gradient."""

from __future__ import annotations

from collections.abc import Sequence

from mlc.ir.builder import Builder
from mlc.ir.core import Var, aten
from mlc.ir.types import TensorType, Type

__all__ = ["norm", "scalar"]


def scalar(t: Type) -> TensorType:
    """The type of one number of a tensor's kind."""
    assert isinstance(t, TensorType)
    return TensorType(t.dtype, (), (), t.device)


def norm(b: Builder, vs: Sequence[Var]) -> Var:
    """The square root of the sum of squares over all elements of all of them, in the kind of the first."""
    kind = scalar(vs[0].type)
    total: Var | None = None
    for v in vs:
        (square,) = b.emit(aten("mul", "Tensor"), (v, v), (v.type,))
        (summed,) = b.emit(aten("sum"), (square,), (scalar(v.type),))
        if summed.type != kind:
            kw = (("dtype", kind.dtype), ("device", kind.device))
            (summed,) = b.emit(aten("_to_copy"), (summed,), (kind,), kw)
        total = b.add(total, summed)
    assert total is not None
    return b.emit(aten("sqrt"), (total,), (kind,))[0]
