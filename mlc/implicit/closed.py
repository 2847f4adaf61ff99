"""The user's optimality function as a condition on lists of tensors, with what it reads by closure as inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.errors import DifferentiationError
from mlc.implicit.answer import pieces
from mlc.implicit.condition import Tensors
from mlc.implicit.watch import Instead, Watch, captured, unreachable

__all__ = ["UserCondition", "caller", "detached", "name_of"]


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

    def explore(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """Evaluate and look: the tensors that it reads by closure and that require grad; which inputs it depends on.

        Raises:
            DifferentiationError: when it is no function, does not depend on x, on nothing that requires grad although
                it was given some, or reads such a tensor unseen.
        """
        found, depends = self._look(x, inputs)
        if found:
            self._closure = found
            if self._look(x, [*inputs, *found])[0]:
                raise unreachable(self.what)
        elif torch.is_grad_enabled() and any(t.requires_grad for t in inputs) and not any(depends):
            raise DifferentiationError(
                f"{self.what} does not depend on any argument that requires grad, by differentiable operations",
                advice="compute it from its arguments with torch operators: no detach(), item() or numpy() in it",
            )
        return found, depends

    def _look(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """What it reads by closure, and on which inputs it depends."""
        points = [t.detach().requires_grad_() for t in x]
        given = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad(), Watch(self.what) as watch:
            values = self.evaluate(points, given)
        ours = {id(t) for t in (*points, *given)}
        if not self._closure:
            self._read = [r for r in watch.read.values() if id(r[0]) not in ours]
        found = captured(watch, values, [*points, *given], self.what)
        live = [v for v in values if v.requires_grad]
        wrt = [*points, *[t for t in given if t.requires_grad]]
        seeds = [torch.zeros_like(v) for v in live]
        by = torch.autograd.grad(live, wrt, seeds, allow_unused=True) if live else [None] * len(wrt)
        reached = {id(t) for t, g in zip(wrt, by, strict=True) if g is not None}
        if not any(id(t) in reached for t in points):
            raise DifferentiationError(
                f"{self.what} does not depend on x by differentiable operations",
                advice="compute it from its first argument with torch operators, without detach() or no_grad()",
            )
        return found, [id(t) in reached for t in given]

    @property
    def outside(self) -> list[Tensor]:
        """Tensors that it reads by closure, whether or not they require grad."""
        return [t for t, _ in self._read if not t.is_inference()]

    def unchanged(self) -> None:
        """Refuse where a tensor that it reads was changed in place since the root was found."""
        for t, version in self._read:
            if not t.is_inference() and t._version != version:
                raise DifferentiationError(
                    f"a tensor that {self.what} reads, of shape {tuple(t.shape)}, was changed in place between the "
                    "solution and its gradient", advice="differentiate before changing it, or pass a copy",
                )  # fmt: skip


def caller(optimality: Callable[..., Any], leaves: list[Any], spec: Any, x_spec: Any,
           ) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Any]:  # fmt: skip
    """``optimality`` as a function of the tensors of x and of the arguments."""

    def call(x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        given = iter(inputs)
        filled = [next(given) if isinstance(t, Tensor) else t for t in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return optimality(pytree.tree_unflatten(list(x), x_spec), *args, **kwargs)

    return call


def detached(args: Any) -> Any:
    """Arguments for a solver: what it does with them is no part of anybody's graph."""
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args)


def name_of(f: Any) -> str:
    """What to call a function in messages."""
    return str(getattr(f, "__qualname__", None) or type(f).__name__)
