"""Derivatives of collectives: sums and moves are linear in the values of all processes, their transposes collectives.

The derivative is that of the *sum over processes* of what the function returns there, with respect to each process's
own copy.  With x_r the value on process r and ``A`` the map of an operator on the stacked values, the cotangents are
``A^T`` applied to the stacked cotangents: ``all_reduce`` (sum) is symmetric, ``all_gather`` and ``reduce_scatter``,
``broadcast`` and ``reduce`` are each other's, a permutation of parts (``all_to_all``) is its own.  The mean is the sum
divided by a constant.  A largest or smallest value has its cotangents, summed over processes, divided among those that
hold it (as ``amax`` does); a product has no rule.

Rules are PyTorch's autograd formulas, so that they hold wherever the operator runs or is differentiated: recorded by
:mod:`mlc.passes.rules`, in a plain unroll, inside ``grad`` of ``grad``.  The forward rule follows by transposing twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlc.ir.communication.collectives import LIBRARY, NAMESPACE, operator

__all__ = ["EXTREMES", "LINEAR"]

LINEAR = ("sum", "avg")  # reductions that are linear
EXTREMES = ("max", "min")


def _linear(op: str, name: str) -> str:
    if op not in LINEAR:
        raise NotImplementedError(f"{name} with op={op!r} has no derivative across processes; use sum or avg")
    return op


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.given = inputs[1:]
    ctx.shape = inputs[0].shape
    if inputs[1] in EXTREMES:
        ctx.save_for_backward(inputs[0], output)


def _all_reduce(ctx: Any, ct: Tensor) -> Any:
    op, group = ctx.given
    if op in EXTREMES:
        x, y = ctx.saved_tensors
        holds = (x == y).to(ct.dtype)
        total, n = (operator("all_reduce")(t, "sum", group) for t in (ct, holds))
        return total * holds / n, None, None
    return operator("all_reduce")(ct, _linear(op, "all_reduce"), group), None, None


def _all_gather(ctx: Any, ct: Tensor) -> Any:
    size, group = ctx.given
    part = operator("reduce_scatter")(ct, "sum", size, group)
    return part.reshape(ctx.shape), None, None


def _reduce_scatter(ctx: Any, ct: Tensor) -> Any:
    op, size, group = ctx.given
    whole = operator("all_gather")(ct, size, group)
    if _linear(op, "reduce_scatter") == "avg":
        whole = whole / size
    return whole, None, None, None


def _broadcast(ctx: Any, ct: Tensor) -> Any:
    source, group = ctx.given
    return operator("reduce")(ct, source, group), None, None


def _reduce(ctx: Any, ct: Tensor) -> Any:
    target, group = ctx.given
    return operator("broadcast")(ct, target, group), None, None


def _all_to_all(ctx: Any, ct: Tensor) -> Any:
    (group,) = ctx.given
    return operator("all_to_all")(ct, group), None


_TRANSPOSED = {
    "all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "broadcast": _broadcast,
    "reduce": _reduce, "all_to_all": _all_to_all,
}  # fmt: skip

for _name, _rule in _TRANSPOSED.items():
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _rule, setup_context=_keep, lib=LIBRARY)
