"""The front door: :func:`root` and :func:`fixed_point` make solvers differentiable through what their answers satisfy.

The solver is a black box: SciPy, scikit-learn, a C library, a loop.  Only the condition that its answer satisfies is
differentiated (implicit function theorem), so the gradient costs one linear system whatever the solver did.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.errors import CaptureError, DifferentiationError, MlcError, PlanError
from mlc.implicit.answer import answer, pieces
from mlc.implicit.closed import UserCondition, caller, detached, name_of
from mlc.implicit.conditioned import Conditioned
from mlc.implicit.node import Spec, rooted
from mlc.implicit.recorded import record
from mlc.implicit.system import Settings
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.tracer import Tracer

__all__ = ["Root", "fixed_point", "root"]


class Root(Conditioned):
    """A solver whose answer can be differentiated; called like the solver."""

    def __init__(self, solve: Callable[..., Any], optimality: Callable[..., Any], settings: Settings) -> None:
        super().__init__(solve, optimality, settings)
        functools.update_wrapper(self, solve, updated=())

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Solve; the answer has the solver's structure, and is connected to what the condition reads.

        Raises:
            CaptureError: when solver or condition return what they should not.
            DifferentiationError: when the condition cannot be differentiated, or nothing that it reads requires grad
                although gradients are enabled and it was given tensors that do.
        """
        tracer: Any = Tracer.current
        if tracer is not None and not getattr(tracer, "paused", False):
            return self._recorded(tracer, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        if any(t.is_complex() and t.requires_grad for t in inputs):
            raise DifferentiationError(
                "mlc.root of complex arguments that require grad", advice="pass torch.view_as_real(argument)"
            )
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in inputs):
            raise CaptureError(
                "mlc.root inside a torch.func transform", advice="use torch.autograd.grad, which goes through it"
            )
        with torch.no_grad():
            given, named = detached((args, kwargs))
            found = self.solve(*given, **named)
        x, x_spec = answer(found, inputs, self.solver_name)
        if torch.is_inference_mode_enabled():
            return pytree.tree_unflatten(x, x_spec)
        condition = UserCondition(caller(self.optimality, leaves, spec, x_spec), self.what, x_spec)
        more, depends = condition.explore(x, inputs)
        if torch.is_grad_enabled() and (more or any(depends)):
            live = [t if d else t.detach() for t, d in zip(inputs, depends, strict=True)]
            x = list(rooted(Spec(condition, self.settings, len(x), self.log), x, [*live, *more]))
        return pytree.tree_unflatten(x, x_spec)

    def _recorded(self, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inside a compiled function."""
        real = isinstance(tracer, Observer)
        if not real or tracer.nested:
            raise CaptureError(
                "mlc.root while tracing without running" if not real else "mlc.root inside another condition",
                loc=tracer.place(), advice="trace by running (the default)" if not real else
                "solve before, and pass the result as an argument",
            )  # fmt: skip
        try:
            return record(tracer, self, args, kwargs)
        except MlcError as e:
            if e.loc is not None:
                raise
            raise type(e)(e.what, loc=tracer.place(), advice=e.advice) from e


def root(optimality: Callable[..., Any], solver: str | Callable[..., Any] = "cg", *, accuracy: float = 1e-2,
         **options: Any) -> Callable[[Callable[..., Any]], Root]:  # fmt: skip
    """Differentiate a solver through the condition that its answer satisfies.

        @mlc.root(lambda w, X, y, penalty: X.T @ (X @ w - y) + penalty * w)
        def ridge(X, y, penalty):
            return sklearn.linear_model.Ridge(alpha=penalty.item(), fit_intercept=False).fit(X, y).coef_

        loss = ((X_val @ ridge(X, y, penalty) - y_val) ** 2).mean()
        loss.backward()                                  # penalty.grad

    The implicit function theorem: where ``optimality(x, *args) = 0``, ``dx/dargs = -(dF/dx)^-1 dF/dargs``.  One linear
    system with the transposed Jacobian is solved in the backward pass, by products alone; a second derivative
    (``create_graph=True``) solves two more, and so on.

    Args:
        optimality: ``F(x, *args, **kwargs)`` in torch operators, 0 at the solution: for each element of x one
            equation, in the structure, shapes and device of x.  A loss is no condition; its gradient by x is
            (``torch.autograd.grad(loss, x, create_graph=True)`` or ``torch.func.grad``).  Constraints enter as their
            KKT conditions, with the multipliers in x.  Tensors that it reads by closure count like arguments.
        solver: Of the linear system: ``"cg"`` (symmetric Jacobian: F is a gradient), ``"gmres"``, ``"bicgstab"``,
            ``"normal_cg"`` (any), ``"neumann"``, ``"nystrom"`` (symmetric, approximate), ``"direct"`` (small: the dense
            matrix), or a function ``(matvec, b) -> x`` on flat tensors.  ``"cg"`` on a Jacobian that is not symmetric
            warns, and GMRES solves instead.
        accuracy: A relative distance of x from the true root beyond which a warning is given.
        options: Of the solver: ``steps`` (iterations at most; ten times the size of x, between 100 and 1000), ``tol``
            (relative residual; 1e-10 in float64, 1e-5 in float32), ``damping`` (added to the Jacobian's diagonal),
            ``restart``, ``scale``, ``rank``: see :mod:`mlc.implicit.solvers`.

    Returns:
        A decorator for ``solve(*args, **kwargs) -> x``.  It runs without gradients and may return tensors, NumPy arrays
        or numbers, or a tuple or dict of them; NumPy's get the dtype and device of the first floating argument.

    Raises:
        PlanError: for an unknown solver or option.
    """
    settings = Settings(solver, dict(options), accuracy).check()

    def decorate(solve: Callable[..., Any]) -> Root:
        if not callable(solve):
            raise PlanError(f"mlc.root(...) of {solve!r}", advice="mlc.root(optimality)(solve), solve a function")
        return Root(solve, optimality, settings)

    if not callable(optimality):
        raise PlanError(f"mlc.root({optimality!r})", advice="mlc.root(optimality)(solve), optimality a function")
    return decorate


def fixed_point(update: Callable[..., Any], solver: str | Callable[..., Any] = "gmres", *, accuracy: float = 1e-2,
                **options: Any) -> Callable[[Callable[..., Any]], Root]:  # fmt: skip
    """Differentiate a solver through an update that leaves its answer as it is: ``update(x, *args) = x``.

    For solutions that are no zero of a smooth gradient: a proximal step (lasso), a projected gradient step (box,
    simplex or norm constraints), a Sinkhorn or Bellman iteration, the layer of a deep equilibrium model.
    Derivatives are those of the update where the solution lies.

    Args:
        update: ``T(x, *args, **kwargs)`` in torch operators, in the structure and shapes of x.
        solver: As in :func:`root`; ``"neumann"`` (the update a contraction) takes one product with the update's
            Jacobian per term.
        accuracy: As in :func:`root`.
        options: As in :func:`root`.

    Returns:
        A decorator for ``solve(*args, **kwargs) -> x``.

    Raises:
        PlanError: for an unknown solver or option.
    """
    if not callable(update):
        raise PlanError(f"mlc.fixed_point({update!r})", advice="mlc.fixed_point(update)(solve), update a function")
    if solver == "neumann":
        options.setdefault("scale", 1.0)
    return root(Update(update), solver, accuracy=accuracy, **options)


class Update:
    """``x - update(x, ...)``, the condition of a fixed point."""

    def __init__(self, update: Callable[..., Any]) -> None:
        self.update = update
        self.__qualname__ = name_of(update)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The difference, leaf by leaf."""
        new = self.update(x, *args, **kwargs)
        leaves, spec = pytree.tree_flatten(x)
        return pytree.tree_unflatten(
            [a - b for a, b in zip(leaves, pieces(new, leaves, spec, f"the update {self.__qualname__}"), strict=True)],
            spec,
        )
