"""Recording a plain function of tensors as a region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlc.ir.core import Region
from mlc.ir.types import TensorType
from mlc.record import views
from mlc.record.recorder import Recorder

__all__ = ["trace_region", "write_region"]


def trace_region(
    fn: Callable[..., Sequence[Tensor | None]], types: Sequence[TensorType], *, grad: Sequence[bool] | None = None,
    mode: FakeTensorMode | None = None,
) -> tuple[Region, tuple[bool, ...]]:  # fmt: skip
    """Record ``fn`` on fake tensors of the given types.

    Returns the region and, for each result of ``fn``, whether it was a tensor (None results have no output).
    ``grad[i]`` makes argument i require grad.
    """
    rec = Recorder(merge=True, fake_mode=mode)
    args = []
    for i, t in enumerate(types):
        f = rec.fresh(rec.builder.input(t))
        if grad is not None and grad[i]:
            f.requires_grad_(True)
        rec.handle(f).leaf = True
        args.append(f)
    with rec:
        outs = fn(*args)
        present = tuple(o is not None for o in outs)
        vars_ = [rec.value(rec.handle(o)) for o in outs if o is not None]
    return rec.builder.region(vars_), present


_WRITE_REGIONS: dict[Any, Region | None] = {}


def write_region(op: Any, args: Any, index: int, base: Any, new: Any) -> Region | None:
    """``(base, new view) -> new base`` as a region, recorded once per signature."""
    key = (op, repr(args), index, base, new)
    if key not in _WRITE_REGIONS:
        found = True

        def run(b: Tensor, n: Tensor) -> list[Tensor | None]:
            nonlocal found
            out = views.write_through(op, args, b, n, index)
            found = out is not None
            return [b.clone() if out is None else out]

        region, _ = trace_region(run, (base, new))
        _WRITE_REGIONS[key] = region if found else None
    return _WRITE_REGIONS[key]
