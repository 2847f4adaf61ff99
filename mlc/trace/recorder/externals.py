"""What a recording refers to of the user's: tensors from outside, and optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlc.ir.core import Var
from mlc.ir.types import Loc
from mlc.record.handles import Handle

__all__ = ["External", "Step"]


@dataclass
class External:
    """A tensor from outside: the object itself, where it was found, and its first value."""

    tensor: Tensor
    path: tuple[Any, ...] | None
    var: Var
    handle: Handle
    fake: Any
    written: bool = False
    read: Loc | None = None
    held: Any = None
    kept: Any = None  # a copy of what it held, where code that is not seen may write to its memory
    parts: tuple[External, ...] = ()


@dataclass
class Step:
    """One optimizer step seen while tracing."""

    optimizer: torch.optim.Optimizer
    first: int
    last: int
    loc: Loc | None
