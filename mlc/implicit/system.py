"""Solving ``A u = v`` with A the Jacobian of a condition or its transpose, by the solver that the user chose.

What a solver promises is not taken on trust: the residual is that of the system itself, so that a solver which does
not suit the Jacobian (conjugate gradients where it is not symmetric) is found out, and never gives a number silently.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlc.errors import DifferentiationError, PlanError, SolverWarning
from mlc.implicit.condition import Linear
from mlc.linear.solvers import SOLVERS, SYMMETRIC, MatVec, Solve, default_tol, gmres

__all__ = ["Settings", "solve_system"]

_ASYMMETRY = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Settings:
    """How linear systems are solved.

    Attributes:
        solver: A name of :data:`~mlc.linear.solvers.SOLVERS`, or a function ``(matvec, b) -> x`` on flat vectors.
        options: Keyword arguments of the solver.
        accuracy: Relative distance of x from the true root from which on a warning is given.
    """

    solver: str | Callable[..., Any] = "cg"
    options: Mapping[str, Any] = field(default_factory=dict)
    accuracy: float = 1e-2

    @property
    def name(self) -> str:
        """For messages."""
        return self.solver if isinstance(self.solver, str) else getattr(self.solver, "__name__", "the solver")

    def check(self) -> Settings:
        """Itself, if it makes sense.

        Raises:
            PlanError: for an unknown solver or option, or a value out of range.
        """
        if callable(self.solver):
            if self.options:
                raise PlanError(
                    f"options {sorted(self.options)} with a solver of your own", advice="bind them: functools.partial"
                )
            return self
        if self.solver not in SOLVERS:
            raise PlanError(
                f"solver={self.solver!r}", advice=f"use one of {', '.join(sorted(SOLVERS))}, or (matvec, b) -> x"
            )
        known = inspect.signature(SOLVERS[self.solver]).parameters.values()
        taken = {p.name for p in known if p.kind is p.KEYWORD_ONLY} - {"x0", "transposed"}
        unknown = set(self.options) - taken
        if unknown:
            raise PlanError(
                f"solver {self.solver!r} does not take {', '.join(sorted(unknown))}",
                advice=f"it takes {', '.join(sorted(taken))}",
            )
        _positive(self.options, "steps", 1)
        _positive(self.options, "rank", 1)
        _positive(self.options, "restart", 1)
        _positive(self.options, "tol", 0)
        _positive(self.options, "damping", 0)
        return self

    def tol(self, dtype: torch.dtype) -> float:
        """The relative residual that counts as solved."""
        asked = self.options.get("tol")
        return default_tol(dtype) if asked is None else float(asked)


def _positive(options: Mapping[str, Any], name: str, least: float) -> None:
    value = options.get(name)
    if value is not None and not (isinstance(value, (int, float)) and value >= least):
        raise PlanError(f"{name}={value!r}", advice=f"give a number of at least {least}")


def solve_system(settings: Settings, linear: Linear, v: Tensor, *, transposed: bool, what: str) -> Solve:
    """Solve ``A^T u = v`` (``transposed``) or ``A u = v`` for u, A the linearised condition's Jacobian.

    Args:
        settings: Which solver.
        linear: The Jacobian.
        v: Flat right-hand side.
        transposed: Which of the two.
        what: What to call the condition in messages.

    Raises:
        SolverError: NaN or infinity on the way.
    """
    pair: tuple[MatVec, MatVec] = (linear.transposed, linear.product)
    forth, back = pair if transposed else pair[::-1]
    if callable(settings.solver):
        found = _own(settings.solver, forth, v, settings)
    else:
        found = _named(settings, settings.solver, forth, back, v, what)
    if not found.converged and (settings.solver != "nystrom"):
        _warn(found, settings, v.dtype, what)
    return found


def _named(settings: Settings, name: str, forth: Any, back: Any, v: Tensor, what: str) -> Solve:
    options = dict(settings.options)
    symmetric = name in SYMMETRIC
    if name in ("cg", "normal_cg", "bicgstab", "gmres"):
        options.setdefault("steps", max(100, min(10 * v.numel(), 1000)))
    if name == "normal_cg":
        options["transposed"] = back
    if name == "nystrom" and _asymmetry(forth, back, v) > _ASYMMETRY[v.dtype]:
        raise DifferentiationError(
            f"{what} has a Jacobian that is not symmetric, which solver 'nystrom' assumes",
            advice='solver="gmres", "bicgstab" or "normal_cg"',
        )
    found = SOLVERS[name](forth, v, **options)
    if found.converged or not symmetric or name == "nystrom":
        return found
    uneven = _asymmetry(forth, back, v)
    if uneven <= _ASYMMETRY[v.dtype]:
        return found
    warnings.warn(
        SolverWarning(
            f"{what} has a Jacobian that is not symmetric (by {uneven:.2g} of its size): conjugate gradients do not "
            'apply, GMRES solved the system instead. Say solver="gmres", "bicgstab" or "normal_cg"'
        ),
        stacklevel=2,
    )
    kept = {k: x for k, x in options.items() if k in ("steps", "tol", "damping")}
    again = gmres(forth, v, **kept)
    return replace(again, products=again.products + found.products)


def _asymmetry(forth: Any, back: Any, v: Tensor) -> float:
    """``|(A - A^T) p| / |A p|`` for one vector."""
    p = torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=v.dtype).to(v.device)
    a, b = forth(p), back(p)
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(v.dtype).tiny))


def _own(solver: Callable[..., Any], forth: Any, v: Tensor, settings: Settings) -> Solve:
    """A solver of the user's; its answer's residual is ours."""
    found = solver(forth, v)
    x = found.x if isinstance(found, Solve) else found
    if not isinstance(x, Tensor) or x.shape != v.shape:
        raise PlanError(
            f"{settings.name} must return a tensor of shape {tuple(v.shape)}", advice="(matvec, b) -> x on flat vectors"
        )
    x = x.detach().to(v.device, v.dtype)
    residual = float((v - forth(x)).norm()) / max(float(v.norm()), torch.finfo(v.dtype).tiny)
    return Solve(x, 0, residual, None, residual <= settings.tol(v.dtype), 1, settings.name)


def _warn(found: Solve, settings: Settings, dtype: torch.dtype, what: str) -> None:
    tries = 'more steps, a damping, or solver="normal_cg" or "direct"'
    if found.curvature is not None and found.curvature <= 0:
        tries = f"the Jacobian is singular or indefinite (curvature {found.curvature:.2g} seen): {tries}"
    warnings.warn(
        SolverWarning(
            f"{what}: {found.solver} did not solve the linear system of the implicit gradient: residual "
            f"{found.residual:.2g} after {found.iterations} iterations, where {settings.tol(dtype):.2g} was asked for. "
            f"The gradient is inexact by about as much. Try {tries}"
        ),
        stacklevel=2,
    )
