"""Small tensor functions as regions: PyTorch code recorded over fake tensors of given types."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mlc.ir.core import Region
from mlc.ir.types import Type
from mlc.passes.rules.recorded import fake_mode
from mlc.record.recorder import Recorder

__all__ = ["recorded"]


def recorded(f: Callable[[list[Tensor]], Sequence[Tensor]], types: Sequence[Type]) -> Region:
    """What ``f`` does to tensors of these types, as a region."""
    rec = Recorder(merge=True, fake_mode=fake_mode())
    given: list[Tensor] = [rec.fresh(rec.builder.input(t)) for t in types]
    for t in given:
        rec.handle(t).leaf = True
    with rec:
        found = f(list(given))
    return rec.builder.region([rec.value(rec.handle(t)) for t in found])
