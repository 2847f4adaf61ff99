"""Value numbering: which values of two regions are the same function of the same inputs.

Equations are compared by operator, literals and the numbers of their operands; aliases and stops pass the number of
their operand on.  Linear in the number of equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc.ir.core import Alias, Custom, Region, Stop, Var
from mlc.ir.keys import equation_key

__all__ = ["Numbering"]


class Numbering:
    """Numbers shared by several regions."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def fresh(self) -> int:
        """A number that nothing else has."""
        return self._known.setdefault(object(), len(self._known))

    def region(self, region: Region, inputs: Mapping[Var, int]) -> dict[Var, int]:
        """Numbers of all values of a region, given those of (some of) its inputs."""
        numbers = dict(inputs)
        for v in region.inputs:
            if v not in numbers:
                numbers[v] = self.fresh()
        for e in region.eqns:
            if isinstance(e.op, (Alias, Stop)):
                numbers.update((o, numbers[a]) for o, a in zip(e.outs, e.args, strict=False))
                continue
            if isinstance(e.op, Custom):
                raw = e.args[e.op.n_in : e.op.n_in + e.op.n_out]
                numbers.update((o, numbers[a]) for o, a in zip(e.outs, raw, strict=True))
                continue
            key = object() if e.impure else equation_key(e, lambda v: ("value", numbers[v]))
            for i, v in enumerate(e.outs):
                numbers[v] = self._known.setdefault((key, i), len(self._known))
        return numbers
