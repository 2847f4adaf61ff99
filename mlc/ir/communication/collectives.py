"""Communication between processes as operators of programs: functional, complete when they return, named by group.

Every process of a group runs the same sequence of these operators, each on its own values.  A group is written by the
name that PyTorch gives it (``"0"`` is the world), never as an object, so that a program holds no process group.  All
but reductions by max, min and product are linear maps of the values of all processes together, hence the table of
derivatives (:mod:`mlc.passes.rules.collectives`): tangents go through the operator itself, cotangents through its
transpose, which is one of them again.

=============== ==================================================================== ======================
operator        result on every process                                              transpose
=============== ==================================================================== ======================
all_reduce      sum (or mean, or largest, ...) of the values                         all_reduce
all_gather      values in the order of ranks, along the first dimension              reduce_scatter
reduce_scatter  part of the sum (or mean) that is its own, along the first dimension all_gather
broadcast       the value of one process                                             reduce
reduce          sum on one process, zeros on the others                              broadcast
all_to_all      part i of process j's value becomes part j of process i's            all_to_all
=============== ==================================================================== ======================

``reduce`` is not ``torch.distributed.reduce``, which leaves on other processes what was there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from mlc.ir.core import Eqn

__all__ = ["LIBRARY", "NAMESPACE", "group_of", "is_collective", "operator"]

NAMESPACE = "mlc"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

_SCHEMAS = {
    "all_reduce": "(Tensor x, str op, str group) -> Tensor",
    "all_gather": "(Tensor x, int size, str group) -> Tensor",
    "reduce_scatter": "(Tensor x, str op, int size, str group) -> Tensor",
    "broadcast": "(Tensor x, int source, str group) -> Tensor",
    "reduce": "(Tensor x, int target, str group) -> Tensor",
    "all_to_all": "(Tensor x, str group) -> Tensor",
}


def _same(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty((size * x.shape[0] if x.dim() else size, *x.shape[1:]))


def _reduce_scatter(x: Tensor, op: str, size: int, group: str) -> Tensor:
    return x.new_empty((x.shape[0] // size, *x.shape[1:]))


def _all_to_all(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


_FAKES = {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_to_all": _all_to_all}

for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES.get(_name, _same), lib=LIBRARY)


def operator(name: str) -> OpOverload:
    """``torch.ops.mlc.<name>.default``."""
    op = getattr(torch.ops.mlc, name).default
    assert isinstance(op, OpOverload)
    return op


def is_collective(e: Eqn) -> bool:
    """Whether other processes have a part in an equation: it is never computed again."""
    return isinstance(e.op, OpOverload) and e.op.namespace == NAMESPACE


def group_of(e: Eqn) -> str:
    """Name of the group that a collective equation communicates in."""
    name = e.args[-1]
    assert isinstance(name, str)
    return name
