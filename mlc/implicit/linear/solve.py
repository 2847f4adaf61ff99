"""What a linear solver hands back, and the arithmetic that the solvers share.

Everything works on one flat tensor (float32 or float64, any device).  :class:`Packing` makes one of a tuple of tensors
and back, so that an operator on a structure of tensors can be given to a solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlc.errors import SolverError

__all__ = ["MatVec", "Packing", "Solve", "default_tol"]

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solve:
    """The solution of ``(A + damping I) x = b`` as far as a solver got.

    Attributes:
        x: The solution, of the shape, dtype and device of ``b``.
        iterations: Iterations done.
        residual: ``|b - (A + damping I) x| / |b|`` (0 where b is 0), in the Euclidean norm.
        curvature: The smallest Rayleigh quotient ``p'Ap / p'p`` that was seen, without the damping; None where
            none was.  Negative: A is not positive definite, so x is no minimiser's response.
        converged: Whether ``residual`` is at most the tolerance asked for.
        products: How often A (or its transpose) was applied.
        solver: The solver's name.
    """

    x: Tensor
    iterations: int
    residual: float
    curvature: float | None
    converged: bool
    products: int
    solver: str


@dataclass(frozen=True)
class Packing:
    """A tuple of tensors as one flat tensor of their widest dtype (at least float32), and back."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Packing:
        """The packing of tensors like these."""
        return Packing(
            tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors), tuple(t.device for t in tensors)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat tensor."""
        wide = torch.float32
        for d in self.dtypes:
            wide = torch.promote_types(wide, d)
        return wide

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """``tensors`` as one flat tensor on the first one's device."""
        if len(tensors) == 1:
            return tensors[0].reshape(-1).to(self.dtype)
        return torch.cat([t.reshape(-1).to(self.devices[0], self.dtype) for t in tensors])

    def parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        """A flat tensor as the tuple of tensors."""
        pieces = flat.split([s.numel() for s in self.shapes])
        return tuple(
            p.to(device, dtype).reshape(shape)
            for p, shape, dtype, device in zip(pieces, self.shapes, self.dtypes, self.devices, strict=True)
        )


def default_tol(dtype: torch.dtype) -> float:
    """The tolerance where none is asked for: 1e-10 in float64, 1e-5 in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-5


class Operator:
    """``x -> (A + damping I) x``, counting products and watching for NaN and for the smallest curvature."""

    def __init__(self, matvec: MatVec, damping: float, solver: str) -> None:
        self._matvec, self.damping, self._solver = matvec, damping, solver
        self.products = 0
        self.curvature: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """One product."""
        self.products += 1
        y = self._matvec(x)
        return y.add(x, alpha=self.damping) if self.damping else y

    def see(self, quotient: float) -> None:
        """A Rayleigh quotient of the damped operator was seen."""
        plain = quotient - self.damping
        self.curvature = plain if self.curvature is None else min(self.curvature, plain)

    def check(self, value: float, iteration: int) -> float:
        """``value`` if it is finite."""
        if not math.isfinite(value):
            raise SolverError(
                f"{self._solver}: NaN or infinity in a product, in iteration {iteration}",
                advice="look at the operator's inputs: a parameter, a batch or a loss is not finite, or far too large",
            )
        return value


def norm(x: Tensor) -> float:
    """Euclidean norm as a Python number."""
    return float(torch.linalg.vector_norm(x))


def start(op: Operator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """The first x, its residual and the norm of ``b``; checks the arguments."""
    if b.dim() != 1 or b.dtype not in (torch.float32, torch.float64):
        raise SolverError(
            f"a linear system's right-hand side must be flat, of float32 or float64; got {b.dtype}, {tuple(b.shape)}",
            advice="use Packing.flat",
        )
    scale = op.check(norm(b), 0)
    if x0 is None or scale == 0.0:
        return torch.zeros_like(b), b.clone(), scale
    return x0.clone(), b - op(x0), scale


def settled(op: Operator, x: Tensor, b: Tensor, scale: float, tol: float, iterations: int, solver: str, *,
            residual: float | None = None) -> Solve:  # fmt: skip
    """The answer; the residual is computed from x by one more product where it isn't given."""
    if scale == 0.0:
        return Solve(torch.zeros_like(b), 0, 0.0, op.curvature, True, op.products, solver)
    if residual is None:
        residual = op.check(norm(b - op(x)), iterations) / scale
    return Solve(x, iterations, residual, op.curvature, residual <= tol, op.products, solver)
