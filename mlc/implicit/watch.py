"""What an optimality condition reads besides its arguments, and what it must not do.

The condition is evaluated again whenever a derivative is needed, so it has to be a function: drawing random numbers
and writing into tensors that were there before are errors.  Tensors that it reads by closure and that require grad
are found in PyTorch's graph of its result, and become inputs of the root like its arguments: another tensor takes
their place when a derivative is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlc.errors import DifferentiationError
from mlc.ir.trees import each_tensor, map_tensors

__all__ = ["Instead", "Watch", "captured", "unreachable"]

Edge = tuple[Any, int]


class Watch(TorchDispatchMode):
    """While a condition is evaluated: who writes where, and which tensors of a graph from before are read.

    Attributes:
        read: Tensors that came from outside, by identity, with their versions.
        edges: Those of them that an older graph computed, by their place in it.
    """

    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what
        self._made: dict[int, Tensor] = {}
        self._start = torch.zeros((), requires_grad=True).view_as(torch.zeros(())).grad_fn._sequence_nr()  # type: ignore[union-attr]
        self.read: dict[int, tuple[Tensor, int]] = {}
        self.edges: dict[Edge, Tensor] = {}

    def older(self, node: Any) -> bool:
        """Whether a node of PyTorch's graph was there before."""
        return bool(node._sequence_nr() < self._start)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise DifferentiationError(
                f"{self._what} draws random numbers ({func}): it is another function at every evaluation",
                advice="draw them before, and pass them as an argument; call eval() on modules with dropout",
            )
        self._refuse_writes(func, args, kwargs)
        each_tensor((args, tuple(kwargs.values())), self._note)
        out = func(*args, **kwargs)
        each_tensor(out if isinstance(out, (tuple, list)) else (out,), self._keep)
        return out

    def _keep(self, t: Tensor) -> None:
        if id(t) not in self.read:
            self._made[id(t)] = t

    def _note(self, t: Tensor) -> None:
        if id(t) in self._made or id(t) in self.read:
            return
        if t.grad_fn is not None:
            if not self.older(t.grad_fn):
                return
            self.edges[t.grad_fn, t.output_nr] = t
        self.read[id(t)] = (t, 0 if t.is_inference() else t._version)

    def _refuse_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        if not func._schema.is_mutable:
            return
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        for a in func._schema.arguments:
            if a.alias_info is not None and a.alias_info.is_write:
                t = given.get(a.name)
                if isinstance(t, Tensor) and id(t) not in self._made:
                    raise DifferentiationError(
                        f"{self._what} changes a tensor in place that was there before ({func})",
                        advice="compute a new tensor instead; call eval() on modules with batch norm",
                    )


def captured(watch: Watch, outs: Sequence[Tensor], given: Sequence[Tensor], what: str) -> list[Tensor]:
    """Tensors that require grad, that ``outs`` depend on, and that are not among ``given``.

    Raises:
        DifferentiationError: for one that is no tensor that the condition was seen to read.
    """
    stand_ins = {id(t) for t in given}
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    todo: list[Edge] = [(t.grad_fn, t.output_nr) for t in outs if t.grad_fn is not None]
    while todo:
        node, nr = todo.pop()
        if hasattr(node, "variable"):
            if id(node.variable) not in stand_ins:
                found[id(node.variable)] = node.variable
        elif watch.older(node):
            if (node, nr) not in watch.edges:
                raise unreachable(what)
            t = watch.edges[node, nr]
            found[id(t)] = t
        elif node not in seen:
            seen.add(node)
            todo.extend((n, i) for n, i in node.next_functions if n is not None)
    return list(found.values())


def unreachable(what: str) -> DifferentiationError:
    """A tensor is read in a way that nobody sees."""
    return DifferentiationError(
        f"{what} reads a tensor that requires grad in a way that cannot be followed",
        advice="pass it as an argument of the function that solves: solve(..., that_tensor)",
    )


class Instead(TorchFunctionMode):
    """While a condition is evaluated: other tensors in the place of those that it reads by closure."""

    def __init__(self, tensors: Sequence[Tensor], instead: Sequence[Tensor]) -> None:
        super().__init__()
        self._held = tuple(tensors)
        self._instead = {id(t): s for t, s in zip(tensors, instead, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(a: Any) -> Any:
            return self._instead.get(id(a), a)

        return func(*map_tensors(args, swap), **map_tensors(kwargs or {}, swap))
