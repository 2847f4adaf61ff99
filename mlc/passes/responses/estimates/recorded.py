"""Small tensor functions as regions: PyTorch code recorded over fake tensors of given types."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mlc.ir.core import Region
from mlc.ir.types import TensorType, Type
from mlc.passes.rules.recorded import fake_mode
from mlc.record.recorder import Recorder
from mlc.record.regions import record_region

__all__ = ["recorded"]


def recorded(f: Callable[[list[Tensor]], Sequence[Tensor]], types: Sequence[Type]) -> Region:
    """What ``f`` does to tensors of these types, as a region."""
    tensors = [t for t in types if isinstance(t, TensorType)]
    assert len(tensors) == len(types)
    return record_region(Recorder(merge=True, fake_mode=fake_mode()), lambda *given: f(list(given)), tensors)[0]
