"""The linear solvers by name: all of them matrix-free, on flat tensors, wherever the tensors are.

Each takes ``matvec`` and the right-hand side and hands back a :class:`Solve`.  They are our own because SciPy's work
on NumPy arrays: every product would cross to the host and back, and float32 on a device would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from mlc.linear.cg import cg, normal_cg
from mlc.linear.dense import direct
from mlc.linear.krylov import bicgstab, gmres
from mlc.linear.neumann import neumann
from mlc.linear.nystrom import nystrom
from mlc.linear.solve import MatVec, Packing, Solve, default_tol

__all__ = [
    "SOLVERS",
    "SYMMETRIC",
    "MatVec",
    "Packing",
    "Solve",
    "bicgstab",
    "cg",
    "default_tol",
    "direct",
    "gmres",
    "neumann",
    "normal_cg",
    "nystrom",
]

SOLVERS: MappingProxyType[str, Callable[..., Solve]] = MappingProxyType(
    {
        "cg": cg,
        "normal_cg": normal_cg,
        "gmres": gmres,
        "bicgstab": bicgstab,
        "neumann": neumann,
        "nystrom": nystrom,
        "direct": direct,
    }
)

SYMMETRIC = frozenset({"cg", "nystrom"})
"""Solvers that assume a symmetric operator."""
