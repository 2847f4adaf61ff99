"""How far x is from the root, from what the gradient needs anyway.

With ``(dF/dx)^T u = v`` at hand, ``|u| / |v|`` tells how much the inverse Jacobian stretches, so ``|F| |u| / |v|`` is
about the distance of x from the true root (one Newton step).  It is compared with the size of x, and with the
first-order effect of the inputs on it where x is small.  The measure has no units: scaling F, the loss or x
changes nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import DifferentiationError, RootWarning

__all__ = ["check_distance", "size"]


def size(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of several tensors together."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.detach().double())) ** 2 for t in tensors))


def check_distance(spec: Any, x: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], values: Sequence[Tensor],
                   ) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:  # fmt: skip
    """Measure; what comes back wants the cotangents and the inputs, and warns.

    Raises:
        DifferentiationError: for NaN or infinity in F.
    """
    f, stretched, given = size(values), size(u), size(v)
    if not math.isfinite(f):
        raise DifferentiationError(
            f"{spec.condition.what} is not finite at the solution", advice="look at what the solver returned"
        )
    distance = f * stretched / given if given > 0 else 0.0

    def judge(found: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        moved = sum(
            abs(float((g.double() * t.detach().double()).sum()))
            for g, t in zip(found, inputs, strict=True)
            if t.dtype.is_floating_point
        )
        scale = max(size(x), moved / given if given > 0 else 0.0)
        if distance <= spec.settings.accuracy * scale or distance == 0.0:
            return
        relative = f"{distance / scale:.2g} of its size" if scale > 0 else f"{distance:.2g}"
        warnings.warn(
            RootWarning(
                f"{spec.condition.what} is not zero at the solution (norm {f:.3g}): x is about {relative} away from "
                "a root, and the implicit gradient is wrong by about as much. Let the solver go on to a smaller "
                "tolerance, and check that the condition is the one that it solves"
            ),
            stacklevel=2,
        )

    return judge
