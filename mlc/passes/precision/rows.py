"""Eight bits per element: rows of integers with one float32 scale each.

A row is as many of the last dimensions, as they lie in memory, as make at least ``ROW`` elements; its scale is its
largest magnitude over 127, and an element the nearest multiple of it (symmetric absmax quantisation, Dettmers et al.
2022).  The error of an element is at most half a scale.  Minus infinity, which masked attention scores are, has a code
of its own; a row with a NaN or plus infinity comes back as NaN: never as numbers.
"""

from __future__ import annotations

import math

import torch

from mlc.ir.builder import contiguous
from mlc.ir.core import Eqn, Var, aten
from mlc.ir.types import TensorType
from mlc.record.retype import shared

__all__ = ["LEAST", "ROW", "dequantised", "quantised", "rows"]

ROW = 64
LEAST = 256  # elements from which on it pays
_LEVELS = 127.0
_MASKED = -128  # the code of minus infinity
_TINY = 1e-38  # no scale is smaller: it would not be a normal number, and dividing by it gives infinities


def rows(t: TensorType) -> tuple[int, int]:
    """(rows, elements of a row) of a tensor."""
    width = 1
    for size in reversed(t.shape):
        if width >= ROW:
            break
        width *= size
    return t.numel // width, width


def _order(t: TensorType) -> list[int] | None:
    """Dimensions as they lie in memory, outermost first; None where elements overlap or leave holes."""
    order = sorted(range(len(t.shape)), key=lambda d: (-t.stride[d], d))
    shape = tuple(t.shape[d] for d in order)
    return order if tuple(t.stride[d] for d in order) == contiguous(shape) else None


class _Emitter:
    """Equations in a row."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.eqns: list[Eqn] = []

    def __call__(self, name: str, args: tuple[object, ...], overload: str = "default", **kwargs: object) -> Var:
        op = aten(name, overload)
        (t,) = shared().types(op, args, tuple(kwargs.items()))
        self.eqns.append(Eqn(op, args, (Var(t),), tuple(kwargs.items()), tag=self.tag))
        return self.eqns[-1].outs[0]


def quantised(v: Var, tag: str) -> tuple[list[Eqn], Var, Var] | None:
    """Equations from a float value to its integers (rows, elements) and scales (rows, 1), int8 and float32.

    None for a value with holes in its layout.
    """
    t = v.type
    assert isinstance(t, TensorType)
    order = _order(t)
    if order is None:
        return None
    emit = _Emitter(tag)
    n, width = rows(_permuted(t, order))
    x = v if order == sorted(order) else emit("permute", (v, order))
    x = emit("view", (x, [n, width]))
    if t.dtype != torch.float32:
        x = emit("_to_copy", (x,), dtype=torch.float32)
    masked = emit("eq", (x, -math.inf), "Scalar")
    x = emit("masked_fill", (x, masked, 0.0), "Scalar")
    largest = emit("amax", (emit("abs", (x,)), [1], True))
    scale = emit("clamp_min", (emit("div", (largest, _LEVELS), "Scalar"), _TINY))
    steps = emit("round", (emit("div", (x, scale), "Tensor"),))
    steps = emit("masked_fill", (emit("nan_to_num", (steps, 0.0, 0.0, 0.0)), masked, _MASKED), "Scalar")
    return emit.eqns, emit("_to_copy", (steps,), dtype=torch.int8), scale


def _permuted(t: TensorType, order: list[int]) -> TensorType:
    shape = tuple(t.shape[d] for d in order)
    return TensorType(t.dtype, shape, contiguous(shape), t.device)


def dequantised(q: Var, scale: Var, out: Var, tag: str) -> list[Eqn]:
    """Equations that make ``out``, of its own type, from integers and scales."""
    t = out.type
    assert isinstance(t, TensorType)
    order = _order(t)
    assert order is not None
    emit = _Emitter(tag)
    x = emit("mul", (emit("_to_copy", (q,), dtype=torch.float32), scale), "Tensor")
    x = emit("masked_fill", (x, emit("eq", (q, _MASKED), "Scalar"), -math.inf), "Scalar")
    if t.dtype != torch.float32:
        x = emit("_to_copy", (x,), dtype=t.dtype)
    x = emit("view", (x, list(_permuted(t, order).shape)))
    if order != sorted(order):
        x = emit("permute", (x, [order.index(d) for d in range(len(order))]))
    assert x.type == t, (x.type, t)
    return [*emit.eqns[:-1], emit.eqns[-1].with_(outs=(out,))]
