"""The direct solver: the operator's matrix, column by column, then LU.  For small systems: n products, n^2 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from mlc.linear.solve import MatVec, Operator, Solve, default_tol, settled, start

__all__ = ["direct", "matrix"]


def matrix(matvec: MatVec, like: Tensor) -> Tensor:
    """The matrix of an operator on vectors like ``like``: (n, n), one product per column."""
    eye = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    return torch.stack([matvec(e) for e in eye], dim=1)


def direct(matvec: MatVec, b: Tensor, *, damping: float = 0.0, tol: float | None = None) -> Solve:
    """Solve ``(A + damping I) x = b`` for any square A by its matrix.

    Where A is singular the answer is the smallest x of the smallest residual, and ``converged`` says whether it is a
    solution.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        damping: Added to A's diagonal.
        tol: Residual below which ``converged`` is said; None for 1e-10 in float64, 1e-5 in float32.

    Raises:
        SolverError: NaN or infinity in a product.
    """
    op, tol = Operator(matvec, damping, "direct"), default_tol(b.dtype) if tol is None else tol
    x, _, scale = start(op, b, None)
    if scale == 0.0:
        return settled(op, x, b, scale, tol, 0, "direct")
    a = matrix(op, b)
    op.check(float(a.sum()), b.numel())
    singular_values = torch.linalg.svdvals(a)
    floor = torch.finfo(b.dtype).eps * b.numel()
    if float(singular_values[-1]) > floor * float(singular_values[0]):
        x = torch.linalg.solve(a, b)
    else:
        x = torch.linalg.pinv(a, rtol=floor) @ b
    symmetric = (a + a.mT) / 2
    op.see(float(torch.linalg.eigvalsh(symmetric)[0]))
    residual = op.check(float(torch.linalg.vector_norm(b - a @ x)), b.numel()) / scale
    return settled(op, x, b, scale, tol, b.numel(), "direct", residual=residual)
