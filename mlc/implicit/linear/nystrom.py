"""The Nystrom approximation of a symmetric operator from some of its columns (Hataya and Yamada 2023).

``A`` is replaced by ``C W^+ C'`` with C its columns at k random places and W the rows of C there; the inverse of that
plus ``damping I`` is applied in closed form, at k products and memory of k vectors.  Instead of Woodbury's formula,
which loses ``1 / damping^2`` digits, its eigenvectors are used.  With k = n it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlc.errors import SolverError
from mlc.implicit.linear.solve import MatVec, Operator, Solve, default_tol, settled, start

__all__ = ["nystrom"]


def nystrom(matvec: MatVec, b: Tensor, *, rank: int = 20, damping: float = 0.01, tol: float | None = None,
            generator: torch.Generator | None = None) -> Solve:  # fmt: skip
    """Approximate ``(A + damping I)^-1 b`` for symmetric A, given ``matvec(x) = A x``.

    Args:
        matvec: The product with A; (n,) -> (n,).
        b: Right-hand side, (n,), float32 or float64.
        rank: Columns of A that are looked at (products); n at most.
        damping: Added to A's diagonal; above 0 unless rank reaches n.
        tol: Residual below which ``converged`` is said; None for 1e-10 in float64, 1e-5 in float32.
        generator: Of the choice of columns (on the CPU); None for one of a fixed seed.

    Raises:
        SolverError: NaN or infinity in a product, or damping of 0 with fewer columns than A has.
    """
    n, op = b.numel(), Operator(matvec, 0.0, "nystrom")
    tol = default_tol(b.dtype) if tol is None else tol
    k = min(rank, n)
    if damping < 0.0 or k < 1 or (damping == 0.0 and k < n):
        raise SolverError(
            f"nystrom needs damping above 0 (got {damping}) and rank of at least 1 (got {rank})",
            advice="nystrom(..., damping=0.01): what is outside of its columns is divided by it",
        )
    x, _, scale = start(op, b, None)
    if scale == 0.0:
        return settled(op, x, b, scale, tol, 0, "nystrom")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    places = torch.randperm(n, generator=generator)[:k].to(b.device)
    columns = torch.stack([op(_unit(b, int(i))) for i in places], dim=1)
    op.check(float(columns.sum()), k)
    q, values = _eigen(columns, places)
    inside = q.mT @ b
    x = q @ (inside / (values + damping))
    if k < n:
        x = x + (b - q @ inside) / damping
    op.see(float(values.min()))
    op.damping = damping
    return settled(op, x, b, scale, tol, k, "nystrom")


def _unit(like: Tensor, i: int) -> Tensor:
    e = torch.zeros_like(like)
    e[i] = 1.0
    return e


def _eigen(columns: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (n, k) and eigenvalues (k,) of ``C W^+ C'``."""
    w = columns[places]
    q, r = torch.linalg.qr(columns)
    pseudo = torch.linalg.pinv((w + w.mT) / 2, hermitian=True)
    values, vectors = torch.linalg.eigh(r @ pseudo @ r.mT)
    return q @ vectors, values
