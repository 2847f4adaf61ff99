"""Types of IR values and places in the user's source.

A value is a tensor (:class:`TensorType`) or a sequence of values, one per trip of a loop (:class:`SeqType`).
Shapes are concrete; element layout (strides) is part of the type because derivative rules are recorded
for one layout.
"""

from __future__ import annotations

import linecache
import math
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

__all__ = ["Loc", "SeqType", "TensorType", "Type", "nbytes", "resident", "with_overhead"]


@dataclass(frozen=True, slots=True)
class Loc:
    """A place in the user's code: absolute file name, 1-based line, function name.

    ``caller`` is the line of the compiled function that led there, when that is another one; ``module`` the
    name of the ``nn.Module`` that was running, for readers.
    """

    file: str
    line: int
    function: str = ""
    caller: Loc | None = field(default=None, compare=False, repr=False)
    module: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}"
        return f"{where} in {self.function}" if self.function else where

    def source(self) -> str:
        """The text of the line, stripped; empty when the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype, shape (elements), stride (elements) and device of a tensor value."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(t: torch.Tensor) -> TensorType:
        """Type of a strided tensor (real or fake)."""
        return TensorType(t.dtype, tuple(t.shape), tuple(t.stride()), t.device)

    @property
    def is_float(self) -> bool:
        """Whether values of this type can carry a derivative (floating point or complex)."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SeqType:
    """A sequence with one value of type ``elem`` per trip; ``length`` is None when known only at run time.

    ``usual`` is then the length that was seen when the program was traced: plans are made for it.
    """

    elem: Type
    length: int | None
    usual: int | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Number of elements to plan for, at least 1."""
        return self.length or self.usual or 1

    @property
    def is_float(self) -> bool:
        """Whether its elements can carry a derivative."""
        return self.elem.is_float


Type: TypeAlias = TensorType | SeqType


def nbytes(t: Type) -> int:
    """Bytes of storage that a value of type ``t`` needs when materialised (holes of strided layouts excluded)."""
    if isinstance(t, SeqType):
        return nbytes(t.elem) * t.count
    span = 1
    for size, stride in zip(t.shape, t.stride, strict=True):
        if size == 0:
            return 0
        if stride != 0:
            span *= size
    return span * t.dtype.itemsize


_OBJECT = 576  # bytes that a tensor takes on a CPU beside its elements (torch 2.13: objects, alignment; measured)
_BLOCK = 512  # bytes of which the CUDA allocator hands out multiples


def with_overhead(size: int, device: torch.device) -> int:
    """Bytes of memory that a storage of ``size`` bytes takes, with what the allocator and the tensor need beside it."""
    return -(-size // _BLOCK) * _BLOCK if device.type == "cuda" else size + _OBJECT


def resident(t: Type) -> int:
    """Bytes of memory that a value of type ``t`` takes when it is alive (:func:`with_overhead`, element by element)."""
    return resident(t.elem) * t.count if isinstance(t, SeqType) else with_overhead(nbytes(t), t.device)
