"""From mutating operators to functional ones.

PyTorch names in-place overloads ``op_.overload`` and out-variants ``op.overload_out``; the functional overload
computes the same value.  The few that differ are listed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["Schema", "by_name", "functional_variant", "like_to_fill", "schema_of"]

_A: Any = torch.ops.aten

# Operators whose result depends only on the layout of their tensor argument: the in-place fill that draws alike.
_LIKE = {
    "aten::rand_like": ("uniform_", "default", (0.0, 1.0)),
    "aten::randn_like": ("normal_", "default", (0.0, 1.0)),
}


@dataclass(frozen=True, slots=True)
class Schema:
    """What the recorder needs to know of an operator."""

    name: str
    random: bool
    view: bool
    inplace: bool  # writes its first argument and returns it
    inplace_view: bool  # changes only metadata of its first argument
    out: tuple[str, ...]  # names of ``out=`` arguments
    foreach: bool
    prim: bool
    hidden: bool  # writes arguments other than the first


@cache
def schema_of(op: OpOverload) -> Schema:
    """Classify an operator by its schema (aliases and tags)."""
    s = op._schema
    writes = [a for a in s.arguments if a.alias_info is not None and a.alias_info.is_write]
    out = tuple(a.name for a in writes if a.kwarg_only)
    positional = [a for a in writes if not a.kwarg_only]
    inplace = bool(positional) and positional[0].name == s.arguments[0].name
    view = not writes and any(r.alias_info is not None for r in s.returns)
    return Schema(
        s.name,
        torch.Tag.nondeterministic_seeded in op.tags,
        view or op in (_A._unsafe_view.default, _A.lift_fresh.default),
        inplace and len(positional) == 1,
        torch.Tag.inplace_view in op.tags,
        out,
        s.name.startswith("aten::_foreach_"),
        op.namespace == "prim",
        len(positional) > 1 or (bool(positional) and not inplace),
    )


@cache
def functional_variant(op: OpOverload) -> OpOverload | None:
    """The overload that returns what ``op`` writes; None when PyTorch has none."""
    ns, name = op._schema.name.split("::")
    packet = getattr(getattr(torch.ops, ns), name.removesuffix("_"), None)
    if packet is None:
        return None
    overload = op._overloadname
    first = [overload, overload.removesuffix("_out"), "default"]
    for name_ in [*first, *packet.overloads()]:
        found = getattr(packet, name_, None)
        if isinstance(found, OpOverload) and _same_arguments(op, found):
            return found
    return None


def _same_arguments(op: OpOverload, pure: OpOverload) -> bool:
    """Whether ``pure`` takes what ``op`` takes (without ``out=``) and writes nothing."""
    a = [str(x.type) for x in op._schema.arguments if not (x.kwarg_only and x.alias_info is not None)]
    b = [str(x.type) for x in pure._schema.arguments]
    return a == b and not any(x.alias_info is not None and x.alias_info.is_write for x in pure._schema.arguments)


def like_to_fill(op: OpOverload, args: tuple[Any, ...]) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """In-place fill equivalent to a ``*_like`` random operator, with its arguments; None when it is not one."""
    name = op._schema.name
    if name in _LIKE:
        packet, overload, fill_args = _LIKE[name]
        return getattr(getattr(_A, packet), overload), fill_args
    if name == "aten::randint_like" and op._overloadname in ("default", "low_dtype"):
        low, high = (0, args[1]) if op._overloadname == "default" else args[1:3]
        return getattr(_A.random_, "from"), (low, high)
    return None


def by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by the names of the operator's schema."""
    return {**dict(zip([a.name for a in func._schema.arguments], args, strict=False)), **kwargs}
