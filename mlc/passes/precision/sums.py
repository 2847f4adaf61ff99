"""Cotangents of values that a policy cast, summed in float32.

A parameter that several equations of a loss read (a recurrent net, tied weights) is cast once; the sum of what they
give back would round at every term, and terms of eight bits cancel to exactly zero now and then, where the derivative
of an Adam step is larger by many orders of magnitude.
"""

from __future__ import annotations

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Var, aten
from mlc.ir.types import TensorType
from mlc.passes.precision.compute import TAG
from mlc.record.retype import shared

__all__ = ["sum_of"]

_CAST = aten("_to_copy")


def sum_of(b: Builder, v: Var, before: Var | None, ct: Var) -> Var:
    """What is known of a value's cotangent, and one more term.

    Args:
        b: Where equations are emitted.
        v: The value.
        before: The sum so far; None: nothing yet.
        ct: The term.
    """
    made = b.producer(v)
    if before is None or made is None or made.origin is not TAG or made.op is not _CAST:
        return b.add(before, ct)
    return b.add(_wide(b, before), _wide(b, ct))


def _wide(b: Builder, ct: Var) -> Var:
    t = ct.type
    if not isinstance(t, TensorType) or t.dtype != torch.bfloat16:
        return ct
    kwargs = (("dtype", torch.float32),)
    return b.emit(_CAST, (ct,), shared().types(_CAST, (ct,), kwargs), kwargs, tag=TAG)[0]
