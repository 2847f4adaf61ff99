"""Communication between processes as operators of programs: functional, complete when they return, named by group.

Every process of a group runs the same sequence of these operators, each on its own values.  A group is written by the
name that PyTorch gives it (``"0"`` is the world), never as an object, so that a program holds no process group.  All
are linear maps of the values of all processes together, hence the whole table of derivatives
(:mod:`mlc.passes.rules.collectives`): tangents go through the operator itself, cotangents through its transpose, which
is one of them again.

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

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from mlc.ir.core import Alias, Eqn, Loop, Region, Stop, Var
from mlc.ir.keys import equation_key
from mlc.ir.literals import type_text

__all__ = ["LIBRARY", "communicates", "fingerprint", "group_of", "groups", "operator", "sequence"]

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


def group_of(e: Eqn) -> str:
    """Name of the group that a collective equation communicates in."""
    name = e.args[-1]
    assert isinstance(name, str)
    return name


def _within(region: Region) -> Iterator[tuple[Eqn, str]]:
    """Collectives in the order in which they run, with the loops around them, and which one they repeat, as text."""
    repeated = _repeats(region)
    for e in region.eqns:
        if isinstance(e.op, Loop):
            how = f"loop[{e.op.trips}{',reverse' if e.op.reverse else ''}] "
            yield from ((x, how + around) for x, around in _within(e.op.body))
            if e.op.replay is not None:
                how = f"replay[{e.op.trips},{e.op.replay.slots}] "
                yield from ((x, how + around) for x, around in _within(e.op.replay.body))
        elif e.communicates:
            yield e, repeated.get(e, "")
        else:
            for body in _bodies(e):
                yield from _within(body)


def _repeats(region: Region) -> dict[Eqn, str]:
    """Collectives that are the same function of the same values as an earlier one, as far as this process knows.

    Passes take them for one.  That is right if it is so on every process: hence it belongs to what must be the same.
    """
    mine = [e for e in region.eqns if e.communicates]
    if len(mine) < 2:
        return {}
    numbers: dict[Var, Any] = {}
    known: dict[Any, int] = {}
    place: dict[int, int] = {}
    out: dict[Eqn, str] = {}
    for e in region.eqns:
        if isinstance(e.op, Alias | Stop):
            numbers.update((o, numbers.get(a, a)) for o, a in zip(e.outs, e.args, strict=False))
            continue
        key = object() if e.impure else equation_key(e, lambda v: ("value", numbers.get(v, v)))
        n = known.setdefault(key, len(known))
        numbers.update((v, (n, i)) for i, v in enumerate(e.outs))
        if e.communicates:
            first = place.setdefault(n, len(place))
            if first != len(place) - 1:
                out[e] = f"repeats {first}: "
    return out


def _bodies(e: Eqn) -> Iterator[Region]:
    """Regions inside other primitives (the backward of a custom Function, a fused segment)."""
    for value in vars(e.op).values() if not isinstance(e.op, OpOverload) else ():
        if isinstance(value, Region):
            yield value


def communicates(region: Region) -> bool:
    """Whether anything in a region communicates."""
    return next(_within(region), None) is not None


def groups(region: Region) -> tuple[str, ...]:
    """Names of the groups that a region communicates in, sorted."""
    return tuple(sorted({group_of(e) for e, _ in _within(region)}))


def sequence(region: Region) -> list[tuple[str, Any]]:
    """What a region communicates, in order: a text that must be the same on every process, and the user's line.

    The text names the operator, its literals, the type of the value, the loops around it, and its group by the order
    in which groups are used: on another process the group beside this one has another name.
    """
    order: dict[str, int] = {}
    return [(f"{around}{_said(e, order)}", e.loc) for e, around in _within(region)]


def _said(e: Eqn, order: dict[str, int]) -> str:
    assert isinstance(e.op, OpOverload)
    x = e.args[0]
    assert type(x) is Var
    role = order.setdefault(group_of(e), len(order))
    rest = ", ".join([*map(str, e.args[1:-1]), f"group {role}"])
    return f"{e.op._schema.name.split('::')[1]}({type_text(x.type)}, {rest})"


def fingerprint(said: list[str]) -> int:
    """63 bits of a list of texts."""
    return int.from_bytes(hashlib.sha256("\n".join(said).encode()).digest()[:8], "big") >> 1
