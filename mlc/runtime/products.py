"""How a device multiplies float32 matrices while the stages of a program run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["products_in"]


@contextmanager
def products_in(matmul: str) -> Iterator[None]:
    """Products and convolutions on CUDA in TensorFloat-32 (10 bits of mantissa) for ``"tf32"``; "": as they are set."""
    if matmul != "tf32":
        yield
        return
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [p.allow_tf32 for p in places]
    try:
        for p in places:
            p.allow_tf32 = True
        yield
    finally:
        for p, was in zip(places, before, strict=True):
            p.allow_tf32 = was
