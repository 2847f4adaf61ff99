"""Which of PyTorch's derivative formulas may be used.

"A formula exists" is not legality: a sweep over PyTorch's operator database against float64 differences
(``tests/opinfo``, results in ``docs/legality.md``) finds operators whose forward formula raises or is silently wrong.
The entries here say which, and the rules of :mod:`mlc.passes.rules.recorded` then go another exact way.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "ACCOUNTED",
    "DECOMPOSITION_WRONG",
    "PYTORCH_WRONG",
    "SECOND_ORDER_FORMULA",
    "STATISTICS",
    "forward_formula_trusted",
]

_A: Any = torch.ops.aten

# Forward formula silently wrong (torch 2.11 - 2.13): transpose the reverse rule instead.
_FORWARD_WRONG = {
    _A.cholesky_inverse.default,
    _A.logcumsumexp.default,
    _A.triangular_solve.default,
    _A._linalg_det.default,  # not a number where the matrix is singular
    # equal indices: the forward formula keeps the last write, the reverse formula gives to every write
    _A.max_unpool2d.default,
    _A.max_unpool3d.default,
}

# PyTorch has two reverse formulas and takes this one under create_graph: the other reads factors (LU, pivots)
# that are not differentiable results, so that its own derivative is silently wrong.
SECOND_ORDER_FORMULA = {
    _A._linalg_slogdet.default,
    _A._linalg_solve_ex.default,
    _A.cumprod.default,
}

# Results that autograd takes for constants although they are functions of the input: the formulas of the first and
# second derivative account for them, their own derivatives (the third) do not.  Here they carry a derivative, and
# where a formula reads them in elementary operators the operator spelled out gives it
# (mlc.passes.rules.decompositions).
STATISTICS: dict[Any, tuple[int, ...]] = {
    _A.native_layer_norm.default: (1, 2),
    _A.native_batch_norm.default: (1, 2),
    _A._weight_norm_interface.default: (1,),
}

# The other half of that: arguments whose part in the derivative is already in the formula for another argument.
ACCOUNTED: dict[Any, tuple[str, ...]] = {
    _A.native_layer_norm_backward.default: ("mean", "rstd"),
    _A.native_batch_norm_backward.default: ("save_mean", "save_invstd"),
}

# PyTorch's own decomposition computes something else: labels behind the first -1 count as label 0.
DECOMPOSITION_WRONG: set[Any] = {_A.multilabel_margin_loss_forward.default}


def forward_formula_trusted(op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    """Whether PyTorch's forward-mode formula of ``op`` with these arguments is right."""
    if op in _FORWARD_WRONG:
        return False
    return not (op is _A.scatter_reduce.two and "prod" in args)


# Derivatives that PyTorch itself gets wrong, so that the number that the user's own loop computes is no derivative:
# from which order on, what, and what to write instead.
PYTORCH_WRONG: dict[Any, tuple[int, str, str]] = {
    _A.as_strided_scatter.default: (1, "the derivative of as_strided_scatter", "use index_put or slice_scatter"),
    _A._weight_norm_interface.default: (
        2, "the second derivative of weight_norm",
        "write it out: v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))",
    ),
    _A.native_batch_norm.default: (3, "the third derivative of batch_norm", "write the normalisation out"),
    _A.native_layer_norm.default: (3, "the third derivative of layer_norm", "write the normalisation out"),
}  # fmt: skip
