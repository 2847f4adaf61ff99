"""``.grad`` as PyTorch has it, past everything that is replaced while a loop is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["get_grad", "put_grad"]

_GRAD: Any = torch._C.TensorBase.grad


def get_grad(t: Tensor) -> Tensor | None:
    """``t.grad`` (under a torch function mode even the base class's property leads to the replaced one)."""
    with torch._C.DisableTorchFunction():
        return _GRAD.__get__(t)  # type: ignore[no-any-return]


def put_grad(t: Tensor, g: Tensor | None) -> None:
    """``t.grad = g``."""
    with torch._C.DisableTorchFunction():
        _GRAD.__set__(t, g)
