"""Recording a plain function of tensors as a region."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlc.ir.core import Region
from mlc.ir.types import TensorType
from mlc.record.recorder import Recorder
from mlc.record.regions import record_region

__all__ = ["trace_region"]


def trace_region(
    fn: Callable[..., Sequence[Tensor | None]],
    types: Sequence[TensorType],
    *,
    grad: Sequence[bool] | None = None,
    mode: FakeTensorMode | None = None,
) -> tuple[Region, tuple[bool, ...]]:
    """Record ``fn`` on fake tensors of the given types.

    Returns the region and, for each result of ``fn``, whether it was a tensor (None results have no output).
    ``grad[i]`` makes argument i require grad.
    """
    return record_region(Recorder(merge=True, fake_mode=mode), fn, types, grad)
