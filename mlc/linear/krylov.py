"""Krylov solvers for operators that are not symmetric, given their products alone.

:func:`gmres` (Saad and Schultz 1986) has the smallest residual of all at the price of keeping a basis of ``restart``
vectors; :func:`bicgstab` (van der Vorst 1992) keeps eight vectors at two products per iteration, with a residual that
may jump.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlc.linear.solve import MatVec, Operator, Solve, default_tol, norm, settled, start

__all__ = ["bicgstab", "gmres"]


def gmres(matvec: MatVec, b: Tensor, *, steps: int = 100, tol: float | None = None, damping: float = 0.0,
          x0: Tensor | None = None, restart: int = 50) -> Solve:  # fmt: skip
    """Solve ``(A + damping I) x = b`` for any square A, given ``matvec(x) = A x``.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        steps: Iterations (products) at most.
        tol: Relative residual to stop at; None for 1e-10 in float64, 1e-5 in float32.
        damping: Added to A's diagonal.
        x0: Where to start, (n,).
        restart: Vectors of the basis at most; then it starts anew from where it is.

    Raises:
        SolverError: NaN or infinity in a product.
    """
    op, tol = Operator(matvec, damping, "gmres"), default_tol(b.dtype) if tol is None else tol
    x, r, scale = start(op, b, x0)
    done, size, last = 0, norm(r), math.inf
    while done < steps and size > tol * scale and size < 0.99 * last:
        x, used = _cycle(op, x, r, size, tol * scale, min(restart, steps - done))
        done += used
        last, r = size, b - op(x)
        size = op.check(norm(r), done)
        if used == 0:
            break
    return settled(op, x, b, scale, tol, done, "gmres", residual=size / scale if scale else 0.0)


def _cycle(op: Operator, x: Tensor, r: Tensor, size: float, enough: float, most: int) -> tuple[Tensor, int]:
    """One cycle from x with residual r: the Arnoldi process, and the least-squares problem by Givens rotations."""
    basis = [r / size]
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    g = [size]
    for k in range(most):
        w = op(basis[k])
        before = op.check(norm(w), k)
        v = torch.stack(basis)
        h = v @ w
        w = w - h @ v
        again = v @ w  # the second pass keeps the basis orthogonal to rounding
        w = w - again @ v
        column = [float(c) for c in h + again]
        op.see(column[k])
        below = norm(w)
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        broke = below <= 10 * torch.finfo(w.dtype).eps * before
        length = math.hypot(column[k], 0.0 if broke else below)
        if length == 0.0:
            break  # the space is invariant and A singular on it
        c, s = column[k] / length, (0.0 if broke else below) / length
        rotations.append((c, s))
        column[k] = length
        columns.append(column)
        g[k:] = [c * g[k], -s * g[k]]
        if broke or abs(g[-1]) <= enough:
            break
        basis.append(w / below)
    m = len(columns)
    if m == 0:
        return x, 0
    y = [0.0] * m
    for i in reversed(range(m)):
        y[i] = (g[i] - sum(columns[j][i] * y[j] for j in range(i + 1, m))) / columns[i][i]
    return x + torch.tensor(y, dtype=x.dtype, device=x.device) @ torch.stack(basis[:m]), m


def bicgstab(matvec: MatVec, b: Tensor, *, steps: int = 100, tol: float | None = None, damping: float = 0.0,
             x0: Tensor | None = None) -> Solve:  # fmt: skip
    """Solve ``(A + damping I) x = b`` for any square A, given ``matvec(x) = A x``.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        steps: Iterations at most, two products each.
        tol: Relative residual to stop at; None for 1e-10 in float64, 1e-5 in float32.
        damping: Added to A's diagonal.
        x0: Where to start, (n,).

    Raises:
        SolverError: NaN or infinity in a product.
    """
    op, tol = Operator(matvec, damping, "bicgstab"), default_tol(b.dtype) if tol is None else tol
    x, r, scale = start(op, b, x0)
    shadow, p, rho, done = r, r, float(r @ r), 0
    best, best_size = x, norm(r)
    while done < steps and best_size > tol * scale:
        v = op(p)
        along = op.check(float(shadow @ v), done)
        if along == 0.0 or rho == 0.0:
            break
        alpha = rho / along
        s = r - alpha * v
        t = op(s)
        ts, tt, ss = (float(q) for q in torch.stack([t @ s, t @ t, s @ s]))
        op.check(ts, done)
        done += 1
        if ss > 0.0:
            op.see(ts / ss)
        omega = ts / tt if tt > 0.0 else 0.0
        x = x + alpha * p + omega * s
        r = s - omega * t
        size = op.check(norm(r), done)
        if size < best_size:
            best, best_size = x, size
        before, rho = rho, float(shadow @ r)
        if omega == 0.0 or before == 0.0:
            break
        p = r + (rho / before) * (alpha / omega) * (p - omega * v)
    return settled(op, best, b, scale, tol, done, "bicgstab")
