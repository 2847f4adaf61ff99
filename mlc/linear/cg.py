"""Conjugate gradients (Hestenes and Stiefel 1952): for symmetric positive definite operators.

One product per iteration, memory of four vectors, error falling by ``(sqrt(k) - 1) / (sqrt(k) + 1)`` per iteration
for condition number k.  :func:`normal_cg` runs it on the normal equations (CGLS, Paige and Saunders 1982): for any
operator whose transpose can be applied, at two products per iteration and the square of the condition number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlc.linear.solve import MatVec, Operator, Solve, default_tol, norm, settled, start

__all__ = ["cg", "normal_cg"]


def cg(matvec: MatVec, b: Tensor, *, steps: int = 100, tol: float | None = None, damping: float = 0.0,
       x0: Tensor | None = None) -> Solve:  # fmt: skip
    """Solve ``(A + damping I) x = b`` for symmetric A, given ``matvec(x) = A x``.

    Stops where the residual is at most ``tol * |b|``; the residual that it updates is checked against the true one
    (one product more), and the iteration starts anew from there where rounding has separated them.  Stopped before, it
    hands back its last x: every step comes nearer to the solution, though the residual may grow on the way.  Along a
    direction of negative or vanishing curvature it goes on (the system may have a solution all the same), but then
    hands back the x of the smallest residual; ``Solve.curvature`` tells.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        steps: Iterations at most.
        tol: Relative residual to stop at; None for 1e-10 in float64, 1e-5 in float32.
        damping: Added to A's diagonal.
        x0: Where to start (one product more), (n,).

    Raises:
        SolverError: NaN or infinity in a product.
    """
    op, tol = Operator(matvec, damping, "cg"), default_tol(b.dtype) if tol is None else tol
    x, r, scale = start(op, b, x0)
    rr = float(r @ r)
    best, best_rr, best_is_true = x, rr, True
    p, done, last_true, steepest = r, 0, math.inf, 0.0
    bound = (tol * scale) ** 2
    while done < steps and rr > 0.0 and scale > 0.0:
        if rr <= bound:  # as far as the recurrence knows
            r = b - op(x)
            p, true = r, op.check(float(r @ r), done)
            best, best_rr, best_is_true = x, true, True
            if true <= bound or true > 0.25 * last_true:
                break
            rr = last_true = true
            continue
        ap = op(p)
        pap, pp = (float(v) for v in torch.stack([p @ ap, p @ p]))
        op.check(pap, done)
        done += 1
        op.see(pap / pp)
        steepest = max(steepest, abs(pap / pp))
        if abs(pap / pp) <= 4.0 * torch.finfo(b.dtype).eps * steepest:
            break  # p is in the kernel: no step along it
        x = x + (rr / pap) * p
        r = r - (rr / pap) * ap
        before, rr = rr, float(r @ r)
        if not math.isfinite(rr):
            break
        p = r + (rr / before) * p
        if rr < best_rr:
            best, best_rr, best_is_true = x, rr, False
    definite = op.curvature is not None and op.curvature + damping > torch.finfo(b.dtype).eps ** 0.5 * steepest
    if definite and best is not x and math.isfinite(rr):
        best, best_is_true = x, False
    true_residual = best_rr**0.5 / scale if best_is_true and scale else None
    return settled(op, best, b, scale, tol, done, "cg", residual=true_residual)


def normal_cg(matvec: MatVec, b: Tensor, *, transposed: MatVec, steps: int = 100, tol: float | None = None,
              damping: float = 0.0, x0: Tensor | None = None) -> Solve:  # fmt: skip
    """Solve ``(A + damping I) x = b`` for any square A by conjugate gradients on ``A'A x = A'b`` (CGLS).

    Where A is singular it goes to the least-squares solution nearest to ``x0``.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        transposed: The product with A's transpose; (n,) -> (n,).
        steps: Iterations at most, two products each.
        tol: Relative residual to stop at; None for 1e-10 in float64, 1e-5 in float32.
        damping: Added to A's diagonal.
        x0: Where to start, (n,).

    Raises:
        SolverError: NaN or infinity in a product.
    """
    op, back = Operator(matvec, damping, "normal_cg"), Operator(transposed, damping, "normal_cg")
    tol = default_tol(b.dtype) if tol is None else tol
    x, r, scale = start(op, b, x0)
    done = 0
    s = back(r) if scale else r
    p, ss = s, op.check(float(s @ s), 0)
    first = ss
    tiny = torch.finfo(b.dtype).eps ** 4
    while done < steps and scale > 0.0 and norm(r) > tol * scale and ss > tiny * first:
        q = op(p)
        qq, pq, pp = (float(v) for v in torch.stack([q @ q, p @ q, p @ p]))
        op.check(qq, done)
        op.see(pq / pp)
        done += 1
        if qq == 0.0:
            break
        x = x + (ss / qq) * p
        r = r - (ss / qq) * q
        s = back(r)
        before, ss = ss, op.check(float(s @ s), done)
        p = s + (ss / before) * p
    op.products += back.products
    return settled(op, x, b, scale, tol, done, "normal_cg")
