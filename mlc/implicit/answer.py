"""What a user's solver returns, as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.errors import CaptureError

__all__ = ["answer", "pieces"]


def answer(result: Any, like: Sequence[Tensor], what: str) -> tuple[list[Tensor], Any]:
    """The tensors of a solution and its structure.

    Args:
        result: A tensor, NumPy array or number, or a tuple, list or dict of these.
        like: The arguments' tensors: NumPy's and Python's numbers get the dtype and device of the first floating one.
        what: What to call the solver in messages.

    Raises:
        CaptureError: for anything else, or for NaN.
    """
    leaves, spec = pytree.tree_flatten(result)
    if not leaves:
        raise CaptureError(
            f"{what} returned nothing", advice="return x: a tensor, an array, or a tuple or dict of them"
        )
    first = next((t for t in like if t.dtype.is_floating_point), None)
    return [_tensor(x, first, what) for x in leaves], spec


def _tensor(x: Any, like: Tensor | None, what: str) -> Tensor:
    if isinstance(x, Tensor):
        t = x.detach().clone()
    elif isinstance(x, (np.ndarray, np.generic, float, int)) and not isinstance(x, bool):
        a = np.asarray(x)
        if a.dtype.kind not in "fiu":
            raise _odd(x, what)
        dtype, device = (like.dtype, like.device) if like is not None else (torch.get_default_dtype(), None)
        t = torch.tensor(a, dtype=dtype, device=device)
    else:
        raise _odd(x, what)
    if not t.dtype.is_floating_point:
        raise _odd(x, what)
    if t.layout is not torch.strided:
        t = t.to_dense()
    if not math.isfinite(float(t.double().sum())) and not bool(t.isfinite().all()):
        raise CaptureError(f"{what} returned NaN or infinity", advice="look at its inputs, and whether it converged")
    return t


def _odd(x: Any, what: str) -> CaptureError:
    kind = f"a tensor of {x.dtype}" if isinstance(x, (Tensor, np.ndarray)) else f"a {type(x).__name__}"
    advice = "return x alone: tensors or arrays of floating-point numbers, in a tuple or dict if there are several"
    if hasattr(x, "x"):
        advice = "return its .x"
    elif hasattr(x, "coef_"):
        advice = "return its coefficients, as the condition reads them: for example torch.tensor(model.coef_)"
    return CaptureError(f"{what} returned {kind}", advice=advice)


def pieces(value: Any, x: Sequence[Tensor], spec: Any, what: str) -> tuple[Tensor, ...]:
    """What a condition returned, as one tensor for each of x.

    Raises:
        CaptureError: when it has another structure, shape or device than x, or is not of tensors.
    """
    leaves, found = pytree.tree_flatten(value)
    if len(leaves) != len(x) or (found != spec and not _alike(found, spec)):
        raise CaptureError(
            f"{what} returned {_shown(value)} where x is {_shown(pytree.tree_unflatten(list(x), spec))}",
            advice="return one equation for each element of x, in the structure of x",
        )
    for f, t in zip(leaves, x, strict=True):
        if not isinstance(f, Tensor) or f.shape != t.shape or f.device != t.device or not f.dtype.is_floating_point:
            raise CaptureError(
                f"{what} returned {_shown(f)} for a part of x that is {_shown(t)}",
                advice="return one equation for each element of x; a loss is no condition, its gradient by x is",
            )
    return tuple(leaves)


def _alike(a: Any, b: Any) -> bool:
    """A list for a tuple is all right."""
    return str(a).replace("list", "tuple") == str(b).replace("list", "tuple")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return f"a {type(value).__name__}"
