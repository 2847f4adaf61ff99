"""The Neumann series: ``A^-1 b = s * sum over k of (I - s A)^k b`` (Lorraine, Vicol and Duvenaud 2020).

One product per term and memory of three vectors, no inner products: the solver that stays cheap and stable where its
condition holds, namely that every eigenvalue of ``s (A + damping I)`` lies in the unit disc around 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlc.linear.solve import MatVec, Operator, Solve, default_tol, norm, settled, start

__all__ = ["largest", "neumann"]

_POWER_STEPS = 12


def neumann(matvec: MatVec, b: Tensor, *, steps: int = 100, tol: float | None = None, damping: float = 0.0,
            x0: Tensor | None = None, scale: float | None = None) -> Solve:  # fmt: skip
    """Solve ``(A + damping I) x = b`` by its Neumann series, given ``matvec(x) = A x``.

    After k terms the error is ``(I - s A)^k`` times the first one.  Stops at ``tol``, and where the residual has grown
    to ten times the first (the series diverges); hands back the x of the smallest residual.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        steps: Terms at most.
        tol: Relative residual to stop at; None for 1e-10 in float64, 1e-5 in float32.
        damping: Added to A's diagonal.
        x0: Where to start, (n,); zero gives the series.
        scale: s: 1 for ``A = I - J`` of a contraction, the learning rate for a Hessian.  None for 1 over the largest
            eigenvalue, estimated by twelve more products.

    Raises:
        SolverError: NaN or infinity in a product.
    """
    op, tol = Operator(matvec, damping, "neumann"), default_tol(b.dtype) if tol is None else tol
    x, r, size_b = start(op, b, x0)
    if size_b == 0.0:
        return settled(op, x, b, size_b, tol, 0, "neumann")
    s = 1.0 / (largest(op, b) or 1.0) if scale is None else scale
    first = size = norm(r)
    best, best_size, done = x, size, 0
    while done < steps and best_size > tol * size_b and size <= 10.0 * first:
        x = x + s * r
        ar = op(r)
        op.see(float(r @ ar) / size**2)
        r = r - s * ar
        size = op.check(norm(r), done)
        done += 1
        if size < best_size:
            best, best_size = x, size
        elif size == 0.0:
            break
    return settled(op, best, b, size_b, tol, done, "neumann", residual=best_size / size_b)


def largest(op: MatVec, like: Tensor, steps: int = _POWER_STEPS) -> float:
    """The largest absolute eigenvalue of a symmetric operator by power iteration from a fixed random start.

    From below: after k products within a factor of about ``n ** (1 / (2 k))``.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    v, value = v / norm(v), 0.0
    for _ in range(steps):
        w = op(v)
        value = norm(w)
        if value == 0.0:
            break
        v = w / value
    return value
