"""What the adjoint may do, and what it knows of one inner gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlc.ir.core import Eqn, Var
from mlc.passes.autodiff.reverse import Deeper, Inside, outermost
from mlc.passes.precision.casts import Casts

__all__ = ["GradRecord", "Policy"]


@dataclass(frozen=True)
class Policy:
    """What the adjoint may do.

    Attributes:
        mode: ``"mixed"`` or ``"reverse"`` for inner gradients (mixed falls back where it must); ``"forward"`` for the
            whole program (see :mod:`mlc.passes.autodiff.jacobian`).
        stop: ``"all"``: a stop holds at every level; ``"inner"``: only for the gradient it stands in; ``"torch"``:
            reads of state that no gradient of PyTorch would follow are stops, too.
        note: Called with (gradient equation, reason) when a gradient falls back to reverse over reverse.
        reverse: Inner gradients that are differentiated in reverse over reverse whatever the mode.
        differences: Inner gradients whose products are central differences, with the step (None: chosen).
        depth: How many declared levels the gradient that is being lowered was taken in; -1: the hypergradient.
        casts: In which dtypes gradients and their products compute; None: as the program does.
        watching: Whether adjoints of loops are measured (see :mod:`mlc.passes.autodiff.watching`).
    """

    mode: str = "mixed"
    stop: str = "all"
    note: Callable[[Eqn, str], None] = field(default=lambda e, why: None)
    reverse: frozenset[Eqn] = frozenset()
    differences: Mapping[Eqn, float | None] = field(default_factory=dict)
    depth: int = -1
    casts: Casts | None = None
    watching: bool = False

    @property
    def through(self) -> Inside:
        """Which stops this gradient passes inside loops."""
        if self.depth < 0:
            return outermost(self.stop)
        return Deeper(self.depth, self.stop == "inner")


@dataclass
class GradRecord:
    """One inner gradient on a tape: values of the builder."""

    losses: list[Var]
    wrt: list[Var]
    seeds: list[Var]
    slice: list[Eqn]
    cut: frozenset[Eqn]
    policy: Policy
    source: Eqn | None = None
