"""The front door: :func:`root` and :func:`fixed_point` make any solver differentiable through what its answer satisfies.

The solver is a black box: SciPy, scikit-learn, a C library, a loop.  Only the condition that its answer satisfies is
differentiated (implicit function theorem), so the gradient costs one linear system whatever the solver did.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.errors import CaptureError, DifferentiationError, PlanError
from mlc.implicit.answer import answer, pieces
from mlc.implicit.condition import Tensors
from mlc.implicit.node import Spec, rooted
from mlc.implicit.solve import Solve
from mlc.implicit.system import Settings
from mlc.implicit.watch import Instead, Watch, captured, unreachable

__all__ = ["Root", "fixed_point", "root"]


class UserCondition:
    """The user's optimality function over the tensors of one call.

    Args:
        call: ``(x leaves, input leaves) -> value``.
        what: Its name.
        x_spec: Structure of x.
    """

    def __init__(self, call: Callable[[Sequence[Tensor], Sequence[Tensor]], Any], what: str, x_spec: Any) -> None:
        self._call, self.what, self._spec = call, what, x_spec
        self._closure: list[Tensor] = []
        self._read: list[tuple[Tensor, int]] = []

    def evaluate(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensors:
        """F; see :class:`~mlc.implicit.condition.Condition`.  The last inputs stand for what it reads by closure."""
        n = len(inputs) - len(self._closure)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(x[0].device.type, enabled=False))
            if self._closure:
                stack.enter_context(Instead(self._closure, inputs[n:]))
            value = self._call(x, inputs[:n])
        return pieces(value, x, self._spec, self.what)

    def explore(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate and look: the tensors that it reads by closure and that require grad.

        Raises:
            DifferentiationError: when it is no function, does not depend on x, or reads such a tensor unseen.
        """
        found, values, self._read = self._look(x, inputs)
        if not any(v.requires_grad for v in values):
            raise DifferentiationError(
                f"{self.what} does not depend on x by differentiable operations",
                advice="compute it from its first argument with torch operators, without detach() or no_grad()",
            )
        if found:
            self._closure = found
            if self._look(x, [*inputs, *found])[0]:
                raise unreachable(self.what)
        return found

    def _look(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensors, Any]:
        points = [t.detach().requires_grad_() for t in x]
        given = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad(), Watch(self.what) as watch:
            values = self.evaluate(points, given)
        ours = {id(t) for t in (*points, *given)}
        read = [r for r in watch.read.values() if id(r[0]) not in ours]
        return captured(watch, values, [*points, *given], self.what), values, read

    def unchanged(self) -> None:
        """Refuse where a tensor that it reads was changed in place since the root was found."""
        for t, version in self._read:
            if t._version != version:
                raise DifferentiationError(
                    f"a tensor that {self.what} reads, of shape {tuple(t.shape)}, was changed in place between the "
                    "solution and its gradient", advice="differentiate before changing it, or pass a copy",
                )  # fmt: skip


class Root:
    """A solver whose answer can be differentiated; called like the solver.

    Attributes:
        solve: The user's solver.
        optimality: The condition.
        settings: How linear systems are solved.
        last: The last linear solve of a gradient (:class:`~mlc.implicit.solve.Solve`): iterations, residual, curvature.
    """

    def __init__(self, solve: Callable[..., Any], optimality: Callable[..., Any], settings: Settings) -> None:
        functools.update_wrapper(self, solve, updated=())
        self.solve, self.optimality, self.settings = solve, optimality, settings
        self._last: list[Solve] = []

    @property
    def last(self) -> Solve | None:
        """The last linear solve."""
        return self._last[0] if self._last else None

    @property
    def what(self) -> str:
        """The condition's name for messages."""
        return f"the optimality condition {_name(self.optimality)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Solve; the answer has the solver's structure, and is connected to what the condition reads.

        Raises:
            CaptureError: when solver or condition return what they should not.
            DifferentiationError: when the condition cannot be differentiated, or nothing that it reads requires grad
                although gradients are enabled and it was given tensors that do.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in inputs):
            raise CaptureError(
                "mlc.root inside a torch.func transform", advice="use torch.autograd.grad, which goes through it"
            )
        with torch.no_grad():
            found = self.solve(*args, **kwargs)
        x, x_spec = answer(found, inputs, f"the solver {_name(self.solve)}")
        condition = UserCondition(self._caller(leaves, spec, x_spec), self.what, x_spec)
        more = condition.explore(x, inputs)
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *more))
        if tracked:
            x = list(rooted(Spec(condition, self.settings, len(x), self._last), x, [*inputs, *more]))
        return pytree.tree_unflatten(x, x_spec)

    def _caller(self, leaves: list[Any], spec: Any, x_spec: Any) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Any]:
        def call(x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
            given = iter(inputs)
            filled = [next(given) if isinstance(t, Tensor) else t for t in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return self.optimality(pytree.tree_unflatten(list(x), x_spec), *args, **kwargs)

        return call


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

    For solutions that are no zero of a smooth gradient: a proximal step (lasso), a projected gradient step (box, simplex
    or norm constraints), a Sinkhorn or Bellman iteration, the layer of a deep equilibrium model.  Derivatives are
    those of the update where the solution lies.

    Args:
        update: ``T(x, *args, **kwargs)`` in torch operators, in the structure and shapes of x.
        solver: As in :func:`root`; ``"neumann"`` needs one product with the update's Jacobian per term, where the update
            is a contraction.
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
        self.__qualname__ = _name(update)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The difference, leaf by leaf."""
        new = self.update(x, *args, **kwargs)
        leaves, spec = pytree.tree_flatten(x)
        return pytree.tree_unflatten(
            [a - b for a, b in zip(leaves, pieces(new, leaves, spec, f"the update {self.__qualname__}"), strict=True)],
            spec,
        )


def _name(f: Any) -> str:
    return str(getattr(f, "__qualname__", None) or type(f).__name__)
