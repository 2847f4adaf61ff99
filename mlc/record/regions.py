"""Regions recorded from functions: under which recorder is for the caller to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mlc.ir.core import Region
from mlc.ir.types import TensorType
from mlc.record import views
from mlc.record.values import Values

__all__ = ["record_region", "write_region"]


def record_region(
    rec: Values,
    fn: Callable[..., Sequence[Tensor | None]],
    types: Sequence[TensorType],
    grad: Sequence[bool] | None = None,
) -> tuple[Region, tuple[bool, ...]]:
    """What ``fn`` does to tensors of the given types, and which of its results are tensors.

    Args:
        rec: A fresh recorder.
        fn: The function; a result that is None has no output.
        types: Of its arguments.
        grad: Which arguments require grad (None: none).
    """
    args = []
    for i, t in enumerate(types):
        f = rec.fresh(rec.builder.input(t))
        if grad is not None and grad[i]:
            f.requires_grad_(True)
        rec.handle(f).leaf = True
        args.append(f)
    with rec.active():
        outs = fn(*args)
        present = tuple(o is not None for o in outs)
        vars_ = [rec.value(rec.handle(o)) for o in outs if o is not None]
    return rec.builder.region(vars_), present


_WRITE_REGIONS: dict[Any, Region | None] = {}


def write_region(fresh: Callable[[], Values], op: object, args: Any, index: int, base: Any, new: Any) -> Region | None:
    """``(base, new view) -> new base`` as a region, recorded once per signature (under ``fresh()``)."""
    key = (op, repr(args), index, base, new)
    if key not in _WRITE_REGIONS:
        found = True

        def run(b: Tensor, n: Tensor) -> list[Tensor | None]:
            nonlocal found
            out = views.write_through(op, args, b, n, index)
            found = out is not None
            return [b.clone() if out is None else out]

        region, _ = record_region(fresh(), run, (base, new))
        _WRITE_REGIONS[key] = region if found else None
    return _WRITE_REGIONS[key]
