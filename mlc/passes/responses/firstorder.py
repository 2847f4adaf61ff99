"""FirstOrder: the level's gradients are constants on their way into its update.

Before: ``g = grad(loss; theta)``.  After: ``g' = grad(loss; theta); g = stop[level=-1](g')``.  What the update does
with g is followed as before, so a learned rate, a decay and the starting point keep their derivatives (first-order
MAML, Finn et al. 2017).  No second-order product is left for the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlc.ir.core import Eqn
from mlc.ir.program import Program
from mlc.passes.responses.rewrite import everywhere, holding

__all__ = ["first_order"]


def first_order(program: Program, gradients: Sequence[Eqn]) -> Program:
    """The program with these gradients stopped."""
    mine = {id(e) for e in gradients}

    def change(e: Eqn) -> Sequence[Eqn]:
        if id(e) not in mine:
            return [e]
        made, stops = holding(e, e.outs)
        return [made, *stops]

    return replace(program, region=everywhere(program.region, change))
