"""Which of PyTorch's derivative formulas may be used.

"A formula exists" is not legality: a sweep over PyTorch's operator database against float64 differences
(``tests/opinfo``, results in ``docs/legality.md``) finds operators whose forward formula raises or is silently wrong.
The entries here say which, and the rules of :mod:`mlc.passes.rules` then go another exact way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECOMPOSITIONS", "REVERSE_NEEDS_DECOMPOSITION", "forward_formula_trusted"]

_A: Any = torch.ops.aten

# Forward formula silently wrong (torch 2.11 - 2.13): transpose the reverse rule instead.
_FORWARD_WRONG = {
    _A.cholesky_inverse.default,
    _A.logcumsumexp.default,
    _A.triangular_solve.default,
}

# Reverse formula of a fused operator has no (or a wrong) second derivative: differentiate its decomposition.
REVERSE_NEEDS_DECOMPOSITION: set[Any] = set()


def forward_formula_trusted(op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    """Whether PyTorch's forward-mode formula of ``op`` with these arguments is right."""
    if op in _FORWARD_WRONG:
        return False
    return not (op is _A.scatter_reduce.two and "prod" in args)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(v.dim()) if d != dim]
    norm = v.norm(2, dims, keepdim=True) if dims else v.abs()
    return v * (g / norm), norm


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _A._weight_norm_interface.default: _weight_norm,
}
