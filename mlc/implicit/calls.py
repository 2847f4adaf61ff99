"""A root inside a compiled function: its condition as a recorded region, its solver and its derivatives as callees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.implicit.answer import answer
from mlc.implicit.condition import Tensors, stand_ins
from mlc.implicit.function import Function, along
from mlc.implicit.node import Spec, pull, rooted, solution
from mlc.implicit.reading import Reading, noting
from mlc.ir.core import Region
from mlc.ir.types import TensorType
from mlc.runtime.interpreter.feeds import Stale
from mlc.trace.gradients.unroll import Unroll

__all__ = ["Recorded", "RegionCondition", "Solver", "filled"]


class RegionCondition:
    """A recorded condition: a region over x and all tensors that it reads."""

    def __init__(self, region: Region, what: str) -> None:
        self.region, self.what = region, what

    def evaluate(self, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensors:
        """F; see :class:`~mlc.implicit.condition.Condition`."""
        r = self.region
        given = [*x, *inputs][: len(r.inputs)]
        return tuple(Unroll(r.eqns, r.inputs).run(given, r.outputs))

    def unchanged(self) -> None:
        """It reads nothing but its inputs."""


@dataclass
class Recorded:
    """What one solver run gave, for the time of the first call."""

    solver: Solver
    inputs: list[Tensor]
    x: list[Tensor]


@dataclass
class Solver:
    """The user's solver over the tensors of one call.

    Attributes:
        solve: The function.
        what: Its name.
        leaves: Arguments, with None for tensors.
        spec: Structure of the arguments.
        x_spec: Structure of x.
        types: Types of x.
        foreign: Tensors that it reads by closure; their present values are the last inputs.
        cells: Variables of the compiled function that it reads by closure, and what they held.
        first: Runs of the first call: they are not repeated when what was compiled is compared with it.
        key: Equal for runs that are one node of the program.
    """

    solve: Callable[..., Any]
    what: str
    leaves: list[Any]
    spec: Any
    x_spec: Any
    types: list[TensorType]
    foreign: list[Tensor]
    cells: list[tuple[Any, Any]]
    first: list[Recorded] = field(default_factory=list)
    key: tuple[Any, ...] = ()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The x for these values of the arguments and of what it reads by closure."""
        known = self._known(inputs)
        if known is not None:
            return known
        given = [t.detach() for t in inputs]
        n = len(given) - len(self.foreign)
        args, kwargs = filled(self.leaves, self.spec, given[:n])
        instead = {id(t): v for t, v in zip(self.foreign, given[n:], strict=True)}
        now = [(c, c.cell_contents) for c, _ in self.cells]
        with torch.no_grad(), Reading(given[:n], instead, self._unknown) as reading, noting(reading):
            try:
                _put(self.cells)
                found = self.solve(*args, **kwargs)
            finally:
                _put(now)
        x, spec = answer(found, given[:n], self.what)
        if spec != self.x_spec or any(
            t.shape != ty.shape or t.dtype != ty.dtype or t.device != ty.device
            for t, ty in zip(x, self.types, strict=True)
        ):
            raise Stale(f"{self.what} returned x in another structure or shape")
        return [t.contiguous() for t in x]

    def _known(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """What the first call's run gave for these inputs, up to rounding."""
        runs = [(_distance(r.inputs, inputs), i) for i, r in enumerate(self.first) if r.solver.key == self.key]
        near = min(runs, default=(math.inf, 0))
        return [t.clone() for t in self.first[near[1]].x] if near[0] <= 1.0 else None

    def _unknown(self, t: Tensor) -> None:
        raise Stale(f"{self.what} reads a tensor of shape {tuple(t.shape)} that it did not read when it was recorded")


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """How far tensors differ, in units of what the order of sums explains."""
    far = 0.0
    for x, y in zip(a, b, strict=True):
        if torch.equal(x, y):
            continue
        if x.shape != y.shape or not x.dtype.is_floating_point:
            return math.inf
        unit = 256 * torch.finfo(x.dtype).eps * float(x.abs().max())
        far = max(far, float((x - y).abs().max()) / unit if unit > 0 else math.inf)
    return far


def _put(cells: Sequence[tuple[Any, Any]]) -> None:
    for cell, value in cells:
        cell.cell_contents = value


def filled(leaves: Sequence[Any], spec: Any, tensors: Sequence[Tensor]) -> Any:
    """Arguments with these tensors where the leaves are :data:`HOLE`."""
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if x is HOLE else x for x in leaves], spec)


HOLE = object()


class RootCall(Function):
    """The callee of a root: the solver forward, the implicit function theorem for its derivatives."""

    def __init__(self, solver: Solver, spec: Spec, key: tuple[Any, ...], parts: tuple[list[int], list[int]]) -> None:
        """``parts``: which inputs the solver reads, and which the condition."""
        self.solver, self.spec, self.parts = solver, spec, parts
        super().__init__(self._solve, key)

    def _solve(self, *inputs: Tensor) -> Tensors:
        x = self.solver([inputs[i] for i in self.parts[0]])
        if not torch.is_grad_enabled():
            return tuple(x)
        return rooted(self.spec, x, [inputs[i] for i in self.parts[1]])

    def pulled(self, wanted: tuple[bool, ...], given: tuple[bool, ...]) -> Function:
        """See :meth:`Function.pulled`; the solver does not run again."""
        n, which = len(wanted), self.parts[1]

        def run(*tensors: Tensor) -> Tensors:
            inputs, x, some = tensors[:n], tensors[n : n + len(given)], iter(tensors[n + len(given) :])
            cts = [next(some) if g else torch.zeros_like(t) for t, g in zip(x, given, strict=True)]
            found = pull(self.spec, x, [inputs[i] for i in which], cts, [wanted[i] for i in which])
            by = dict(zip(which, found, strict=True))
            grown = [by.get(i) for i in range(n)]
            return tuple(torch.zeros_like(t) if g is None else g
                         for t, g, w in zip(inputs, grown, wanted, strict=True) if w)  # fmt: skip

        return Function(run, ("pull", self.key, wanted, given))

    def pushed(self, which: tuple[bool, ...], n_out: int) -> Function:
        """See :meth:`Function.pushed`; the solver does not run again."""
        n, reads = len(which), self.parts[1]

        def run(*tensors: Tensor) -> Tensors:
            inputs, x, some = tensors[:n], tensors[n : n + n_out], iter(tensors[n + n_out :])
            tangents = {i: next(some) for i in range(n) if which[i]}
            again = torch.is_grad_enabled()
            given = [inputs[i] for i in reads]
            moving = [i in tangents for i in reads]
            with torch.enable_grad():
                points = stand_ins(given, moving, again)
                values = self.spec.condition.evaluate(stand_ins(x, [True] * n_out, again), points)
                live = [p for p, m in zip(points, moving, strict=True) if m]
                by_inputs = along(values, live, [tangents[i] for i in reads if i in tangents], again)
            return solution(self.spec, False, x, given, [-t for t in by_inputs])

        return Function(run, ("push", self.key, which))
