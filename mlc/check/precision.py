"""What tensors become in the world of a check: double precision, or what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["convert", "target"]


def target(dtype: torch.dtype, to: torch.dtype) -> torch.dtype:
    """What a tensor of ``dtype`` becomes."""
    if dtype.is_complex:
        return torch.complex128 if to is torch.float64 else dtype
    return to if dtype.is_floating_point and dtype.itemsize > 1 and to is torch.float64 else dtype


def convert(item: object, to: torch.dtype) -> Any:
    """An item of an iterable with its floating tensors in ``to``; the item itself is not changed."""
    if isinstance(item, Tensor):
        return item if item.requires_grad else item.to(target(item.dtype, to))
    if isinstance(item, tuple):
        parts = [convert(x, to) for x in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    if isinstance(item, list):
        return [convert(x, to) for x in item]
    if type(item) is dict:
        return {k: convert(v, to) for k, v in item.items()}
    if isinstance(item, np.ndarray) and item.dtype == np.float32 and to is torch.float64:
        return item.astype(np.float64)
    return item
